"""A KV store in shared memory, for servers on one machine: ``--backend shm``.

    python -m disagg_prefill_lmcache_v1.kv.stores.shm_server SOCKET --size 2gb

The store is one anonymous memory file. This process decides who may use which part of it; clients (shm.py) map the
file and copy their bytes themselves, so no payload goes through a socket. The file has no name: when the server and its
clients are gone, so is the memory, however they ended.

Clients connect to a Unix socket that only the same user may open, and are greeted with the answer
``[true, {version, segment, size}]`` and the file's descriptor.

They speak in frames: 4 bytes of length, little endian, then a MessagePack array. One request, one answer; every request
but ``ping`` and ``stats`` is about many keys.

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
import contextlib
import mmap
import os
import signal
import socket
import struct
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from disagg_prefill_lmcache_v1.kv.stores.shm_index import Client, Index
from disagg_prefill_lmcache_v1.kv.stores.shm_memory import Segment, populate
from disagg_prefill_lmcache_v1.memory import available_memory, parse_size
from disagg_prefill_lmcache_v1.same_user import listen, peer

FRAME = struct.Struct("<I")
MAX_FRAME = 64 << 20  # bytes; a key takes about 150


def exchange(send: Callable[[bytes], Any], read: Callable[[int], bytes | bytearray], request: Sequence[Any]) -> Any:
    """A client's side: send a request, read the answer, return its result.

    Raises:
        ValueError: the server has refused it, or is none of this kind.
    """
    send(frame_of(request))
    return read_result(read, read(FRAME.size))


def frame_of(message: Any) -> bytes:
    data = msgspec.msgpack.encode(message)
    return FRAME.pack(len(data)) + data


def read_result(read: Callable[[int], bytes | bytearray], head: bytes) -> Any:
    """The result in an answer that begins with ``head``. Raises ValueError as ``exchange``."""
    (length,) = FRAME.unpack(head)
    if length > MAX_FRAME:
        raise ValueError("it is no KV store of this kind")
    done, result = msgspec.msgpack.decode(read(length))
    if not done:
        raise ValueError(result)
    return result


class Connection(asyncio.Protocol):
    """Frames of one client of the same user, by a Unix socket."""

    max_frame = MAX_FRAME

    def __init__(self, server: Server) -> None:
        self._server = server
        self._client = Client()
        self._received = bytearray()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        connected = transport.get_extra_info("socket")
        with socket.socket(fileno=os.dup(connected.fileno())) as line:
            if peer(line)[1] != os.geteuid():
                self._transport.abort()
                return
            try:
                socket.send_fds(line, [frame_of((True, self._server.hello))], [self._server.segment.fd])
            except OSError:  # gone already
                self._transport.abort()

    def data_received(self, data: bytes) -> None:
        self._received += data
        while len(self._received) >= FRAME.size and not self._transport.is_closing():
            (length,) = FRAME.unpack_from(self._received)
            if length > self.max_frame:
                self._transport.abort()  # whoever this is, it does not speak our language
                return
            end = FRAME.size + length
            if len(self._received) < end:
                return
            frame = bytes(self._received[FRAME.size : end])
            del self._received[:end]
            self.answer(frame)

    def answer(self, frame: bytes) -> None:
        """Answers a request; one that is not understood is answered too and changes nothing."""
        self._transport.write(frame_of(self._server.answer(self._client, frame)))

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.drop(self._client)


class Server:
    """Answers requests about the parts of ``segment``."""

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        self.index = Index(segment.size)
        self.hello = segment.describe()

    def answer(self, client: Client, frame: bytes) -> tuple[bool, Any]:
        try:
            operation, *arguments = msgspec.msgpack.decode(frame)
            return True, self._run(client, operation, *arguments)
        except (msgspec.DecodeError, TypeError, ValueError, AttributeError) as error:
            return False, f"not understood: {error}"

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
        if operation == "ping":
            return None
        raise ValueError(f"operation {operation!r}")


def _names(keys: Any) -> list[str]:
    return msgspec.convert(keys, list[str])


async def serve(path: str, size: int) -> int:
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
    server = Server(segment)
    try:
        listening = await loop.create_server(lambda: Connection(server), sock=listen(path))
    except OSError as error:
        return _complain(f"cannot listen on {path}: {error.strerror}")

    def take_memory() -> None:
        try:
            populate(mmap.mmap(segment.fd, size), size, ended.is_set)
        except OSError as error:
            if error.errno == 22:  # an older kernel: pages come when they are first used
                return
            _complain(f"cannot take {size >> 20} MiB of shared memory: {error.strerror}")
            loop.call_soon_threadsafe(end, 1)

    threading.Thread(target=take_memory, name="populate", daemon=True).start()
    print(f"KV store shm://{path}: {size >> 20} MiB of shared memory", flush=True)
    code = await status
    with contextlib.suppress(OSError):
        os.unlink(path)
    listening.close()
    return code


def _complain(text: str) -> int:
    print(f"shm_server: {text}", file=sys.stderr, flush=True)
    return 1


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        self.exit(2, f"shm_server: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit status."""
    parser = _Parser(prog="shm_server", description="KV store in shared memory, for servers on one machine.")
    parser.add_argument("socket", help="path of the Unix socket to listen on; only the same user may connect")
    parser.add_argument("--size", required=True, help="memory of the store, as in 512mb or 2gb")
    options = parser.parse_args(arguments)
    try:
        size = parse_size(options.size)
    except ValueError as error:
        parser.error(f"--size {error}")
    available = available_memory()
    if size > available:
        return _complain(f"--size {options.size}: {available >> 20} MiB of memory are available, choose less than that")
    return asyncio.run(serve(os.path.abspath(options.socket), size))


if __name__ == "__main__":
    sys.exit(main())
