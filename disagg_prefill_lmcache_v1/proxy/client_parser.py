"""Parses what a client sends into requests: httptools, and what it does not check or has no limit for."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import unquote

import httptools

from disagg_prefill_lmcache_v1.proxy.client_request import Channel, ClientRequest
from disagg_prefill_lmcache_v1.proxy.errors import ProxyError, too_long
from disagg_prefill_lmcache_v1.proxy.headers import Header
from disagg_prefill_lmcache_v1.proxy.known_head import KnownHead

_FIELD_COST = 32  # what a header field counts beside its text
_REMEMBERED = range(2, 6)  # which requests of a connection may leave their head: some clients have a new one each time
_FRAMING_PART = 16  # most bytes of framing (chunk sizes, extensions, trailers) for each byte of body

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


@functools.lru_cache(maxsize=64)
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


class RequestSink(Channel, Protocol):
    """What takes the requests: the connection."""

    def take_request(self, request: ClientRequest) -> None:
        """A request's head has come, or what has come is refused as a request."""


class RequestParser:
    """State of one connection's input.

    ``receiving`` is the request whose body is not complete, ``in_head`` tells that a head has begun. Once ``ended`` is
    set nothing more is parsed: what follows could be anything.
    """

    def __init__(self, sink: RequestSink, limits: ClientLimits) -> None:
        self._sink = sink
        self._limits = limits
        self._parser = httptools.HttpRequestParser(self)
        self.receiving: ClientRequest | None = None
        self.ended = False
        self.in_head = False
        self._upgrade = self._replay = False
        self._fed = 0  # bytes parsed of the message
        self._fault: ProxyError | None = None
        self._known: KnownHead | None = None
        self._left = 0  # bytes that are missing of the body of a request with a known head
        self._begun = 0  # messages

    def feed(self, data: bytes) -> None:
        """Parse what was read."""
        if self._left:
            data = self._take_rest(data)
            if not data:
                return
        fresh = not self.in_head and self.receiving is None and not self.ended
        if fresh and self._known is not None:
            found = self._known.match(data)
            if found is not None and found[1] + found[0] >= len(data) and found[0] <= self._limits.body_bytes:
                self._take_known(self._known, data, *found)
                return
        begun = self._begun
        self._parse(data)
        if fresh and self._begun == begun + 1 and self._begun in _REMEMBERED and not (self.ended or self.in_head):
            self._remember(self._latest, data)

    def _remember(self, request: ClientRequest, data: bytes) -> None:
        """Know the head of the request that ``data`` begins with from now on."""
        if request.version == "1.1" and request.keep_alive:
            known = KnownHead(request.method, request.path, request.target, request.headers)
            if known.learn(data, self._limits.head_bytes - len(self._url) - self._head_size):
                self._known = known

    def _take_known(self, known: KnownHead, data: bytes, length: int, start: int) -> None:
        """A request whose head is known, and as much of its body as there is."""
        request = ClientRequest(self._sink, known.method, known.path, known.target, known.headers, "1.1", True)
        request.known = known
        self.receiving = request
        self._left = length
        self._sink.take_request(request)
        self._take_rest(data[start:])

    def _take_rest(self, data: bytes) -> bytes:
        """Some of that body; returns what follows it."""
        request, left = self.receiving, self._left
        if request is None or self.ended:
            return b""
        if data:
            request.take_body(data if len(data) <= left else data[:left])
        self._left = max(left - len(data), 0)
        if not self._left:
            self.receiving = None
            request.end_body()
            if not request.keep_alive:
                self.ended = True
        return data[left:]

    def _parse(self, data: bytes) -> None:
        self._fed += len(data)
        try:
            while data and not self.ended:
                try:
                    self._parser.feed_data(data)
                    break
                except httptools.HttpParserUpgrade as upgrade:
                    data = data[upgrade.args[0] :]
                    self._parse_without_upgrade()
        except httptools.HttpParserError:
            self.refuse(self._fault or ProxyError(400, "this is not a valid HTTP/1.1 request", "proxy", "bad_request"))
            return
        if self.in_head and self._fed > 2 * self._limits.head_bytes:
            self.refuse(self._head_too_long())
        elif self.receiving is not None:
            body = self.receiving.body_size
            if self._fed - body > _FRAMING_PART * body + 2 * self._limits.head_bytes:
                self.refuse(ProxyError(400, "the body is mostly framing", "proxy", "bad_request"))

    def _parse_without_upgrade(self) -> None:
        """The parser has stopped at an Upgrade header, which is ignored: let another one go on with the body."""
        self._upgrade, self._replay = False, True
        self._parser = httptools.HttpRequestParser(self)
        request = self.receiving
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

    def refuse(self, error: ProxyError) -> None:
        """Answer what has come with an error, in its turn, and take nothing more."""
        if self.ended:
            return
        self.ended = True
        if self.receiving is not None:
            self.receiving.refuse(error)
        else:
            self._sink.take_request(ClientRequest(self._sink, "-", "", b"", [], "1.1", False, error))

    def on_message_begin(self) -> None:
        if self._replay:
            return
        self.in_head = True
        self._begun += 1
        self._fed = self._head_size = 0
        self._url = b""
        self._headers: list[Header] = []

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.in_head or self._replay:
            return  # a trailer
        self._head_size += len(name) + len(value) + _FIELD_COST
        if self._head_size > self._limits.head_bytes:
            self._fault = self._head_too_long()
            raise self._fault
        self._headers.append(_known.get((name, value)) or _header(name, value))

    def on_headers_complete(self) -> None:
        if self._replay:
            return
        self.in_head = False
        if self.ended:
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
        request = ClientRequest(self._sink, method, path, target, self._headers, version, keep_alive, error)
        self._upgrade = parser.should_upgrade()
        self.receiving = self._latest = request
        self._sink.take_request(request)

    def on_body(self, body: bytes) -> None:
        request = self.receiving
        if request is None:
            return
        request.take_body(body)
        if request.body_size > self._limits.body_bytes:
            self.ended = True
            request.refuse(too_long(self._limits.body_bytes))

    def on_message_complete(self) -> None:
        request = self.receiving
        if request is None or self._upgrade or self.ended:
            return
        self.receiving = None
        request.end_body()
        if not request.keep_alive:
            self.ended = True
