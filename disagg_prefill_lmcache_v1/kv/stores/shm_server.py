"""A KV store in shared memory, for servers on one machine: ``--backend shm``.

    python -m disagg_prefill_lmcache_v1.kv.stores.shm_server HOST PORT --size 2gb

The store is one anonymous memory file. This process decides who may use which part of it; clients (kv_shm.py) map the
file and copy their bytes themselves, so no payload goes through a socket. The file has no name: when the server and its
clients are gone, so is the memory, however they ended.

Clients connect by TCP on the loopback interface and speak in frames: 4 bytes of length, little endian, then a
MessagePack array. One request, one answer; every request but ``hello``, ``ping`` and ``stats`` is about many keys.

    ["hello"]                               -> {version, segment, pid, fd, device, inode, size}
    ["reserve", [[key, bytes, meta], ...]]  -> per key: an offset, or PRESENT, BUSY or NO_ROOM
    ["commit", [key, ...]]                  -> the keys that this client had not reserved
    ["abort", [key, ...]]                   -> nothing
    ["exists", [key, ...]]                  -> [how many from the first are there, is the next being written]
    ["pin", [key, ...]]                     -> per key: [offset, bytes, meta] or nothing
    ["release", [key, ...]]                 -> nothing
    ["remove", [key, ...]]                  -> how many are gone: none that is being written or read
    ["ping"]                                -> nothing
    ["stats"]                               -> {entries, reserved, pinned, bytes, size, evictions}

An answer is ``[true, result]`` or ``[false, why not]``. Room is made by dropping the chunk that was used least
recently, never one that is being written or is pinned by a reader. What a client has reserved and pinned ends with its
connection.

Only the standard library and msgspec are used: the server is ready in a fraction of a second.
"""

from __future__ import annotations

import argparse
import asyncio
import bisect
import contextlib
import ctypes
import fcntl
import mmap
import os
import re
import signal
import struct
import sys
import threading
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

VERSION = 1
ALIGNMENT = 4096  # bytes; every chunk starts on a page
# Answers to "reserve" that are no offset.
PRESENT, BUSY, NO_ROOM = -1, -2, -3

FRAME = struct.Struct("<I")
MAX_FRAME = 64 << 20  # bytes; a key takes about 150

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


def exchange(send: Callable[[bytes], Any], read: Callable[[int], bytes | bytearray], request: Sequence[Any]) -> Any:
    """A client's side: send a request, read the answer, return its result.

    Raises:
        ValueError: the server has refused it, or is none of this kind.
    """
    data = msgspec.msgpack.encode(request)
    send(FRAME.pack(len(data)) + data)
    (length,) = FRAME.unpack(read(FRAME.size))
    if length > MAX_FRAME:
        raise ValueError("it is no KV store of this kind")
    done, result = msgspec.msgpack.decode(read(length))
    if not done:
        raise ValueError(result)
    return result


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
        self._entries[key] = client.reserved[key] = Entry(offset, size, length, meta)
        return offset

    def _place(self, size: int) -> int | None:
        offset = self._space.take(size)
        while offset is None and self._evictable:
            key, entry = self._evictable.popitem(last=False)
            self.evictions += 1
            # no other free part was large enough: only the one that has just grown can be
            if self._free(key, entry)[1] >= size:
                offset = self._space.take(size)
        return offset

    def _free(self, key: str, entry: Entry) -> tuple[int, int]:
        del self._entries[key]
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


# How much memory there is


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


# The server


