"""A client's connection: uvicorn's server calls it, httptools parses what it reads.

Rules
- One request is served at a time. What a client sends ahead of its turn is kept, up to a limit, and parsed when its
  turn has come; reading goes on meanwhile, so that a hang-up is noticed.
- A body is read only once somebody wants it: before that, its bytes stay in the system's buffers.
- Once an answer closes the connection nothing more of its input is parsed.
- A head has ``timeout_s`` in all. A body has that long between two parts, and in all that plus a second for each KiB.
- An answer that the client does not read ends the connection after ``stall_s`` without progress.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import httptools
from uvicorn.config import Config
from uvicorn.server import ServerState

from disagg_prefill_lmcache_v1.proxy.client_request import ClientRequest
from disagg_prefill_lmcache_v1.proxy.errors import ProxyError, too_long
from disagg_prefill_lmcache_v1.proxy.headers import Header

_LINGER_S = 2.0  # how long the rest of a refused body is read, so that the client sees the answer and not a reset
_KEEP_ALIVE_S = 75.0  # how long a connection may wait for its next request
_BODY_BYTES_PER_S = 1024
_AHEAD_BYTES = 256 * 1024  # read ahead of its turn; more stays unread
_AHEAD_REQUESTS = 64
_FIELD_COST = 32  # what a header field counts beside its text
_FRAMING_PART = 16  # most bytes of framing (chunk sizes, extensions, trailers) for each byte of body
_TICKS = 4  # looks at the clock in each timeout
_FOREVER = float("inf")

_absolute_form = re.compile(rb"https?://[^/?#@]+(/[^#]*)?", re.IGNORECASE).fullmatch

# Most header fields are the same in many requests: each is made up once.
_known: dict[tuple[bytes, bytes], Header] = {}
_KNOWN = 512
_UNIQUE = frozenset((b"x-request-id", b"traceparent", b"content-length", b"authorization"))


def _header(name: bytes, value: bytes) -> Header:
    lower, stripped = name.lower(), value.rstrip(b" \t")
    header = (lower, stripped, b"%b: %b\r\n" % (name, stripped))
    if lower not in _UNIQUE and len(value) < 256:
        if len(_known) >= _KNOWN:
            _known.clear()
        _known[name, value] = header
    return header


def split_target(url: bytes) -> tuple[str, bytes] | None:
    """Decoded path, and target in origin form, of a request line's target; None for a form that is not taken."""
    if url[:1] != b"/" and url != b"*":
        match = _absolute_form(url)
        if match is None:
            return None
        url = match[1] or b"/"
    if b"#" in url:
        return None
    path = url.partition(b"?")[0].decode("latin-1")
    return unquote(path) if "%" in path else path, url


@dataclass(frozen=True)
class ClientLimits:
    """What one connection may cost. Bytes and seconds; ``stall_s`` 0 is no limit."""

    head_bytes: int
    body_bytes: int
    timeout_s: float
    stall_s: float


Handler = Callable[[ClientRequest], Coroutine[Any, Any, None]]
"""Serves a request."""


