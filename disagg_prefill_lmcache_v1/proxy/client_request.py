"""One request of a client and the answer to it, written straight to the connection.

One write for each answer, or for each read from a server: that is what makes the proxy fast.
"""

from __future__ import annotations

import asyncio
import http
from collections.abc import Callable
from typing import Any, Protocol

from disagg_prefill_lmcache_v1.proxy.errors import ProxyError
from disagg_prefill_lmcache_v1.proxy.headers import Header
from disagg_prefill_lmcache_v1.proxy.known_head import KnownHead

_STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in http.HTTPStatus}
_JOINED_BYTES = 65536  # a longer body is not copied to stand behind its head
_SMALL_PART, _SMALL_PARTS = 4096, 65536  # bytes; small parts of a body are put together, for each costs 50 bytes more


class Channel(Protocol):
    """What a request needs of its connection."""

    transport: asyncio.Transport
    write_paused: bool

    def want_body(self, request: ClientRequest) -> None:
        """Read the request's body from now on."""

    def answered(self, request: ClientRequest) -> None:
        """The answer is written; ``request.keep_alive`` tells whether the connection goes on."""


class ClientRequest:
    """A request whose head has come. ``path`` is decoded, ``target`` is path and query as they came."""

    __slots__ = (
        "_channel",
        "_chunked",
        "_error",
        "_on_pause",
        "_parts",
        "_small",
        "_waiter",
        "answer_complete",
        "body_begun",
        "body_complete",
        "body_size",
        "can_chunk",
        "expects_continue",
        "gone",
        "headers",
        "keep_alive",
        "known",
        "method",
        "path",
        "started",
        "target",
        "task",
        "transport",
        "version",
    )

    task: asyncio.Task[Any]
    """Serves the request; cancelled when the client hangs up. Set by the connection when it starts it."""

    def __init__(
        self, channel: Channel, method: str, path: str, target: bytes, headers: list[Header], version: str,
        keep_alive: bool, error: ProxyError | None = None,
    ) -> None:  # fmt: skip
        self._channel = channel
        self.transport = channel.transport
        self.known: KnownHead | None = None  # set where the head was parsed before
        self.method = method
        self.path = path
        self.target = target
        self.headers = headers
        self.version = version
        self.can_chunk = version == "1.1"
        self.keep_alive = keep_alive
        self.expects_continue = False
        self.body_complete = self.answer_complete = False
        self.body_size = 0
        self.body_begun = 0.0  # loop time when its reading began
        self.started = False  # whether the answer has begun
        self.gone = False  # whether the client has hung up
        self._parts: list[bytes] = []
        self._small = bytearray()  # the last small parts
        self._error = error
        self._waiter: asyncio.Future[None] | None = None
        self._on_pause: Callable[[bool], None] | None = None
        self._chunked = False

    # -- the body

    def check(self) -> None:
        """Raise the ProxyError of a request that cannot be taken."""
        if self._error is not None:
            raise self._error

    async def body(self) -> bytes:
        """The whole body; it is read only from now on. Raises ProxyError if it is too long or does not come."""
        if not self.body_complete and self._error is None:
            if self.expects_continue and self.can_chunk:
                self._write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self._waiter = asyncio.get_running_loop().create_future()
            self._channel.want_body(self)
            await self._waiter
        self.check()
        parts, self._parts = self._parts, []
        return parts[0] if len(parts) == 1 else b"".join(parts)

    @property
    def wants_body(self) -> bool:
        """Whether somebody waits for the body."""
        return self._waiter is not None

    def take_body(self, data: bytes) -> None:
        """A part of the body has come."""
        size = len(data)
        self.body_size += size
        if self._error is not None:
            return
        if self._parts and size < _SMALL_PART:
            self._small += data
            if len(self._small) >= _SMALL_PARTS:
                self._join_small()
        else:
            if self._small:
                self._join_small()
            self._parts.append(data)

    def _join_small(self) -> None:
        self._parts.append(bytes(self._small))
        self._small = bytearray()

    def end_body(self) -> None:
        """The body is complete."""
        self.body_complete = True
        if self._small:
            self._join_small()
        self._wake()

    def refuse(self, error: ProxyError) -> None:
        """No more of the body is taken; who waits for it gets this error."""
        self._error = error
        self._parts, self._small = [], bytearray()
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # -- events of the connection

    def hung_up(self) -> None:
        """The client is gone: cancel the task that serves it, which closes the connections to the servers."""
        if not self.answer_complete:
            self.gone = True
            self.task.cancel()

    def set_paused(self, paused: bool) -> None:
        """The client stopped or began to read."""
        if self._on_pause is not None:
            self._on_pause(paused)

    def on_pause(self, callback: Callable[[bool], None] | None) -> None:
        """Have ``callback`` called with True when the client stops reading, False when it reads again."""
        self._on_pause = callback
        if callback is not None and self._channel.write_paused:
            callback(True)

    # -- the answer

    def answer(self, status: int, lines: list[bytes], body: bytes, length: int | None = None) -> None:
        """Whole answer in one write. ``lines`` are header lines with their line ends."""
        if self.gone or self.transport.is_closing():
            return
        self.started = True
        head = [_status_line(status), *lines]
        head_only = self.method == "HEAD"
        if status != 204 and ((status != 304 and not head_only) or length is not None):
            head.append(b"content-length: %d\r\n" % (len(body) if length is None else length))
        if not self.body_complete:
            self.keep_alive = False  # what follows on the connection is body, and never a request
        if not self.keep_alive:
            head.append(b"connection: close\r\n")
        head.append(b"\r\n")
        if body and not head_only and status not in (204, 304):
            if len(body) > _JOINED_BYTES:
                self.transport.writelines([b"".join(head), body])
                self._complete()
                return
            head.append(body)
        self.transport.write(b"".join(head))
        self._complete()

    def begin(self, status: int, lines: list[bytes], length: int | None = None) -> bool:
        """Head of a streamed answer. Returns whether the body is to be sent in chunks."""
        self.started = True
        head = [_status_line(status), *lines]
        if length is not None:
            head.append(b"content-length: %d\r\n" % length)
        elif self.can_chunk:
            self._chunked = True
            head.append(b"transfer-encoding: chunked\r\n")
        else:
            self.keep_alive = False
        if not self.keep_alive:
            head.append(b"connection: close\r\n")
        head.append(b"\r\n")
        self._write(b"".join(head))
        return self._chunked

    def _write(self, data: bytes) -> None:
        # Between its end and connection_lost() a connection takes no more bytes: uvloop raises then.
        if not self.transport.is_closing():
            self.transport.write(data)

    def send(self, data: bytes) -> None:
        """Part of the body of a streamed answer."""
        self._write(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)

    def end(self) -> None:
        """The streamed answer is complete."""
        if self.gone:
            return
        if self._chunked:
            self._write(b"0\r\n\r\n")
        self._complete()

    def cut(self, last_words: bytes = b"", at_once: bool = False) -> None:
        """End a streamed answer that is not complete: what is written goes out, then the connection closes.

        The last chunk is left out on purpose, so that no client takes the answer for complete. ``at_once`` drops what
        the client has not read.
        """
        if self.gone:
            return
        if at_once:
            self.transport.abort()
        elif last_words:
            self.send(last_words)
        self.keep_alive = False
        self._complete()

    def _complete(self) -> None:
        self.answer_complete = True
        self._on_pause = None
        self._channel.answered(self)


def _status_line(status: int) -> bytes:
    return _STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status
