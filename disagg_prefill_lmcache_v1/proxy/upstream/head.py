"""Heads of answers, each parsed once: servers send the same again. Raises UpstreamError for a malformed one."""

from __future__ import annotations

import re

from disagg_prefill_lmcache_v1.proxy.headers import UNIQUE, Header, known_lines, parse_header
from disagg_prefill_lmcache_v1.proxy.upstream.errors import UpstreamError

_digits = re.compile(rb"[0-9]{1,18}").fullmatch
_status_line = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9]{2})(?: [^\x00-\x08\x0a-\x1f\x7f]*)?").fullmatch
INTERNAL = frozenset((b"x-kv-state", b"x-kv-reason", b"x-kv-wait-ms", b"x-kv-transfer-ms", b"x-kv-timing",
                      b"x-kv-reused-tokens"))  # fmt: skip
_SPECIAL = INTERNAL | {b"content-length", b"transfer-encoding", b"connection", b"content-type"}

_KNOWN, _KNOWN_BYTES = 256, 4096  # heads kept, and the longest of them
known_heads: dict[bytes, Head] = {}


class Head:
    """One parsed head, shared by all answers that have it: nothing of it may be changed."""

    __slots__ = ("chunked", "event_stream", "headers", "internal", "keep_alive", "length", "status")

    def __init__(self, text: bytes) -> None:
        lines = text.split(b"\r\n")
        match = _status_line(lines[0])
        if match is None:
            raise UpstreamError("protocol", "bad status line")
        self.status = int(match[2])
        self.keep_alive = match[1] == b"1"
        self.length: int | None = None
        self.chunked = self.event_stream = False
        self.headers: list[Header] = []
        self.internal: list[Header] = []  # what the servers tell the proxy
        for line in lines[1:]:
            header = known_lines.get(line) or parse_header(line)
            if header is None:
                raise UpstreamError("protocol", "bad header")
            self.headers.append(header)
            if header[0] in _SPECIAL:
                self._note(header)

    def _note(self, header: Header) -> None:
        name, value, _ = header
        if name in INTERNAL:
            self.internal.append(header)
        elif name == b"content-length":
            if not _digits(value) or (self.length is not None and self.length != int(value)):
                raise UpstreamError("protocol", "bad Content-Length")
            self.length = int(value)
        elif name == b"content-type":
            self.event_stream = value.lower().startswith(b"text/event-stream")
        elif name == b"transfer-encoding":
            if value.lower() != b"chunked" or self.chunked:
                raise UpstreamError("protocol", "unknown Transfer-Encoding")
            self.chunked = True
        else:
            tokens = value.lower()
            if b"close" in tokens:
                self.keep_alive = False
            elif b"keep-alive" in tokens:
                self.keep_alive = True


def parse_head(text: bytes) -> Head:
    """The head with this text, without the empty line at its end."""
    head = Head(text)
    if len(text) <= _KNOWN_BYTES and not any(name in UNIQUE for name, _, _ in head.headers):
        if len(known_heads) >= _KNOWN:
            known_heads.clear()
        known_heads[text] = head
    return head
