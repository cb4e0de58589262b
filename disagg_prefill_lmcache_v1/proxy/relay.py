"""Passes a streamed answer on to the client while it comes."""

from __future__ import annotations

import asyncio
import time
from typing import Protocol

from disagg_prefill_lmcache_v1.proxy.metrics import Metrics
from disagg_prefill_lmcache_v1.proxy.request import RequestContext
from disagg_prefill_lmcache_v1.proxy.upstream import Response, UpstreamError

_HELD_EVENT = 1 << 20  # longest part of an unfinished event that waits for its end


class StreamClient(Protocol):
    """What the relay needs of the client's side."""

    transport: asyncio.Transport

    def send(self, data: bytes) -> None:
        """Part of the body."""

    def end(self) -> None:
        """The answer is complete."""


class StreamRelay:
    """Receiver of one streamed body (see upstream's Relay)."""

    __slots__ = (
        "_client",
        "_connection",
        "_event_stream",
        "_held",
        "_itl",
        "_last",
        "_metrics",
        "_request",
        "_tail",
        "_write",
        "done",
        "usage",
    )

    def __init__(
        self, metrics: Metrics, itl_index: int, request: RequestContext, client: StreamClient, response: Response
    ) -> None:
        self._metrics = metrics
        self._itl = itl_index
        self._request = request
        self._client = client
        self._connection = response.connection
        self._event_stream = response.event_stream
        self._write = client.transport.write
        self._held = b""
        self._last = 0.0
        self._tail = b""
        self.usage = b""
        self.done: asyncio.Future[UpstreamError | None] = asyncio.get_running_loop().create_future()

    def pause(self, paused: bool) -> None:
        """The client stopped (True) or began (False) to read."""
        if paused:
            self._connection.pause()
        else:
            self._connection.resume()

    def raw(self, data: bytes) -> bool:
        """Whole chunks, framing included."""
        if self._event_stream:
            if self._held or data[-4:] != b"\n\n\r\n":
                return False
            self._count(data)
        try:  # noqa: SIM105 (this is the path of every token)
            self._write(data)
        except RuntimeError:
            pass  # the connection has ended, which it will tell next
        self._request.sent += len(data)
        return True

    def payload(self, data: bytes) -> None:
        """Body bytes. An unfinished event is held until its end has come, so that none is ever cut."""
        if self._event_stream:
            self._count(data)
            if self._held:
                data = self._held + data
                self._held = b""
            if data[-2:] != b"\n\n" and data[-4:] != b"\r\n\r\n":
                cut = max(data.rfind(b"\n\n") + 2, data.rfind(b"\r\n\r\n") + 4)
                if cut < 4:
                    cut = 0
                if len(data) - cut <= _HELD_EVENT:
                    data, self._held = data[:cut], data[cut:]
        if data:
            self._client.send(data)
            self._request.sent += len(data)

    def _count(self, data: bytes) -> None:
        self._tail = data
        now = time.perf_counter()
        if self._last:
            self._metrics.observe(self._itl, now - self._last)
        else:
            self._request.ttft_s = now - self._request.start
            if self._request.on_first_token is not None:
                self._request.on_first_token()
        self._last = now
        if self._request.want_usage and b'"usage"' in data:
            self.usage = data

    def end(self) -> None:
        """The answer is complete."""
        if self._held:
            self._client.send(self._held)
        self._client.end()
        if not self.done.done():
            self.done.set_result(None)

    def lost(self, error: UpstreamError) -> None:
        """The answer was cut."""
        if self._event_stream and not self._held and self._tail.rstrip(b"\r\n").endswith(b"data: [DONE]"):
            self.end()  # only the end of the body's framing is missing
        elif not self.done.done():
            self.done.set_result(error)