class Connection(asyncio.Protocol):
    """Frames of one client."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._client = Client()
        self._received = bytearray()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        self._received += data
        while len(self._received) >= FRAME.size:
            (length,) = FRAME.unpack_from(self._received)
            if length > MAX_FRAME:
                self._transport.abort()  # whoever this is, it does not speak our language
                return
            end = FRAME.size + length
            if len(self._received) < end:
                return
            frame = bytes(self._received[FRAME.size : end])
            del self._received[:end]
            answer = self._server.answer(self._client, frame)
            self._transport.write(FRAME.pack(len(answer)) + answer)

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.drop(self._client)


class Server:
    """Answers requests.

    Args:
        size: bytes of the memory.
        hello: what a client needs to use it.
    """

    def __init__(self, size: int, hello: dict[str, Any]) -> None:
        self.index = Index(size)
        self._hello = hello

    def answer(self, client: Client, frame: bytes) -> bytes:
        """The answer to a request; one that is not understood is answered too and changes nothing."""
        try:
            operation, *arguments = msgspec.msgpack.decode(frame)
            result = (True, self._run(client, operation, *arguments))
        except (msgspec.DecodeError, TypeError, ValueError, AttributeError) as error:
            result = (False, f"not understood: {error}")
        return msgspec.msgpack.encode(result)

    def drop(self, client: Client) -> None:
        """The client is gone."""
        self.index.drop(client)

    def _run(self, client: Client, operation: str, keys: Any = None) -> Any:
        if operation == "exists":
            return self.index.exists(_names(keys))
        if operation in ("commit", "abort", "pin", "release", "remove"):
            return getattr(self.index, operation)(client, _names(keys))
        if operation == "reserve":
            return self.index.reserve(client, msgspec.convert(keys, list[tuple[str, int, Any]]))
        if operation == "stats":
            return self.index.stats()
        if operation == "hello":
            return self._hello
        if operation == "ping":
            return None
        raise ValueError(f"operation {operation!r}")


def _names(keys: Any) -> list[str]:
    return msgspec.convert(keys, list[str])


async def serve(host: str, port: int, size: int) -> int:
    """Serve until TERM or INT; returns the exit status."""
    loop = asyncio.get_running_loop()
    status: asyncio.Future[int] = loop.create_future()
    ended = threading.Event()

    def end(code: int) -> None:
        ended.set()
        if not status.done():
            status.set_result(code)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end, 0)
    try:
        segment = Segment(size)
    except OSError as error:
        return _complain(f"cannot take {size >> 20} MiB of shared memory: {error.strerror}")
    server = Server(size, segment.describe())
    try:
        listening = await loop.create_server(lambda: Connection(server), host, port)
    except OSError as error:
        return _complain(f"cannot listen on {host}:{port}: {error.strerror}")

    def take_memory() -> None:
        try:
            populate(mmap.mmap(segment.fd, size), size, ended.is_set)
        except OSError as error:
            if error.errno == 22:  # an older kernel: pages come when they are first used
                return
            _complain(f"cannot take {size >> 20} MiB of shared memory: {error.strerror}")
            loop.call_soon_threadsafe(end, 1)

    threading.Thread(target=take_memory, name="populate", daemon=True).start()
    print(f"KV store shm://{host}:{port}: {size >> 20} MiB of shared memory", flush=True)
    code = await status
    listening.close()
    return code


def _complain(text: str) -> int:
    print(f"kv_shm_server: {text}", file=sys.stderr, flush=True)
    return 1


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        self.exit(2, f"kv_shm_server: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit status."""
    parser = _Parser(prog="kv_shm_server", description="KV store in shared memory, for servers on one machine.")
    parser.add_argument("host", help="address to listen on for control messages")
    parser.add_argument("port", help="port to listen on")
    parser.add_argument("--size", required=True, help="memory of the store, as in 512mb or 2gb")
    options = parser.parse_args(arguments)
    if not re.fullmatch("[0-9]{1,5}", options.port) or not 0 < int(options.port) < 65536:
        parser.error(f"port '{options.port}': allowed: a whole number from 1 to 65535")
    try:
        size = parse_size(options.size)
    except ValueError as error:
        parser.error(f"--size {error}")
    available = available_memory()
    if size > available:
        return _complain(f"--size {options.size}: {available >> 20} MiB of memory are available, choose less than that")
    return asyncio.run(serve(options.host, int(options.port), size))


if __name__ == "__main__":
    sys.exit(main())
