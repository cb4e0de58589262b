"""Which header fields the proxy passes on, and those that it adds to answers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from urllib.parse import urlsplit

from disagg_prefill_lmcache_v1.proxy.headers import Header
from disagg_prefill_lmcache_v1.proxy.request import RequestContext

# Hop-by-hop headers, and those that are made anew for each hop.
_HOP_BY_HOP = frozenset(
    (b"connection", b"keep-alive", b"proxy-connection", b"proxy-authenticate", b"proxy-authorization", b"te",
     b"trailer", b"transfer-encoding", b"upgrade", b"content-length")
)  # fmt: skip
_NOT_SENT_ON = _HOP_BY_HOP | {b"host", b"expect", b"http2-settings", b"x-request-id"}
_INTERNAL = b"x-kv-"  # between the proxy and its servers; a client's are dropped
_LOCATIONS = (b"location", b"content-location")
# The decode server's: prompt tokens that it had, or that its workers have really loaded.
REUSED_TOKENS = b"x-kv-reused-tokens"
_NOT_SENT_BACK = _HOP_BY_HOP | {
    *_LOCATIONS,
    REUSED_TOKENS,
    b"x-request-id",
    b"x-kv-state",
    b"x-kv-wait-ms",
    b"x-kv-transfer-ms",
    b"x-kv-reason",
    b"x-kv-timing",
    b"x-kv-layout",
}
_request_id_ok = re.compile(rb"[A-Za-z0-9_.:/@+=,~#|-]{1,256}").fullmatch

PREFLIGHT = (
    b"access-control-allow-methods: GET, POST, PUT, DELETE, OPTIONS, HEAD\r\n"
    b"access-control-allow-headers: *, Authorization, Content-Type\r\naccess-control-max-age: 600\r\n"
)


class RequestHeaders:
    """Header fields of a client's request. Values are b"" when absent."""

    __slots__ = (
        "authorization",
        "content_length",
        "content_type",
        "expects_continue",
        "hosts",
        "origin",
        "request_id",
        "sent_on",
        "transfer_encoding",
    )

    def __init__(self, headers: Iterable[Header]) -> None:
        self.authorization = self.content_length = self.content_type = self.origin = self.request_id = b""
        self.transfer_encoding = connection = b""
        self.expects_continue = False
        self.hosts = 0
        lines = []
        for name, value, line in headers:
            if name in _NOT_SENT_ON:
                if name == b"host":
                    self.hosts += 1
                elif name == b"content-length":
                    self.content_length = value
                elif name == b"x-request-id":
                    if _request_id_ok(value):
                        self.request_id = value
                elif name == b"connection":
                    connection = connection + b"," + value if connection else value
                elif name == b"transfer-encoding":
                    self.transfer_encoding = value
                elif name == b"expect":
                    self.expects_continue = value.lower() == b"100-continue"
                continue
            if name == b"content-type":
                self.content_type = value
            elif name == b"authorization":
                self.authorization = value
            elif name == b"origin":
                self.origin = value
            elif name[:5] == _INTERNAL:
                continue
            lines.append(line)
        self.sent_on = _without_named(lines, connection)

    def fault(self, version: str) -> str:
        """What the parser lets pass but no two servers read alike; "" if there is nothing."""
        if self.hosts != 1 and (self.hosts or version == "1.1"):
            return "there must be exactly one Host header"
        if self.transfer_encoding and (self.transfer_encoding.lower() != b"chunked" or version == "1.0"):
            return "the only transfer encoding that is taken is chunked, in HTTP/1.1"
        return ""


def _without_named(lines: list[bytes], connection: bytes) -> list[bytes]:
    """Without the fields that a Connection header names as belonging to one hop."""
    connection = connection.lower()
    if not connection or connection in (b"keep-alive", b"close"):
        return lines
    named = {token.strip() for token in connection.split(b",")}
    return [line for line in lines if line.partition(b":")[0].lower() not in named]


def answer_lines(request: RequestContext, headers: Iterable[Header]) -> list[bytes]:
    """Header lines of an answer: those of the server that may pass, and the proxy's own."""
    lines = []
    connection = b""
    for name, value, line in headers:
        if name not in _NOT_SENT_BACK:
            lines.append(line)
        elif name == b"connection":
            connection = value
        elif name in _LOCATIONS:
            lines.append(b"%b: %b\r\n" % (name, _location(value, (request.decoder, request.prefiller))))
    if connection:
        lines = _without_named(lines, connection)
    if request.cors:
        lines = [line for line in lines if not line.lower().startswith(b"access-control-")]
        lines.append(request.cors)
    lines.append(own_lines(request))
    return lines


def _location(value: bytes, authorities: tuple[str, ...]) -> bytes:
    """A Location that names one of the servers, as one that leads to the same path of the proxy."""
    try:
        parts = urlsplit(value.decode("latin-1"))
        host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        return b"/"
    if (f"[{host}]:{port}" if ":" in host else f"{host}:{port}") not in authorities:
        return value
    return parts._replace(scheme="", netloc="", path="/" + parts.path.lstrip("/")).geturl().encode("latin-1")


def own_lines(request: RequestContext) -> bytes:
    """Header lines that tell the request's id and what became of its KV cache."""
    text = f"x-request-id: {request.request_id}\r\n"
    if request.kv_state:
        text += f"x-kv-state: {request.kv_state}\r\n"
        if request.kv_wait_ms >= 0:
            text += f"x-kv-wait-ms: {request.kv_wait_ms:.1f}\r\n"
        if request.kv_transfer_ms >= 0:
            text += f"x-kv-transfer-ms: {request.kv_transfer_ms:.1f}\r\n"
    if request.reused_tokens >= 0:
        text += f"x-reused-tokens: {request.reused_tokens}\r\n"
    if request.way:
        text += f"x-route: {request.way}; reason={request.way_reason}\r\n"
    return text.encode()


def cors_lines(allowed: frozenset[bytes], origin: bytes) -> bytes:
    """Header lines for a browser page of that origin; b"" if it is not allowed."""
    if b"*" in allowed:
        return b"access-control-allow-origin: *\r\naccess-control-expose-headers: *\r\n"
    if origin not in allowed:
        return b""
    return (
        b"access-control-allow-origin: %b\r\nvary: Origin\r\n"
        b"access-control-allow-credentials: true\r\naccess-control-expose-headers: x-request-id\r\n" % origin
    )
