"""One connection to a server: an asyncio.Protocol that carries one request at a time."""

from __future__ import annotations

import array
import asyncio
import fcntl
import termios
from collections.abc import Sequence
from typing import NamedTuple
from typing import Protocol as Interface

from disagg_prefill_lmcache_v1.proxy.upstream.errors import UpstreamError
from disagg_prefill_lmcache_v1.proxy.upstream.parser import (
    CHUNKED,
    CLOSED,
    HEAD,
    IDLE,
    SIZE,
    UNTIL_CLOSE,
    AnswerParser,
    plain_size,
)
from disagg_prefill_lmcache_v1.proxy.upstream.response import Relay, Response


class Limits(NamedTuple):
    """Time limits of one exchange in seconds, 0 for none."""

    begin_s: float = 0.0
    """Until the head of the answer is in, however slowly it comes."""
    whole_s: float = 0.0
    """Until the whole answer is in, however slowly it comes."""
    silence_s: float = 0.0
    """Longest silence inside the answer."""


class Owner(Interface):
    """What a connection needs of the client that holds it."""

    loop: asyncio.AbstractEventLoop
    active: set[Connection]

    def release(self, connection: Connection, keep_alive: bool) -> None:
        """The answer is complete."""

    def forget(self, connection: Connection) -> None:
        """The connection is closed."""


