"""An answer of a server, and who takes its body while it comes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from disagg_prefill_lmcache_v1.proxy.headers import Header
from disagg_prefill_lmcache_v1.proxy.upstream.errors import UpstreamError


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


class Source(Protocol):
    """Where the rest of an answer comes from."""

    def stream_to(self, relay: Relay, raw: bool) -> None:
        """Send the body to ``relay``; ``raw`` allows whole chunks to be passed on with their framing."""

    def pause(self) -> None:
        """Stop reading until resume()."""

    def resume(self) -> None:
        """Read again."""

    def abort(self) -> None:
        """Close at once; no callback follows."""


class Response:
    """Answer of a server. ``body`` is whole when ``complete``, else the rest comes from ``connection``."""

    __slots__ = ("body", "chunked", "complete", "connection", "event_stream", "headers", "internal", "length", "status")

    def __init__(self, connection: Source) -> None:
        self.connection = connection
        self.status = 0
        self.headers: Sequence[Header] = ()
        self.internal: Sequence[Header] = ()  # those of them that the server tells the proxy alone
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
