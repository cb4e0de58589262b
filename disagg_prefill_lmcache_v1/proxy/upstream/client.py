"""HTTP/1.1 client of the proxy for one server: a pool of connections that are kept alive.

Contract
- A request is finished bytes (head and body); the caller builds them. One request at a time per connection.
- Sizes are checked strictly. A body that ends early is an error, never a short answer.
- Small answers are handed over whole. Event streams, and answers longer than ``buffer_limit``, are handed over when
  their head is in; the body then goes to a relay, read by read, with back-pressure through pause() and resume().
- Bytes after the end of an answer, or on an idle connection, close the connection; they never reach a later request.
- Nothing is sent twice. An UpstreamError whose ``taken`` is False says that the server has seen nothing of a request.
- Cancelling the waiting coroutine closes the connection at once, so that the server sees the hang-up.
"""

from __future__ import annotations

import asyncio
import itertools
import ssl
from collections.abc import Sequence

from disagg_prefill_lmcache_v1.proxy.settings import Address
from disagg_prefill_lmcache_v1.proxy.upstream.connection import Connection, Limits
from disagg_prefill_lmcache_v1.proxy.upstream.errors import UpstreamError, connect_error
from disagg_prefill_lmcache_v1.proxy.upstream.resolver import Resolver
from disagg_prefill_lmcache_v1.proxy.upstream.response import Response

_CLOSED_AT_ONCE, _CLOSE_PAUSE_S = 16, 0.02
_NO_LIMITS = Limits()


def _give_up(attempt: asyncio.Task[tuple[asyncio.Transport, Connection]]) -> None:
    """End a connection attempt for which nobody waits any more, and close what it makes all the same."""

    def drop(task: asyncio.Task[tuple[asyncio.Transport, Connection]]) -> None:
        if not task.cancelled() and task.exception() is None:
            task.result()[1].abort()

    attempt.cancel()
    attempt.add_done_callback(drop)


class Client:
    """Connections to one server. Belongs to the event loop that runs when it is made."""

    def __init__(
        self, address: Address, *, connect_timeout_s: float, idle_connection_s: float, max_head_bytes: int
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.address = address
        self.connect_timeout_s = connect_timeout_s
        self.idle_connection_s = idle_connection_s
        self.active: set[Connection] = set()
        self.closed = False
        self._max_head_bytes = max_head_bytes
        self._idle: dict[Connection, None] = {}  # the longest idle first
        self._ssl = ssl.create_default_context() if address.tls else None
        self._resolver = Resolver(address.host, address.port)
        # Time as sweep() counts it: a stopped or starved proxy does not blame the server for its own pause.
        self._clock = 0.0
        self._swept = self.loop.time()

    async def request(
        self,
        request: bytes | Sequence[bytes],
        *,
        no_body: bool = False,
        buffer_limit: int = 8 * 1024 * 1024,
        limits: Limits = _NO_LIMITS,
        fresh: bool = False,
    ) -> Response:
        """Send a finished request and wait for its answer.

        ``no_body`` says that the answer has none (HEAD), ``fresh`` asks for a connection for this request alone.
        Raises UpstreamError.
        """
        now = self.loop.time()
        begun = self._clock + now - self._swept
        connection = None if fresh else self._take_idle(now)
        reused = connection is not None
        if connection is None:
            connection = await self._connect(min(filter(None, limits), default=0.0))
            if not connection.is_idle():
                raise UpstreamError("lost", "connection lost as soon as it was made", taken=False)
        connection.kept = not fresh
        answer = connection.exchange(request, no_body=no_body, buffer_limit=buffer_limit, limits=limits, begun=begun)
        response = connection.response
        try:
            return await answer
        except UpstreamError as error:
            if reused and error.kind == "lost" and connection.unacknowledged:
                # Its server had closed the idle connection before it could take any of the request.
                error.taken = connection.unacknowledged < _size(request)
            raise
        except asyncio.CancelledError:
            # With the answer complete, the connection may already serve somebody else.
            if not response.complete:
                connection.abort()
            raise

    def _take_idle(self, now: float) -> Connection | None:
        idle = self._idle
        while idle:
            connection, _ = idle.popitem()
            if connection.idle_since < now - self.idle_connection_s:
                # All others have waited even longer; _close_idle() deals with them.
                connection.abort()
                return None
            if connection.is_idle():
                return connection
            connection.abort()
        return None

    # -- new connections

    async def _connect(self, limit_s: float) -> Connection:
        """A new connection, within ``limit_s`` (0: none) if that is less than the usual time."""
        timeout = min(self.connect_timeout_s, limit_s or self.connect_timeout_s)
        deadline = self.loop.time() + timeout
        addresses = await self._resolver.addresses(timeout)
        error = UpstreamError("unreachable", f"no connection within {timeout:g} s", taken=False)
        for left in range(len(addresses), 0, -1):
            address = addresses[-left]
            # Not wait_for(): until Python 3.12 it forgets a cancellation that comes together with the connection.
            task = self.loop.create_task(self._open(address))
            try:
                await asyncio.wait((task,), timeout=(deadline - self.loop.time()) / left)
                if task.done():
                    return task.result()[1]
                _give_up(task)
            except OSError as failure:  # ssl.SSLError is one
                error = connect_error(failure)
            except asyncio.CancelledError:
                _give_up(task)
                raise
            if error.kind == "exhausted":
                break
            self._resolver.failed(address)
        raise error

    async def _open(self, address: str) -> tuple[asyncio.Transport, Connection]:
        return await self.loop.create_connection(
            lambda: Connection(self, self._max_head_bytes),
            address,
            self.address.port,
            ssl=self._ssl,
            server_hostname=self.address.host if self._ssl else None,
        )

    # -- for the connections

    def release(self, connection: Connection, keep_alive: bool) -> None:
        """Called by a connection whose answer is complete."""
        self.active.discard(connection)
        if keep_alive and connection.kept and not self.closed and not connection.transport.is_closing():
            connection.resume()
            connection.set_idle(self.loop.time())
            self._idle[connection] = None
        else:
            connection.close()

    def forget(self, connection: Connection) -> None:
        """Called by a connection that is closed."""
        self.active.discard(connection)
        self._idle.pop(connection, None)

    # -- upkeep

    def sweep(self, seconds: float) -> None:
        """Enforce the time limits; ``seconds`` passed since the last call. Closes what was idle for too long, too."""
        self._clock += seconds
        self._swept = self.loop.time()
        for connection in list(self.active):
            connection.check_time(self._clock, seconds)
        self._close_idle()

    def _close_idle(self) -> None:
        """Close connections that were idle for too long, a few at a time: after a burst there may be hundreds."""
        oldest = self.loop.time() - self.idle_connection_s
        first = itertools.islice(self._idle, _CLOSED_AT_ONCE)
        stale = [connection for connection in first if connection.idle_since < oldest]
        for connection in stale:
            connection.abort()
        if len(stale) == _CLOSED_AT_ONCE:
            self.loop.call_later(_CLOSE_PAUSE_S, self._close_idle)

    @property
    def idle_connections(self) -> int:
        """Connections kept for reuse."""
        return len(self._idle)

    def close(self) -> None:
        """Close idle connections now and running ones at their end."""
        self.closed = True
        for connection in list(self._idle):
            connection.abort()
        self._idle.clear()


def _size(request: bytes | Sequence[bytes]) -> int:
    return len(request) if isinstance(request, bytes) else sum(map(len, request))
