"""Parser of HTTP/1.1 answers, strict and limited in size.

1xx answers are skipped, 101 is refused. Bodies are framed by Content-Length, by chunks or by the end of the connection.
Chunk extensions and trailers are taken and dropped.
"""

from __future__ import annotations

import re

from disagg_prefill_lmcache_v1.proxy.upstream.errors import UpstreamError
from disagg_prefill_lmcache_v1.proxy.upstream.head import Head, known_heads, parse_head
from disagg_prefill_lmcache_v1.proxy.upstream.response import Response

HEAD, FIXED, CHUNKED, UNTIL_CLOSE, IDLE, CLOSED = range(6)
SIZE, _DATA, _DATA_END, _TRAILER = range(4)

_MAX_LINE = 4096  # longest chunk-size or trailer line
_MAX_TRAILER = 16384
plain_size = re.compile(rb"([0-9a-fA-F]{1,8})\r\n").match
_any_size = re.compile(rb"([0-9a-fA-F]{1,15})[ \t]*(?:;[^\r\n]*)?").fullmatch


class AnswerParser:
    """The state of one answer; the subclass is told of its parts. Raises UpstreamError for what is malformed."""

    __slots__ = (
        "_keep_alive", "_left", "_max_head_bytes", "_no_body", "_phase", "_rest", "_state", "_trailer", "response",
    )  # fmt: skip

    def __init__(self, max_head_bytes: int) -> None:
        self._max_head_bytes = max_head_bytes
        self._state = IDLE
        self._rest = b""
        self.response: Response | None = None

    # -- for the subclass

    def deliver(self, data: bytes, last: bool = False) -> None:
        """Bytes of the body; ``last`` if nothing of it follows."""
        raise NotImplementedError

    def head_alone(self) -> None:
        """The head of an event stream has come, and no byte of its body yet."""
        raise NotImplementedError

    def end(self, surplus: bytes) -> None:
        """The answer is complete; ``surplus`` came after its end."""
        raise NotImplementedError

    # -- for who reads the connection

    def expect(self, response: Response, no_body: bool) -> None:
        """Begin with an answer; ``no_body`` says that it has none (HEAD)."""
        self.response = response
        self._state = HEAD
        self._rest = b""
        self._no_body = no_body
        self._phase = SIZE
        self._trailer = 0

    def feed(self, data: bytes) -> None:
        """Bytes from the server."""
        state = self._state
        if state == HEAD:
            self._take_head(data)
        elif state == FIXED:
            self._take_fixed(data)
        elif state == CHUNKED:
            self._take_chunked(data)
        elif state == UNTIL_CLOSE:
            self.deliver(data)
        else:
            raise UpstreamError("protocol", "bytes that nobody asked for")

    # -- head

    def _take_head(self, data: bytes) -> None:
        if self._rest:
            data = self._rest + data
        while True:
            if not data.startswith(b"HTTP/1.") and not b"HTTP/1.".startswith(data):
                raise UpstreamError("protocol", "the answer is not HTTP/1")
            end = data.find(b"\r\n\r\n")
            if (end if end >= 0 else len(data)) > self._max_head_bytes:
                raise UpstreamError("protocol", f"response head longer than {self._max_head_bytes} bytes")
            if end < 0:
                self._rest = data
                return
            text = data[:end]
            head = known_heads.get(text) or parse_head(text)
            status = head.status
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
        response.status, response.headers, response.internal = status, head.headers, head.internal
        response.event_stream = head.event_stream
        self._choose_framing(head)
        if self._state == FIXED and self._left == 0:
            self.end(data)
        elif data:
            self.feed(data)
        elif response.event_stream:
            self.head_alone()

    def _choose_framing(self, head: Head) -> None:
        response, length = self.response, head.length
        self._keep_alive = head.keep_alive
        if self._no_body or head.status in (204, 304):
            response.length = length
            self._state, self._left = FIXED, 0
        elif head.chunked:
            if length is not None:
                raise UpstreamError("protocol", "both Content-Length and Transfer-Encoding")
            response.chunked = True
            self._state = CHUNKED
        elif length is not None:
            response.length = length
            self._state, self._left = FIXED, length
        else:
            self._keep_alive = False
            self._state = UNTIL_CLOSE

    # -- body

    def _take_fixed(self, data: bytes) -> None:
        left = self._left
        if len(data) < left:
            self._left = left - len(data)
            self.deliver(data)
            return
        self._left = 0
        self.deliver(data[:left] if len(data) > left else data, last=True)
        self.end(data[left:])

    def _take_chunked(self, data: bytes) -> None:
        if self._rest:
            data, self._rest = self._rest + data, b""
        position = 0
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
                phase = SIZE
            else:
                line_end = self._line_end(data, position)
                if line_end < 0:
                    self._rest = data[position:]
                    break
                if phase == SIZE:
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
            self.deliver(pieces[0] if len(pieces) == 1 else b"".join(pieces), last=done)
        if done:
            self.end(data[position:])

    @staticmethod
    def _line_end(data: bytes, position: int) -> int:
        """Where the line that begins at ``position`` ends; -1 if its end has not come."""
        line_end = data.find(b"\r\n", position)
        if (line_end if line_end >= 0 else len(data)) - position > _MAX_LINE:
            raise UpstreamError("protocol", "chunk or trailer line too long")
        return line_end
