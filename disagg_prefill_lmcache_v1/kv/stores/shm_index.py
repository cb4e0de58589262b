"""Which chunk is where in the shared memory. Pure bookkeeping: nothing here touches the memory."""

from __future__ import annotations

import bisect
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from disagg_prefill_lmcache_v1.kv.stores.shm_memory import ALIGNMENT

# Answers to "reserve" that are no offset.
PRESENT, BUSY, NO_ROOM = -1, -2, -3


class Space:
    """Free parts of ``[0, size)``: contiguous, first fit, neighbours joined."""

    def __init__(self, size: int) -> None:
        self._starts = [0]  # sorted
        self._sizes = {0: size}

    def take(self, size: int) -> int | None:
        """The offset of ``size`` bytes, or None where no free part is that large."""
        for i, start in enumerate(self._starts):
            if self._sizes[start] >= size:
                self._cut(i, start, size)
                return start
        return None

    def _cut(self, i: int, start: int, size: int) -> None:
        rest = self._sizes.pop(start) - size
        if rest:
            self._starts[i] = start + size
            self._sizes[start + size] = rest
        else:
            del self._starts[i]

    def give(self, start: int, size: int) -> tuple[int, int]:
        """Take back; returns the free part (start, size) that it is in now."""
        i = bisect.bisect_left(self._starts, start)
        if i < len(self._starts) and self._starts[i] == start + size:
            size += self._sizes.pop(self._starts.pop(i))
        if i > 0 and self._starts[i - 1] + self._sizes[self._starts[i - 1]] == start:
            start = self._starts[i - 1]
            self._sizes[start] += size
        else:
            self._starts.insert(i, start)
            self._sizes[start] = size
        return start, self._sizes[start]


class Entry:
    """A chunk of ``length`` bytes at ``offset``; ``size`` counts the rest of its last page too."""

    __slots__ = ("committed", "length", "meta", "offset", "pins", "size")

    def __init__(self, offset: int, size: int, length: int, meta: Any) -> None:
        self.offset, self.size, self.length, self.meta = offset, size, length, meta
        self.committed = False
        self.pins = 0


class Client:
    """What one connection has reserved, and how often it has pinned what."""

    def __init__(self) -> None:
        self.reserved: dict[str, Entry] = {}
        self.pins: dict[str, int] = {}


class Index:
    """Which chunk is where. Pure bookkeeping: nothing here touches the memory.

    In every batch the first key counts as the one used last, so that of a prompt's chunks the last is dropped first:
    the others are of no use without the first.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.evictions = 0
        self.used = 0
        self._space = Space(size)
        self._entries: dict[str, Entry] = {}
        self._evictable: OrderedDict[str, Entry] = OrderedDict()  # committed, not pinned; least recently used first
        self._held: dict[str, Entry] = {}  # being written or read: they stay where they are

    def reserve(self, client: Client, wanted: Sequence[tuple[str, int, Any]]) -> list[int]:
        """Room for chunks of (key, bytes, meta): for each its offset, or PRESENT, BUSY (being written) or NO_ROOM."""
        self._touch([key for key, _, _ in wanted])  # what is there must not be dropped for the rest of the prompt
        return [self._reserve(client, *each) for each in wanted]

    def _reserve(self, client: Client, key: str, length: int, meta: Any) -> int:
        entry = self._entries.get(key)
        if entry is not None:
            return PRESENT if entry.committed else BUSY
        size = -(-length // ALIGNMENT) * ALIGNMENT
        offset = self._place(size) if 0 < size <= self.size else None
        if offset is None:
            return NO_ROOM
        self.used += size
        self._entries[key] = self._held[key] = client.reserved[key] = Entry(offset, size, length, meta)
        return offset

    def _place(self, size: int) -> int | None:
        offset = self._space.take(size)
        if offset is None and size > self._largest_gap():
            return None  # nothing is dropped for a chunk that finds no room anyway
        while offset is None and self._evictable:
            key, entry = self._evictable.popitem(last=False)
            self.evictions += 1
            # no other free part was large enough: only the one that has just grown can be
            if self._free(key, entry)[1] >= size:
                offset = self._space.take(size)
        return offset

    def _largest_gap(self) -> int:
        """The largest part of the memory without a chunk that is being written or read."""
        largest = end = 0
        for entry in sorted(self._held.values(), key=lambda entry: entry.offset):
            largest = max(largest, entry.offset - end)
            end = entry.offset + entry.size
        return max(largest, self.size - end)

    def _free(self, key: str, entry: Entry) -> tuple[int, int]:
        del self._entries[key]
        self._held.pop(key, None)
        self.used -= entry.size
        return self._space.give(entry.offset, entry.size)

    def commit(self, client: Client, keys: Sequence[str]) -> list[str]:
        """Make what was written visible; returns the keys that ``client`` had not reserved."""
        unknown = []
        for key in reversed(keys):
            entry = client.reserved.pop(key, None)
            if entry is None:
                unknown.append(key)
                continue
            entry.committed = True
            self._evictable[key] = entry
            del self._held[key]
        return unknown

    def abort(self, client: Client, keys: Sequence[str]) -> None:
        for key in keys:
            entry = client.reserved.pop(key, None)
            if entry is not None:
                self._free(key, entry)

    def exists(self, keys: Sequence[str]) -> tuple[int, bool]:
        """How many of ``keys``, from the first, are committed, and whether the next one is being written."""
        for i, key in enumerate(keys):
            entry = self._entries.get(key)
            if entry is None or not entry.committed:
                self._touch(keys[:i])
                return i, entry is not None
        self._touch(keys)
        return len(keys), False

    def _touch(self, keys: Sequence[str]) -> None:
        for key in reversed(keys):
            if key in self._evictable:
                self._evictable.move_to_end(key)

    def pin(self, client: Client, keys: Sequence[str]) -> list[tuple[int, int, Any] | None]:
        """Keep committed chunks where they are until ``release``: for each (offset, bytes, meta) or None."""
        found: list[tuple[int, int, Any] | None] = []
        for key in keys:
            entry = self._entries.get(key)
            if entry is None or not entry.committed:
                found.append(None)
                continue
            self._evictable.pop(key, None)
            self._held[key] = entry
            entry.pins += 1
            client.pins[key] = client.pins.get(key, 0) + 1
            found.append((entry.offset, entry.length, entry.meta))
        return found

    def release(self, client: Client, keys: Sequence[str]) -> None:
        for key in reversed(keys):
            if key in client.pins:
                self._unpin(client, key, 1)

    def _unpin(self, client: Client, key: str, times: int) -> None:
        entry = self._entries[key]
        entry.pins -= times
        client.pins[key] -= times
        if not client.pins[key]:
            del client.pins[key]
        if not entry.pins:
            self._evictable[key] = entry
            del self._held[key]

    def remove(self, client: Client, keys: Sequence[str]) -> int:
        """Forget chunks that nobody is reading or writing; returns how many."""
        found = [(key, self._evictable.pop(key)) for key in keys if key in self._evictable]
        for key, entry in found:
            self._free(key, entry)
        return len(found)

    def drop(self, client: Client) -> None:
        """The client is gone: what it was writing is freed, what it was reading may be dropped."""
        self.abort(client, list(client.reserved))
        for key, times in list(client.pins.items()):
            self._unpin(client, key, times)

    def stats(self) -> dict[str, int]:
        committed = sum(entry.committed for entry in self._entries.values())
        return {
            "entries": committed,
            "reserved": len(self._entries) - committed,
            "pinned": committed - len(self._evictable),
            "bytes": self.used,
            "size": self.size,
            "evictions": self.evictions,
        }
