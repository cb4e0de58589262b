"""The head of a client's request that was parsed before: a client with a connection kept alive sends the same again.

What is equal byte for byte, but for the number of the one Content-Length, has the same meaning and has passed the same
checks; so neither is found out again. All else goes to the parser.
"""

from __future__ import annotations

import re

from disagg_prefill_lmcache_v1.proxy.header_fields import RequestHeaders
from disagg_prefill_lmcache_v1.proxy.headers import Header

_length = re.compile(rb"\r\ncontent-length:[ \t]*([0-9]{1,15})[ \t]*\r\n", re.IGNORECASE).search
_DIGITS = 15
# These say more of the message than its length, or make the connection something else.
_NOT_KNOWN = frozenset((b"transfer-encoding", b"connection", b"upgrade", b"expect", b"http2-settings", b"trailer"))


class KnownHead:
    """One parsed head. ``given`` are its fields, ``lines`` those of them that are sent on."""

    __slots__ = ("_after", "_before", "_longest", "given", "headers", "lines", "method", "path", "target")

    def __init__(self, method: str, path: str, target: bytes, headers: list[Header]) -> None:
        self.method, self.path, self.target, self.headers = method, path, target, headers
        self.given = RequestHeaders(headers)
        self.lines = b"".join(self.given.sent_on)
        self._before = self._after = b""
        self._longest = 0

    def learn(self, data: bytes, room: int) -> bool:
        """Take the head's text from what it begins; False if such a head had better be parsed each time.

        ``room`` is how many bytes the limit would let it be longer.
        """
        end = data.find(b"\r\n\r\n") + 4
        head = data[:end]
        lines = len(self.headers) + 2  # one line for each field: none is folded, nothing stands before the first
        if end < 4 or head.count(b"\r\n") != lines or head.count(b"\n") != lines or head.count(b"\r") != lines:
            return False
        names = [name for name, _, _ in self.headers]
        if self.method != "POST" or names.count(b"content-length") != 1 or not _NOT_KNOWN.isdisjoint(names):
            return False
        found = _length(head)
        if found is None:
            return False
        self._before, self._after = head[: found.start(1)], head[found.end(1) :]
        self._longest = min(len(found[1]) + max(room, 0), _DIGITS)
        return True

    def match(self, data: bytes) -> tuple[int, int] | None:
        """Length of the body and where it begins in ``data``, if that begins with this head; else None."""
        before, after = self._before, self._after
        if not data.startswith(before):
            return None
        start = len(before)
        end = data.find(after, start, start + self._longest + len(after))
        digits = data[start:end]
        if end < 0 or not digits.isdigit():
            return None
        return int(digits), end + len(after)
