"""Which server has computed, or is computing, how a prompt begins; and whether that outweighs what waits there.

Pure arithmetic, without a clock or a socket, so that ``benchmarks/simulate_prefillers.py`` runs this very code.
"""

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

_TABLE = 65536  # beginnings remembered
_SLACK = 256  # tokens of work that make no difference: less than a step


def _ends() -> tuple[int, ...]:
    """Lengths in bytes at which beginnings are told apart: each 512 first, then an eighth further each time."""
    ends = [512]
    while ends[-1] < BEGINNING:
        ends.append(min(ends[-1] + max(512, ends[-1] // 8), BEGINNING))
    return tuple(ends)


BEGINNING = 128 * 1024
"""Bytes of a prompt that are looked at."""
_ENDS = _ends()


class Prompt:
    """A prompt's size and beginning."""

    __slots__ = ("_beginning", "_keys", "known", "size", "text_bytes", "tokens")

    def __init__(self, beginning: bytes, size: int, tokens: int, is_text: bool = True) -> None:
        self._beginning = beginning  # up to BEGINNING bytes
        self._keys: list[tuple[int, int]] = []
        self.size = size  # bytes of the whole
        self.tokens = tokens  # counted if it is token ids, else estimated
        self.text_bytes = size if is_text else 0
        self.known = 0  # tokens that the server which it goes to is thought to know

    def beginnings(self) -> list[tuple[int, int]]:
        """Of each beginning, shortest first: a hash of it, and its tokens."""
        if not self._keys:
            text, value, start = self._beginning, 0, 0
            for end in _ENDS:
                value = zlib.crc32(text[start:end], value)
                start = min(end, len(text))
                self._keys.append((value << 24 | start, self.tokens * start // max(self.size, 1)))
                if start < end or start == len(text):
                    break
        return self._keys


class Server(Protocol):
    """What is to be known of a server."""

    @property
    def name(self) -> str:
        """The same in every worker process."""

    @property
    def work(self) -> float:
        """Tokens that it has to compute."""


S = TypeVar("S", bound=Server)


class PrefixTable(Generic[S]):
    """Beginnings of prompts and the servers that got them last."""

    def __init__(self) -> None:
        self._servers: OrderedDict[int, S] = OrderedDict()

    def find(self, prompt: Prompt, servers: Sequence[S]) -> tuple[S, int]:
        """The server that is to compute a prompt, and how many of its tokens are thought to be known there.

        It is the one with the fewest tokens to compute until this prompt is done: those before it and its own, without
        the known ones. Among equals one that knows the beginning goes first, then the one that every other worker
        process takes too for a beginning that is new to it.
        """
        known: dict[S, int] = {}
        keys = prompt.beginnings()
        for key, tokens in reversed(keys):
            server = self._servers.get(key)
            if server is not None:
                known.setdefault(server, tokens)
        work = [server.work - known.get(server, 0) for server in servers]
        most = min(work) + _SLACK
        first = keys[0][0] & 0xFFFFFFFF
        equals = [server for server, tokens in zip(servers, work, strict=True) if tokens <= most]
        chosen = max(equals, key=lambda each: (known.get(each, 0), zlib.crc32(each.name.encode(), first)))
        return chosen, known.get(chosen, 0)

    def note(self, prompt: Prompt, server: S) -> None:
        """The prompt goes to this server."""
        table = self._servers
        for key, _ in prompt.beginnings():
            table[key] = server
            table.move_to_end(key)
        while len(table) > _TABLE:
            table.popitem(last=False)

    def clear(self) -> None:
        """Forget everything."""
        self._servers.clear()
