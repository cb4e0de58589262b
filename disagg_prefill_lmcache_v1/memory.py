"""Sizes of memory as people write them, and how much of it there is. Standard library only."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

SMALLEST = 1 << 20  # bytes, of a store
PAGE = 4096  # bytes
_UNITS = {"": 1, "b": 1, "k": 10**3, "kb": 1 << 10, "m": 10**6, "mb": 1 << 20, "g": 10**9, "gb": 1 << 30}


def parse_size(text: str) -> int:
    """Bytes of a size written as Redis has it: ``512mb`` and ``2gb`` are powers of two, ``2g`` is ten to the ninth.

    Raises:
        ValueError: it is not understood or too small.
    """
    match = re.fullmatch(r"([0-9]{1,15})([a-z]{0,2})", text.strip().lower())
    if match is None or match.group(2) not in _UNITS:
        raise ValueError(f"'{text}': allowed: a whole number and a unit, as in 512mb or 2gb")
    size = int(match.group(1)) * _UNITS[match.group(2)]
    if size < SMALLEST:
        raise ValueError(f"'{text}': allowed: {SMALLEST >> 20}mb and more")
    return size - size % PAGE


def available_memory() -> int:
    """Bytes that can still be taken: by this machine, and by the control groups that this process is in."""
    room = [_cgroup_room(folder, *names) for folder, *names in _cgroups()]
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                room.append(int(line.split()[1]) << 10)
    return min((each for each in room if each is not None), default=1 << 62)


def _cgroups() -> Iterator[tuple[Path, str, str, str]]:
    """Folders of this process's memory control groups; names of the limit, the usage and the free cache in each."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                top, names = Path("/sys/fs/cgroup"), ("memory.max", "memory.current", "inactive_file")
            elif "memory" in controllers.split(","):
                top = Path("/sys/fs/cgroup/memory")
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            else:
                continue
            folder = top / path.lstrip("/")
            for each in (folder, *folder.parents):
                yield (each, *names)
                if each == top:
                    break


def _cgroup_room(folder: Path, limit: str, usage: str, cache: str) -> int | None:
    try:
        room = int((folder / limit).read_text()) - int((folder / usage).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return room + int(stat.get(cache, 0))  # a page cache that is not in use gives way
    except (OSError, ValueError):
        return None  # no such group, or "max"
