"""HTTP/1.1 client of the proxy: one keep-alive pool per server, one asyncio.Protocol per connection.

Contract
- A request is finished bytes (head and body); the caller builds them. One request at a time per connection.
- Response heads are parsed strictly and limited in size; 1xx answers are skipped, 101 is refused.
- Bodies framed by Content-Length, by chunks or by the end of the connection. Sizes are checked strictly; chunk
  extensions and trailers are taken and dropped. A body that ends early is an error, never a short answer.
- Small answers are handed over whole. Event streams, and answers longer than ``buffer_limit``, are handed over when
  their head is in; the body then goes to a relay, read by read, with back-pressure through pause() and resume().
- Bytes after the end of an answer, or on an idle connection, close the connection; they never reach a later request.
- A reused connection that ends before the first byte of an answer is tried once more on a new connection.
- Cancelling the waiting coroutine closes the connection at once, so that the server sees the hang-up.
- Every failure is an UpstreamError whose ``kind`` says what happened: refused, timeout, lost, protocol, or
  client_stalled when it was pause() that lasted too long.
"""

from __future__ import annotations

import asyncio
import itertools
import re
import ssl
from collections.abc import Sequence
from typing import Protocol

from disagg_prefill_lmcache_v1.proxy.settings import Address

_HEAD, _FIXED, _CHUNKED, _UNTIL_CLOSE, _IDLE, _CLOSED = range(6)
_SIZE, _DATA, _DATA_END, _TRAILER = range(4)

_CLOSED_AT_ONCE, _CLOSE_PAUSE_S = 16, 0.02
_MAX_LINE = 4096  # longest chunk-size or trailer line
_MAX_TRAILER = 16384
_plain_size = re.compile(rb"([0-9a-fA-F]{1,8})\r\n").match
_any_size = re.compile(rb"([0-9a-fA-F]{1,15})[ \t]*(?:;[^\r\n]*)?").fullmatch
_digits = re.compile(rb"[0-9]{1,18}").fullmatch
_status_line = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9]{2})(?: [^\x00-\x08\x0a-\x1f\x7f]*)?").fullmatch
_header_line = re.compile(
    rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*((?:[^\x00-\x08\x0a-\x1f\x7f]*[^\x00-\x20\x7f])?)[ \t]*"
).fullmatch
_FRAMING = frozenset((b"content-length", b"transfer-encoding", b"connection", b"content-type"))

Header = tuple[bytes, bytes, bytes]
"""Name in lower case, value, and the whole line with its end."""

# Most header lines are the same in many messages: each is parsed once. Those with an id are not worth keeping.
known_lines: dict[bytes, Header] = {}
_KNOWN_LINES = 512
_UNIQUE = frozenset((b"x-request-id", b"x-kv-wait-ms", b"traceparent"))


def parse_header(line: bytes) -> Header | None:
    """Parts of a header line without its end; None if it is malformed."""
    match = _header_line(line)
    if match is None:
        return None
    name, value = match[1].lower(), match[2]
    header = (name, value, b"%b: %b\r\n" % (match[1], value))
    if name not in _UNIQUE and len(line) < 256:
        if len(known_lines) >= _KNOWN_LINES:
            known_lines.clear()
        known_lines[line] = header
    return header