class Connection(AnswerParser, asyncio.Protocol):
    """One connection to a server."""

    __slots__ = (
        "_begun", "_buffer_limit", "_limits", "_owner", "_parts", "_quiet", "_raw", "_relay", "_size", "_waiter",
        "idle_since", "kept", "paused", "transport", "unacknowledged",
    )  # fmt: skip

    def __init__(self, owner: Owner, max_head_bytes: int) -> None:
        super().__init__(max_head_bytes)
        self._owner = owner
        self.transport: asyncio.Transport | None = None
        self._waiter: asyncio.Future[Response] | None = None
        self._relay: Relay | None = None
        self._raw = None
        self.idle_since = 0.0
        self.kept = True  # for further requests
        self.paused = False
        self.unacknowledged = 0

    # -- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def eof_received(self) -> None:
        if self._state == HEAD:
            self.unacknowledged = _unacknowledged(self.transport)

    def connection_lost(self, exc: Exception | None) -> None:
        state, self._state = self._state, CLOSED
        self._owner.forget(self)
        if state in (IDLE, CLOSED):
            return
        if state == UNTIL_CLOSE and exc is None:
            self._finish()
            return
        self._fail(UpstreamError("lost", f"connection lost{': ' + str(exc) if exc else ''}"))

    def data_received(self, data: bytes) -> None:
        self._quiet = 0.0
        raw = self._raw
        if raw is not None and self._phase == SIZE and not self._rest:
            # The path of every token: a read that is nothing but whole chunks goes on as it is.
            position, end = 0, len(data)
            while position < end:
                match = plain_size(data, position)
                if match is None:
                    break
                size = int(match[1], 16)
                following = match.end() + size + 2
                if not size or following > end or data[following - 2 : following] != b"\r\n":
                    break
                position = following
            else:
                if raw(data):
                    return
        try:
            self.feed(data)
        except UpstreamError as error:
            self._fail(error)
            self.abort()

    # -- one exchange

    def exchange(
        self, request: bytes | Sequence[bytes], *, no_body: bool, buffer_limit: int, limits: Limits, begun: float
    ) -> asyncio.Future[Response]:
        """Send a request; the result is its answer (see Client.request). ``limits`` count from ``begun``."""
        response = Response(self)
        self.expect(response, no_body)
        self._parts: list[bytes] = []
        self._size = 0
        self._buffer_limit = buffer_limit
        self._limits = limits
        self._begun = begun
        self._quiet = 0.0
        self._waiter = waiter = self._owner.loop.create_future()
        self._owner.active.add(self)
        if isinstance(request, bytes):
            self.transport.write(request)
        else:
            self.transport.writelines(request)
        return waiter

    def stream_to(self, relay: Relay, raw: bool) -> None:
        """Send the body of an answer that is not complete to ``relay``.

        ``raw`` allows whole chunks to be passed on with their framing.
        """
        parts, self._parts = self._parts, []
        if parts:
            relay.payload(b"".join(parts))
        if self._state in (CLOSED, IDLE):
            relay.lost(UpstreamError("lost", "connection lost"))
            return
        self._relay = relay
        if raw and self._state == CHUNKED:
            self._raw = relay.raw

    def pause(self) -> None:
        """Stop reading until resume()."""
        if not self.paused and self._state not in (CLOSED, IDLE) and not self.transport.is_closing():
            self.paused = True
            self.transport.pause_reading()

    def resume(self) -> None:
        """Read again."""
        if self.paused:
            self.paused = False
            self._quiet = 0.0
            if self._state != CLOSED and not self.transport.is_closing():
                self.transport.resume_reading()

    def abort(self) -> None:
        """Close at once; no callback follows."""
        self._relay = self._raw = None
        if self._state != CLOSED:
            self._state = CLOSED
            self._owner.forget(self)
            self.transport.abort()

    def check_time(self, now: float, passed: float) -> None:
        """End the exchange if one of its limits is over; ``passed`` seconds went by since the last check."""
        self._quiet += passed
        begin_s, whole_s, silence_s = self._limits
        age, begins = now - self._begun, self._state == HEAD
        if whole_s and age >= whole_s:
            error = UpstreamError("timeout", f"no whole answer within {whole_s:g} s")
        elif begin_s and begins and age >= begin_s:
            error = UpstreamError("timeout", f"no answer within {begin_s:g} s")
        elif begins or not silence_s or self._quiet < silence_s:
            return
        elif self.paused:
            error = UpstreamError("client_stalled", f"the client did not read for {silence_s:g} s")
        else:
            error = UpstreamError("timeout", f"no data for {silence_s:g} s")
        self._fail(error)
        self.abort()

    # -- parts of the answer

    def deliver(self, data: bytes, last: bool = False) -> None:
        """Bytes of the body."""
        if self._relay is not None:
            self._relay.payload(data)
            return
        self._parts.append(data)
        self._size += len(data)
        if not last and self._waiter is not None and (self.response.event_stream or self._size > self._buffer_limit):
            self.head_alone()

    def head_alone(self) -> None:
        """Give the answer to the waiting coroutine while its body is still coming."""
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(self.response)

    def end(self, surplus: bytes) -> None:
        """The answer is complete."""
        if self._state == CLOSED:
            return
        if surplus:
            self._keep_alive = False
        self._finish()

    def _finish(self) -> None:
        """Free the connection first, then wake who waits."""
        response, relay, waiter = self.response, self._relay, self._waiter
        parts, self._parts = self._parts, []
        response.complete = True
        self._relay = self._raw = self._waiter = self.response = None  # an idle connection keeps no answer alive
        self._owner.release(self, self._keep_alive)
        if relay is not None:
            relay.end()
            return
        response.body = parts[0] if len(parts) == 1 else b"".join(parts)
        if waiter is not None and not waiter.done():
            waiter.set_result(response)

    def _fail(self, error: UpstreamError) -> None:
        relay, waiter = self._relay, self._waiter
        self._relay = self._raw = self._waiter = None
        if relay is not None:
            relay.lost(error)
        elif waiter is not None and not waiter.done():
            waiter.set_exception(error)

    # -- between two exchanges

    def is_idle(self) -> bool:
        """Whether the connection can take a request."""
        return self._state == IDLE and not self.transport.is_closing()

    def set_idle(self, now: float) -> None:
        """Mark as free at loop time ``now``."""
        self._state = IDLE
        self.idle_since = now

    def close(self) -> None:
        """Close after what is written has gone out; no callback follows."""
        self._state = CLOSED
        self.transport.close()


def _unacknowledged(transport: asyncio.Transport) -> int:
    """Bytes written to a connection that the other side's system has not taken; 0 if that cannot be told."""
    sock = transport.get_extra_info("socket")
    if sock is None or transport.get_extra_info("ssl_object") is not None:
        return 0
    waiting = array.array("i", [0])
    try:
        fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, waiting)
    except (OSError, ValueError):
        return 0
    return waiting[0] + transport.get_write_buffer_size()