class ClientConnection(asyncio.Protocol):
    """uvicorn's ``http`` protocol class. The application's lifespan state gives it ``handler`` and ``limits``."""

    transport: asyncio.Transport

    def __init__(self, config: Config, server_state: ServerState, app_state: dict[str, Any], **_: Any) -> None:
        self._handler: Handler = app_state["handler"]
        self._limits: ClientLimits = app_state["limits"]
        self._server = server_state
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpRequestParser(self)
        self._request: ClientRequest | None = None  # being served
        self._receiving: ClientRequest | None = None  # its body is not complete
        self._queue: deque[ClientRequest] = deque()  # parsed, not served yet
        self._ahead = b""  # not parsed yet
        self._ended = False  # no more input is taken
        self._reading = True
        self.write_paused = False
        self._in_head = self._timed_head = False
        self._upgrade = self._replay = False
        self._fed = 0  # bytes parsed of the message
        self._fault: ProxyError | None = None
        self._deadline = _FOREVER
        self._timer: asyncio.TimerHandle | None = None
        self._unsent, self._unsent_since = 0, 0.0

    # -- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        self._server.connections.add(self)  # type: ignore[arg-type]
        self._set_deadline(self._limits.timeout_s)
        self._on_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.connections.discard(self)  # type: ignore[arg-type]
        self._ended = True
        self._queue.clear()
        if self._timer is not None:
            self._timer.cancel()
        request, self._request = self._request, None
        if request is not None:
            request.hung_up()

    def pause_writing(self) -> None:
        self.write_paused = True
        if self._request is not None:
            self._request.set_paused(True)

    def resume_writing(self) -> None:
        self.write_paused = False
        if self._request is not None:
            self._request.set_paused(False)

    def shutdown(self) -> None:
        """Called by uvicorn when it begins to end: no further request."""
        if self._request is None:
            self.transport.close()
        else:
            self._request.keep_alive = False

    def data_received(self, data: bytes) -> None:
        if self._ended:
            return
        if self._ahead:
            data, self._ahead = self._ahead + data, b""
        if self._request is not None and self._request is not self._receiving:
            self._ahead = data
            if len(data) > _AHEAD_BYTES:
                self._read(False)
            return
        self._parse(data)
        request = self._receiving
        if self._in_head:
            if not self._timed_head and self._request is None:
                self._timed_head = True
                self._set_deadline(self._limits.timeout_s)
        elif request is None:
            self._deadline = _FOREVER if self._request is not None else self._deadline
        elif request is self._request and not self._ended:
            if request.wants_body:
                self._time_body(request)
            else:
                self._deadline = _FOREVER
                self._read(False)

    # -- parsing

    def _parse(self, data: bytes) -> None:
        self._fed += len(data)
        try:
            while data and not self._ended:
                try:
                    self._parser.feed_data(data)
                    break
                except httptools.HttpParserUpgrade as upgrade:
                    data = data[upgrade.args[0] :]
                    self._parse_without_upgrade()
        except httptools.HttpParserError:
            self._refuse(self._fault or ProxyError(400, "this is not a valid HTTP/1.1 request", "proxy", "bad_request"))
            return
        if self._in_head and self._fed > 2 * self._limits.head_bytes:
            self._refuse(self._head_too_long())
        elif self._receiving is not None:
            body = self._receiving.body_size
            if self._fed - body > _FRAMING_PART * body + 2 * self._limits.head_bytes:
                self._refuse(ProxyError(400, "the body is mostly framing", "proxy", "bad_request"))

    def _parse_without_upgrade(self) -> None:
        """The parser has stopped at an Upgrade header, which is ignored: let another one go on with the body."""
        self._upgrade, self._replay = False, True
        self._parser = httptools.HttpRequestParser(self)
        request = self._receiving
        if request is not None:
            framing = b"" if request.keep_alive else b"connection: close\r\n"
            for name, _, line in request.headers:
                if name in (b"content-length", b"transfer-encoding"):
                    framing += line
            self._parser.feed_data(b"POST / HTTP/1.1\r\n" + framing + b"\r\n")
        self._replay = False

    def _head_too_long(self) -> ProxyError:
        message = f"the request head is longer than {self._limits.head_bytes} bytes"
        return ProxyError(431, message, "proxy", "bad_request")

    def _refuse(self, error: ProxyError) -> None:
        """Answer what has come with an error, in its turn, and take nothing more."""
        if self._ended:
            return
        self._ended = True
        if self._receiving is not None:
            self._receiving.refuse(error)
        else:
            self._enter(ClientRequest(self, "-", "", b"", [], "1.1", False, error))

    def on_message_begin(self) -> None:
        if self._replay:
            return
        self._in_head, self._timed_head = True, False
        self._fed = self._head_size = 0
        self._url = b""
        self._headers: list[Header] = []

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_head or self._replay:
            return  # a trailer
        self._head_size += len(name) + len(value) + _FIELD_COST
        if self._head_size > self._limits.head_bytes:
            self._fault = self._head_too_long()
            raise self._fault
        self._headers.append(_known.get((name, value)) or _header(name, value))

    def on_headers_complete(self) -> None:
        if self._replay:
            return
        self._in_head = False
        if self._ended:
            return
        parser = self._parser
        method, version = parser.get_method().decode(), parser.get_http_version()
        found = split_target(self._url)
        error = None
        if found is None or version not in ("1.0", "1.1"):
            error = ProxyError(400, "this is not a valid HTTP/1.1 request", "proxy", "bad_request")
        elif len(self._url) + self._head_size > self._limits.head_bytes:
            error = self._head_too_long()
        path, target = found or ("", b"")
        keep_alive = error is None and version == "1.1" and parser.should_keep_alive()
        request = ClientRequest(self, method, path, target, self._headers, version, keep_alive, error)
        self._upgrade = parser.should_upgrade()
        self._receiving = request
        self._enter(request)

    def on_body(self, body: bytes) -> None:
        request = self._receiving
        if request is None:
            return
        request.take_body(body)
        if request.body_size > self._limits.body_bytes:
            self._ended = True
            request.refuse(too_long(self._limits.body_bytes))

    def on_message_complete(self) -> None:
        request = self._receiving
        if request is None or self._upgrade or self._ended:
            return
        self._receiving = None
        request.end_body()
        if not request.keep_alive:
            self._ended = True

    # -- requests in their turn

    def _enter(self, request: ClientRequest) -> None:
        if self._request is None:
            self._start(request)
            return
        self._queue.append(request)
        if len(self._queue) >= _AHEAD_REQUESTS:
            self._ended = True
            request.keep_alive = False

    def _start(self, request: ClientRequest) -> None:
        self._request = request
        request.task = task = self._loop.create_task(self._handler(request))
        self._server.tasks.add(task)
        task.add_done_callback(self._server.tasks.discard)

    def want_body(self, request: ClientRequest) -> None:
        """Read the request's body from now on."""
        self._time_body(request)
        self._read(True)
        if self._ahead:
            self._loop.call_soon(self._parse_ahead)

    def answered(self, request: ClientRequest) -> None:
        """The answer is written."""
        if self._request is not request:
            return  # the connection has ended
        self._request = None
        self._server.total_requests += 1
        if not request.keep_alive:
            self._close(request)
        elif self._queue:
            self._start(self._queue.popleft())
        else:
            self._set_deadline(_KEEP_ALIVE_S)
            self._read(True)
            if self._ahead:
                self._loop.call_soon(self._parse_ahead)

    def _parse_ahead(self) -> None:
        if self._ahead:
            data, self._ahead = self._ahead, b""
            self.data_received(data)

    def _close(self, request: ClientRequest) -> None:
        """End the connection once the answer is out."""
        self._ended = True
        self._queue.clear()
        self._ahead = b""
        self._receiving = None
        self._set_deadline(_LINGER_S)
        transport = self.transport
        if transport.is_closing():
            return
        if request.body_complete:
            transport.close()
            return
        self._read(True)
        if transport.can_write_eof():
            transport.write_eof()
        self._loop.call_later(_LINGER_S, transport.close)

    def _read(self, on: bool) -> None:
        if self._reading != on and not self.transport.is_closing():
            self._reading = on
            if on:
                self.transport.resume_reading()
            else:
                self.transport.pause_reading()

    # -- time

    def _set_deadline(self, seconds: float) -> None:
        self._deadline = self._loop.time() + seconds

    def _time_body(self, request: ClientRequest) -> None:
        now, timeout = self._loop.time(), self._limits.timeout_s
        if request.body_begun == 0.0:
            request.body_begun = now
        self._deadline = min(now, request.body_begun + request.body_size / _BODY_BYTES_PER_S) + timeout

    def _on_timer(self) -> None:
        now = self._loop.time()
        if self._request is None and self._is_stalled(now):
            self.transport.abort()
        elif now >= self._deadline and not self._unsent:
            self._deadline = _FOREVER
            self._expire()
        tick = self._limits.timeout_s / _TICKS
        self._timer = self._loop.call_at(max(min(self._deadline, now + tick), now + 0.01), self._on_timer)

    def _is_stalled(self, now: float) -> bool:
        """Whether the client has read nothing of what is written for too long."""
        unsent = self.transport.get_write_buffer_size()
        if unsent != self._unsent:
            self._unsent, self._unsent_since = unsent, now
        stall_s = self._limits.stall_s
        return bool(unsent and stall_s) and now - self._unsent_since >= stall_s

    def _expire(self) -> None:
        if self._request is None:
            self.transport.close()
        elif self._receiving is self._request:
            self._ended = True
            message = f"no more of the request body within {self._limits.timeout_s:g} s"
            self._request.refuse(ProxyError(408, message, "proxy", "client_stalled"))
