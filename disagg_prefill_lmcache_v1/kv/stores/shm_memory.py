"""The memory of the store in shared memory. Standard library only."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import uuid
from collections.abc import Callable
from typing import Any

from disagg_prefill_lmcache_v1.memory import PAGE

VERSION = 2  # of the messages between client and server, and of what is in the memory
ALIGNMENT = PAGE  # every chunk starts on a page
_MADV_POPULATE_WRITE = 23  # Linux 5.14
_POPULATE_STEP = 32 << 20  # bytes


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
        """What a client needs besides the descriptor to map it, and to know that it is this one."""
        return {"version": VERSION, "segment": uuid.uuid4().hex, "size": self.size}


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