class UpstreamError(Exception):
    """An exchange with a server failed; ``kind`` is refused, timeout, lost, protocol or client_stalled."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Relay(Protocol):
    """Receiver of a streamed body."""

    def raw(self, data: bytes) -> bool:
        """Whole chunks with their framing; False asks for the same bytes again through payload()."""

    def payload(self, data: bytes) -> None:
        """Body bytes without framing."""

    def end(self) -> None:
        """The body is complete."""

    def lost(self, error: UpstreamError) -> None:
        """The body was cut."""


class Response:
    """Answer of a server. ``body`` is whole when ``complete``, else what had come with the head."""

    __slots__ = ("body", "chunked", "complete", "connection", "event_stream", "headers", "length", "status")

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.status = 0
        self.headers: list[Header] = []
        self.body = b""
        self.complete = False
        self.chunked = False
        self.event_stream = False
        self.length: int | None = None

    def header(self, name: bytes) -> bytes | None:
        """Value of the first header of that (lower-case) name."""
        for key, value, _ in self.headers:
            if key == name:
                return value
        return None


class Connection(asyncio.Protocol):
    """One connection to a server."""

    __slots__ = (
        "_keep_alive",
        "_left",
        "_limit",
        "_no_body",
        "_parts",
        "_phase",
        "_raw",
        "_relay",
        "_rest",
        "_size",
        "_state",
        "_trailer",
        "_waiter",
        "client",
        "got_bytes",
        "head_timeout",
        "idle_since",
        "idle_timeout",
        "paused",
        "quiet",
        "response",
        "transport",
    )

    def __init__(self, client: Client) -> None:
        self.client = client
        self._state = _IDLE
        self.transport: asyncio.Transport | None = None
        self.response: Response | None = None
        self._waiter: asyncio.Future[Response] | None = None
        self._relay: Relay | None = None
        self._raw = None
        self._rest = b""
        self.idle_since = 0.0
        self.got_bytes = False
        self.paused = False

    # -- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def connection_lost(self, exc: Exception | None) -> None:
        state, self._state = self._state, _CLOSED
        self.client.forget(self)
        if state in (_IDLE, _CLOSED):
            return
        if state == _UNTIL_CLOSE and exc is None:
            self._finish()
            return
        self._fail(UpstreamError("lost", f"connection lost{': ' + str(exc) if exc else ''}"))

    def data_received(self, data: bytes) -> None:
        self.quiet = 0.0
        raw = self._raw
        if raw is not None and self._phase == _SIZE and not self._rest:
            # The path of every token: a read that is nothing but whole chunks goes on as it is.
            position, end = 0, len(data)
            while position < end:
                match = _plain_size(data, position)
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
        self._take(data)

    def _take(self, data: bytes) -> None:
        state = self._state
        try:
            if state == _HEAD:
                self._take_head(data)
            elif state == _FIXED:
                self._take_fixed(data)
            elif state == _CHUNKED:
                self._take_chunked(data)
            elif state == _UNTIL_CLOSE:
                self._deliver(data)
            else:
                self.abort()  # bytes that nobody asked for
        except UpstreamError as error:
            self._fail(error)
            self.abort()

    # -- one exchange

    def exchange(
        self,
        request: bytes | Sequence[bytes],
        *,
        no_body: bool,
        buffer_limit: int,
        head_timeout: float,
        idle_timeout: float,
    ) -> asyncio.Future[Response]:
        """Send a request; the result is its answer (see the contract above)."""
        self._state = _HEAD
        self._rest = b""
        self._parts: list[bytes] = []
        self._size = 0
        self._limit = buffer_limit
        self._no_body = no_body
        self._phase = _SIZE
        self._trailer = 0
        self.got_bytes = False
        self.quiet = 0.0
        self.head_timeout = head_timeout
        self.idle_timeout = idle_timeout
        self.response = Response(self)
        self._waiter = waiter = self.client.loop.create_future()
        self.client.active.add(self)
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
        if self._state in (_CLOSED, _IDLE):
            relay.lost(UpstreamError("lost", "connection lost"))
            return
        self._relay = relay
        if raw and self.response.chunked:
            self._raw = relay.raw

    def pause(self) -> None:
        """Stop reading until resume()."""
        if not self.paused and self._state not in (_CLOSED, _IDLE) and not self.transport.is_closing():
            self.paused = True
            self.transport.pause_reading()

    def resume(self) -> None:
        """Read again."""
        if self.paused:
            self.paused = False
            self.quiet = 0.0
            if self._state != _CLOSED and not self.transport.is_closing():
                self.transport.resume_reading()

    def abort(self) -> None:
        """Close at once; no callback follows."""
        self._relay = self._raw = None
        if self._state != _CLOSED:
            self._state = _CLOSED
            self.client.forget(self)
            self.transport.abort()

    def time_out(self) -> None:
        """End the exchange because the server was silent for too long."""
        if self.paused:
            error = UpstreamError("client_stalled", f"the client did not read for {self.idle_timeout:g} s")
        elif self.response.status:
            error = UpstreamError("timeout", f"no data for {self.idle_timeout:g} s")
        else:
            error = UpstreamError("timeout", f"no answer within {self.head_timeout:g} s")
        self._fail(error)
        self.abort()

    # -- response head

    def _take_head(self, data: bytes) -> None:
        self.got_bytes = True
        if self._rest:
            data = self._rest + data
        while True:
            if not data.startswith(b"HTTP/1.") and not b"HTTP/1.".startswith(data):
                raise UpstreamError("protocol", "the answer is not HTTP/1")
            end = data.find(b"\r\n\r\n")
            if (end if end >= 0 else len(data)) > self.client.max_head_bytes:
                raise UpstreamError("protocol", f"response head longer than {self.client.max_head_bytes} bytes")
            if end < 0:
                self._rest = data
                return
            status = self._parse_head(data[:end].split(b"\r\n"))
            data = data[end + 4 :]
            if status >= 200:
                break
            if status == 101:
                raise UpstreamError("protocol", "unexpected protocol switch")
            if not data:
                self._rest = b""
                return
        self._rest = b""
        response = self.response
        response.status = status
        if self._state == _FIXED and self._left == 0:
            self._end(data)
        elif data:
            self._take(data)
        elif response.event_stream:
            self._hand_over()

    def _parse_head(self, lines: list[bytes]) -> int:
        """Status of a head; sets the headers and how the body is framed."""
        match = _status_line(lines[0])
        if match is None:
            raise UpstreamError("protocol", "bad status line")
        status = int(match[2])
        self._keep_alive = match[1] == b"1"
        response = self.response
        response.headers = headers = []
        length: int | None = None
        chunked = False
        for line in lines[1:]:
            header = known_lines.get(line) or parse_header(line)
            if header is None:
                raise UpstreamError("protocol", "bad header")
            headers.append(header)
            name = header[0]
            if name not in _FRAMING:
                continue
            value = header[1]
            if name == b"content-length":
                if not _digits(value) or (length is not None and length != int(value)):
                    raise UpstreamError("protocol", "bad Content-Length")
                length = int(value)
            elif name == b"content-type":
                response.event_stream = value.lower().startswith(b"text/event-stream")
            elif name == b"transfer-encoding":
                if value.lower() != b"chunked" or chunked:
                    raise UpstreamError("protocol", "unknown Transfer-Encoding")
                chunked = True
            else:
                tokens = value.lower()
                if b"close" in tokens:
                    self._keep_alive = False
                elif b"keep-alive" in tokens:
                    self._keep_alive = True
        if self._no_body or status in (204, 304):
            response.length = length
            self._state, self._left = _FIXED, 0
        elif chunked:
            if length is not None:
                raise UpstreamError("protocol", "both Content-Length and Transfer-Encoding")
            response.chunked = True
            self._state = _CHUNKED
        elif length is not None:
            response.length = length
            self._state, self._left = _FIXED, length
        elif status >= 200:
            self._keep_alive = False
            self._state = _UNTIL_CLOSE
        if status < 200:
            self._state = _HEAD
        return status

    # -- response body

    def _take_fixed(self, data: bytes) -> None:
        left = self._left
        if len(data) < left:
            self._left = left - len(data)
            self._deliver(data)
            return
        self._left = 0
        self._deliver(data[:left] if len(data) > left else data, last=True)
        self._end(data[left:])

    def _take_chunked(self, data: bytes) -> None:
        if self._rest:
            data, self._rest = self._rest + data, b""
        position, end = 0, len(data)
        phase, left = self._phase, self._left if self._phase == _DATA else 0
        pieces: list[bytes] = []
        done = False
        while not done:
            if phase == _DATA:
                piece = data[position : position + left]
                if piece:
                    pieces.append(piece)
                    position += len(piece)
                    left -= len(piece)
                if left:
                    break
                phase = _DATA_END
            elif phase == _DATA_END:
                mark = data[position : position + 2]
                if mark != b"\r\n":
                    if not b"\r\n".startswith(mark):
                        raise UpstreamError("protocol", "bad chunk end")
                    self._rest = mark
                    break
                position += 2
                phase = _SIZE
            else:
                line_end = data.find(b"\r\n", position)
                if (line_end if line_end >= 0 else end) - position > _MAX_LINE:
                    raise UpstreamError("protocol", "chunk or trailer line too long")
                if line_end < 0:
                    self._rest = data[position:]
                    break
                if phase == _SIZE:
                    match = _any_size(data, position, line_end)
                    if match is None:
                        raise UpstreamError("protocol", "bad chunk size")
                    left = int(match[1], 16)
                    phase = _DATA if left else _TRAILER
                else:
                    self._trailer += line_end - position + 2
                    if self._trailer > _MAX_TRAILER:
                        raise UpstreamError("protocol", "trailers too long")
                    done = line_end == position
                position = line_end + 2
        self._phase, self._left = phase, left
        if pieces:
            self._deliver(pieces[0] if len(pieces) == 1 else b"".join(pieces), last=done)
        if done:
            self._end(data[position:])

    def _deliver(self, data: bytes, last: bool = False) -> None:
        if self._relay is not None:
            self._relay.payload(data)
            return
        self._parts.append(data)
        self._size += len(data)
        if not last and self._waiter is not None and (self.response.event_stream or self._size > self._limit):
            self._hand_over()

    def _hand_over(self) -> None:
        """Give the answer to the waiting coroutine while its body is still coming."""
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(self.response)

    def _end(self, surplus: bytes) -> None:
        if self._state == _CLOSED:
            return
        if surplus:
            self._keep_alive = False
        self._finish()

    def _finish(self) -> None:
        """The answer is complete: free the connection first, then wake who waits."""
        response, relay, waiter = self.response, self._relay, self._waiter
        parts, self._parts = self._parts, []
        response.complete = True
        self._relay = self._raw = self._waiter = self.response = None  # an idle connection keeps no answer alive
        self.client.release(self, self._keep_alive)
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

    def is_idle(self) -> bool:
        """Whether the connection can take a request."""
        return self._state == _IDLE and not self.transport.is_closing()

    def set_idle(self, now: float) -> None:
        """Mark as free at loop time ``now``."""
        self._state = _IDLE
        self.idle_since = now


def _drop_connection(task: asyncio.Task[tuple[asyncio.Transport, Connection]]) -> None:
    """Close what a connection attempt made although nobody waits for it any more."""
    if not task.cancelled() and task.exception() is None:
        task.result()[1].abort()


class Client:
    """Keep-alive pool to one server. Belongs to the event loop that runs when it is made."""

    def __init__(
        self, address: Address, *, connect_timeout_s: float, idle_connection_s: float, max_head_bytes: int
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.address = address
        self.connect_timeout_s = connect_timeout_s
        self.idle_connection_s = idle_connection_s
        self.max_head_bytes = max_head_bytes
        self.active: set[Connection] = set()
        self.closed = False
        self._idle: dict[Connection, None] = {}  # the longest idle first
        self._ssl = ssl.create_default_context() if address.tls else None

    async def request(
        self,
        request: bytes | Sequence[bytes],
        *,
        no_body: bool = False,
        buffer_limit: int = 8 * 1024 * 1024,
        head_timeout: float = 0.0,
        idle_timeout: float = 0.0,
    ) -> Response:
        """Send a finished request and wait for its answer.

        ``no_body`` says that the answer has none (HEAD). ``head_timeout`` is the longest silence before the answer,
        ``idle_timeout`` the longest one inside it, in seconds, 0 for no limit. Raises UpstreamError.
        """
        connection = self._take_idle()
        reused = connection is not None
        while True:
            if connection is None:
                connection = await self._connect()
                if not connection.is_idle():
                    raise UpstreamError("lost", "connection lost as soon as it was made")
            answer = connection.exchange(
                request,
                no_body=no_body,
                buffer_limit=buffer_limit,
                head_timeout=head_timeout,
                idle_timeout=idle_timeout,
            )
            response = connection.response
            try:
                return await answer
            except UpstreamError as error:
                if not reused or error.kind != "lost" or connection.got_bytes:
                    raise
                connection, reused = None, False
            except asyncio.CancelledError:
                # With the answer complete, the connection may already serve somebody else.
                if not response.complete:
                    connection.abort()
                raise

    def _take_idle(self) -> Connection | None:
        idle = self._idle
        while idle:
            connection, _ = idle.popitem()
            if connection.idle_since < self.loop.time() - self.idle_connection_s:
                # All others have waited even longer; _close_idle() deals with them.
                connection.abort()
                return None
            if connection.is_idle():
                return connection
            connection.abort()
        return None

    async def _connect(self) -> Connection:
        address = self.address
        # Not wait_for(): until Python 3.12 it forgets a cancellation that comes together with the connection.
        task = self.loop.create_task(
            self.loop.create_connection(
                lambda: Connection(self),
                address.host,
                address.port,
                ssl=self._ssl,
                server_hostname=address.host if self._ssl else None,
            )
        )
        try:
            await asyncio.wait((task,), timeout=self.connect_timeout_s)
            if not task.done():
                raise UpstreamError("refused", f"no connection within {self.connect_timeout_s:g} s")
            return task.result()[1]
        except (OSError, ssl.SSLError) as error:
            raise UpstreamError("refused", f"connection refused: {error}") from None
        except (UpstreamError, asyncio.CancelledError):
            task.cancel()
            task.add_done_callback(_drop_connection)
            raise

    def release(self, connection: Connection, keep_alive: bool) -> None:
        """Called by a connection whose answer is complete."""
        self.active.discard(connection)
        transport = connection.transport
        if keep_alive and not self.closed and not transport.is_closing():
            connection.resume()
            connection.set_idle(self.loop.time())
            self._idle[connection] = None
        else:
            connection._state = _CLOSED
            transport.close()

    def forget(self, connection: Connection) -> None:
        """Called by a connection that is closed."""
        self.active.discard(connection)
        self._idle.pop(connection, None)

    def sweep(self, seconds: float) -> None:
        """Enforce the timeouts; called every ``seconds``. Also closes connections that were idle for too long."""
        for connection in list(self.active):
            response = connection.response
            limit = connection.idle_timeout if response.status else connection.head_timeout
            connection.quiet += seconds
            if limit and connection.quiet >= limit:
                connection.time_out()
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
