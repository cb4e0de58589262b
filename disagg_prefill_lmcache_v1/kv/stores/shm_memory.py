"""The memory of the store in shared memory: its size, taking it, and how much of it there is. Standard library only."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import re
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

VERSION = 1  # of the messages between client and server, and of what is in the memory
ALIGNMENT = 4096  # bytes; every chunk starts on a page
SMALLEST = 1 << 20  # bytes
_UNITS = {"": 1, "b": 1, "k": 10**3, "kb": 1 << 10, "m": 10**6, "mb": 1 << 20, "g": 10**9, "gb": 1 << 30}
_MADV_POPULATE_WRITE = 23  # Linux 5.14
_POPULATE_STEP = 32 << 20  # bytes


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
    return size - size % ALIGNMENT


class Segment:
    """The memory itself.

    Raises:
        OSError: the kernel gives none.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.fd = os.memfd_create("disagg-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, size)
        # a file that shrinks would kill those who have it mapped
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)

    def describe(self) -> dict[str, Any]:
        """What a client needs to map it, and to know that it is this one."""
        status = os.fstat(self.fd)
        identity = {"pid": os.getpid(), "fd": self.fd, "device": status.st_dev, "inode": status.st_ino}
        return {"version": VERSION, "segment": uuid.uuid4().hex, "size": self.size, **identity}


def populate(mapping: mmap.mmap, size: int, ended: Callable[[], bool]) -> None:
    """Make the kernel back every page of a mapping now, so that no first copy waits for it. Blocks, without the GIL.

    Raises:
        OSError: there is not enough memory after all, or the kernel is older than 5.14.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    start = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    for offset in range(0, size, _POPULATE_STEP):
        if ended():
            return
        length = min(_POPULATE_STEP, size - offset)
        address = ctypes.c_void_p(start + offset)
        while libc.madvise(address, ctypes.c_size_t(length), _MADV_POPULATE_WRITE) != 0:
            error = ctypes.get_errno()
            if error not in (4, 11):  # interrupted by a signal
                raise OSError(error, os.strerror(error))


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
