"""The client's side of a request, on uvicorn.

ClientProtocol is uvicorn's httptools protocol with two additions: the request in progress is told at once when the
client hangs up or stops reading, and its answer is written straight to the connection. The second is what makes the
proxy fast: one write per answer or per upstream read, instead of one ASGI message per header block and part.
"""

from __future__ import annotations

import asyncio
import http
from collections.abc import Callable
from typing import Any, ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

_LINGER_S = 2.0  # how long the rest of a refused body is read, so that the client sees the answer and not a reset

_STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in http.HTTPStatus}


class ClientProtocol(HttpToolsProtocol):
    """Connection of a client."""

    own_paths: ClassVar[frozenset[str]] = frozenset()
    """Paths whose requests are served by the framework, through ASGI messages only."""
    request: ClientRequest | None = None
    silence_s = 60.0
    """Longest time until the first request begins, seconds."""
    _silence: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]
        self._silence = self.loop.call_later(self.silence_s, transport.close)

    def on_headers_complete(self) -> None:
        if self._silence is not None:
            self._silence.cancel()
            self._silence = None
        super().on_headers_complete()
        cycle = self.cycle
        cycle.version = self.scope["http_version"]
        cycle.parts = None if self.scope["path"] in self.own_paths else []
        cycle.size = 0

    def on_body(self, body: bytes) -> None:
        cycle = self.cycle
        parts = cycle.parts
        if parts is None:
            super().on_body(body)
        elif not cycle.response_complete:
            parts.append(body)
            cycle.size += len(body)
            cycle.message_event.set()

    def connection_lost(self, exc: Exception | None) -> None:
        request, self.request = self.request, None
        if self._silence is not None:
            self._silence.cancel()
            self._silence = None
        super().connection_lost(exc)
        if request is not None:
            request.hung_up()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self.request is not None:
            self.request.set_paused(True)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.request is not None:
            self.request.set_paused(False)


class BodyTooLong(Exception):
    """The body of a request is longer than allowed."""


class BodyTooSlow(Exception):
    """A client stopped sending in the middle of a body."""


class ClientRequest:
    """One request of a client and the answer to it."""

    __slots__ = ("_chunked", "_cycle", "_head_only", "_on_pause", "_protocol", "gone", "started", "task", "transport")

    task: asyncio.Task[Any]
    """Serves the request; cancelled when the client hangs up. Set right after the request is made."""

    def __init__(self, protocol: ClientProtocol, cycle: RequestResponseCycle, head_only: bool) -> None:
        self._cycle = cycle
        self.transport = protocol.transport
        self._protocol = protocol
        protocol.request = self
        self._head_only = head_only
        self._chunked = False
        self._on_pause: Callable[[bool], None] | None = None
        self.started = False
        self.gone = cycle.disconnected

    @classmethod
    def of_asgi(cls, receive: Any, head_only: bool) -> ClientRequest:
        """The client side of the request that the running task serves as an ASGI application."""
        cycle = getattr(receive, "__self__", None)
        protocol = cycle.transport.get_protocol() if isinstance(cycle, RequestResponseCycle) else None
        if not isinstance(protocol, ClientProtocol):
            raise RuntimeError("the proxy must be served by uvicorn with http=ClientProtocol")
        request = cls(protocol, cycle, head_only)
        request.task = asyncio.current_task()
        return request

    async def body(self, limit: int, silence_s: float) -> bytes:
        """The whole body. Raises BodyTooLong above ``limit`` bytes, BodyTooSlow after ``silence_s`` without any."""
        cycle = self._cycle
        if cycle.more_body:
            if cycle.waiting_for_100_continue:
                self._write(b"HTTP/1.1 100 Continue\r\n\r\n")
                cycle.waiting_for_100_continue = False
            while cycle.more_body and cycle.size <= limit:
                cycle.message_event.clear()
                try:
                    await asyncio.wait_for(cycle.message_event.wait(), silence_s)
                except (TimeoutError, asyncio.TimeoutError):
                    raise BodyTooSlow from None
        if cycle.size > limit:
            if not self.transport.is_closing():
                self._protocol.flow.pause_reading()
            raise BodyTooLong
        parts, cycle.parts = cycle.parts, []
        return parts[0] if len(parts) == 1 else b"".join(parts)

    # -- events of the connection

    def hung_up(self) -> None:
        """The client is gone: cancel the task that serves it, which closes the connections to the servers."""
        if not self._cycle.response_complete:
            self.gone = True
            self.task.cancel()

    def set_paused(self, paused: bool) -> None:
        """The client stopped or began to read."""
        if self._on_pause is not None:
            self._on_pause(paused)

    def on_pause(self, callback: Callable[[bool], None] | None) -> None:
        """Have ``callback`` called with True when the client stops reading, False when it reads again."""
        self._on_pause = callback
        if callback is not None and self._protocol.flow.write_paused:
            callback(True)

    # -- the answer

    @property
    def can_chunk(self) -> bool:
        """Whether the client takes chunked answers."""
        return self._cycle.version == "1.1"

    def answer(self, status: int, lines: list[bytes], body: bytes, length: int | None = None) -> None:
        """Whole answer in one write. ``lines`` are header lines with their line ends."""
        if self.gone or self.transport.is_closing():
            return
        cycle = self._cycle
        cycle.response_started = self.started = True
        head = [_status_line(status), *lines]
        if status != 204 and ((status != 304 and not self._head_only) or length is not None):
            head.append(b"content-length: %d\r\n" % (len(body) if length is None else length))
        if not cycle.keep_alive:
            head.append(b"connection: close\r\n")
        head.append(b"\r\n")
        if body and not self._head_only and status not in (204, 304):
            if len(body) > 65536:
                self.transport.writelines([b"".join(head), body])
                self._complete()
                return
            head.append(body)
        self.transport.write(b"".join(head))
        self._complete()

    def close_if_unread(self) -> None:
        """Take no further request on this connection if the body of this one was not read."""
        if self._cycle.more_body:
            self._cycle.keep_alive = False

    def begin(self, status: int, lines: list[bytes], length: int | None = None) -> bool:
        """Head of a streamed answer. Returns whether the body is to be sent in chunks."""
        cycle = self._cycle
        cycle.response_started = self.started = True
        head = [_status_line(status), *lines]
        if length is not None:
            head.append(b"content-length: %d\r\n" % length)
        elif self.can_chunk:
            self._chunked = True
            head.append(b"transfer-encoding: chunked\r\n")
        else:
            cycle.keep_alive = False
        if not cycle.keep_alive:
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
        self._cycle.keep_alive = False
        self._cycle.response_complete = True
        self._detach()
        self.transport.close()

    def _complete(self) -> None:
        cycle = self._cycle
        cycle.response_complete = True
        self._detach()
        if not cycle.keep_alive:
            if cycle.more_body:
                if not self.transport.is_closing():
                    self._protocol.flow.resume_reading()
                self._protocol.loop.call_later(_LINGER_S, self.transport.close)
            else:
                self.transport.close()
        cycle.message_event.set()
        cycle.on_response()

    def _detach(self) -> None:
        self._on_pause = None
        if self._protocol.request is self:
            self._protocol.request = None


def _status_line(status: int) -> bytes:
    return _STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status
