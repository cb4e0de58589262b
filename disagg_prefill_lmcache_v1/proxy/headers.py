"""Header lines of HTTP/1.1, parsed strictly; the same for clients and servers."""

from __future__ import annotations

import re

Header = tuple[bytes, bytes, bytes]
"""Name in lower case, value, and the whole line with its end."""

_header_line = re.compile(
    rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*((?:[^\x00-\x08\x0a-\x1f\x7f]*[^\x00-\x20\x7f])?)[ \t]*"
).fullmatch

# Most header lines are the same in many messages: each is parsed once. Those with an id are not worth keeping.
known_lines: dict[bytes, Header] = {}
_KNOWN_LINES = 512
UNIQUE = frozenset((b"x-request-id", b"x-kv-wait-ms", b"x-kv-timing", b"x-kv-transfer-ms", b"traceparent"))


def parse_header(line: bytes) -> Header | None:
    """Parts of a header line without its end; None if it is malformed."""
    match = _header_line(line)
    if match is None:
        return None
    name, value = match[1].lower(), match[2]
    header = (name, value, b"%b: %b\r\n" % (match[1], value))
    if name not in UNIQUE and len(line) < 256:
        if len(known_lines) >= _KNOWN_LINES:
            known_lines.clear()
        known_lines[line] = header
    return header
