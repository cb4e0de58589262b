"""A client's connection: uvicorn's server calls it.

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
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

from uvicorn.config import Config
from uvicorn.server import ServerState

from disagg_prefill_lmcache_v1.proxy.client_parser import ClientLimits, RequestParser
from disagg_prefill_lmcache_v1.proxy.client_request import ClientRequest
from disagg_prefill_lmcache_v1.proxy.errors import ProxyError

_LINGER_S = 2.0  # how long the rest of a refused body is read, so that the client sees the answer and not a reset
_KEEP_ALIVE_S = 75.0  # how long a connection may wait for its next request
_BODY_BYTES_PER_S = 1024
_AHEAD_BYTES = 256 * 1024  # read ahead of its turn; more stays unread
_AHEAD_REQUESTS = 64
_TICKS = 4  # looks at the clock in each timeout
_FOREVER = float("inf")

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
        self._input = RequestParser(self, self._limits)
        self._request: ClientRequest | None = None  # being served
        self._queue: deque[ClientRequest] = deque()  # parsed, not served yet
        self._ahead = bytearray()  # not parsed yet
        self._reading = True
        self.write_paused = False
        self._timed_head = False
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
        self._input.ended = True
        self._queue.clear()
        if self._timer is not None:
            self._timer.cancel()
        request, self._request = self._request, None
        if request is not None:
            self._server.tasks.discard(request.task)
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
        if self._input.ended:
            return
        if self._request is not None and self._request is not self._input.receiving:
            self._ahead += data
            if len(self._ahead) > _AHEAD_BYTES:
                self._read(False)
            return
        if self._ahead:
            data, self._ahead = bytes(self._ahead + data), bytearray()
        self._input.feed(data)
        request = self._input.receiving
        if self._input.in_head:
            if not self._timed_head and self._request is None:
                self._timed_head = True
                self._set_deadline(self._limits.timeout_s)
        elif request is None:
            self._deadline = _FOREVER if self._request is not None else self._deadline
        elif request is self._request and not self._input.ended:
            if request.wants_body:
                self._time_body(request)
            else:
                self._deadline = _FOREVER
                self._read(False)

    # -- requests in their turn

    def take_request(self, request: ClientRequest) -> None:
        """Serve a request, now or in its turn."""
        if self._request is None:
            self._start(request)
            return
        self._queue.append(request)
        if len(self._queue) >= _AHEAD_REQUESTS:
            request.keep_alive = False  # the last one that is taken

    def _start(self, request: ClientRequest) -> None:
        self._request = request
        request.task = task = self._loop.create_task(self._handler(request))
        self._server.tasks.add(task)

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
        self._server.tasks.discard(request.task)
        self._timed_head = False
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
            self.data_received(b"")

    def _close(self, request: ClientRequest) -> None:
        """End the connection once the answer is out."""
        self._input.ended = True
        self._queue.clear()
        self._ahead = bytearray()
        self._input.receiving = None
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
        elif self._input.receiving is self._request:
            self._input.ended = True
            message = f"no more of the request body within {self._limits.timeout_s:g} s"
            self._request.refuse(ProxyError(408, message, "proxy", "client_stalled"))
