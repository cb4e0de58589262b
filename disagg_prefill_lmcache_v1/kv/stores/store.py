"""Clients of the KV stores: LMCache's ``lm://`` server and Redis.

The bytes in the store are exactly LMCache's own, so a stock LMCache reads them. What differs is how they get there:

- a put completes when the store has the chunk (``lm://`` has no acknowledgement: an EXIST after it on the same
  connection is one), so "visible" can be told from "sent";
- every operation has a deadline, a lost connection is made again, a dead store is noticed by ``ping`` and answers
  "not there" at once, so requests are recomputed instead of hanging;
- several chunks travel over several connections at once, each read straight into its staging memory; a reader never
  sees another reader's bytes.

LMCache's own ``lm://`` client has one connection, shared by header and body reads that other coroutines can come
between, and never reconnects. Its Redis client has no deadlines, tells nobody of a failed put, takes a chunk of which
one value was evicted for present, and its ``close`` waits for its own event loop, so the process hangs at its end.

Besides LMCache's interface each client has a blocking one for kv_transfer.py: :class:`StoreClient` has its words.
"""

from __future__ import annotations

import abc
import asyncio
import itertools
import os
import queue
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import redis
import torch
from lmcache.logging import init_logger
from lmcache.utils import CacheEngineKey
from lmcache.v1.memory_management import MemoryFormat, MemoryObj
from lmcache.v1.protocol import ClientCommand, ClientMetaMessage, RemoteMetadata, ServerMetaMessage, ServerReturnCode
from lmcache.v1.storage_backend.connector.base_connector import RemoteConnector

logger = init_logger(__name__)
T = TypeVar("T")

# Seconds without a byte before an operation on the store is given up.
IO_TIMEOUT_S = 5.0
CONNECT_TIMEOUT_S = 2.0
# After a failure the store is left alone for this long; meanwhile every operation fails at once.
RETRY_AFTER_S = 0.5
# Connections that carry chunks at once, each way. One is limited by one core's copying at each end.
CONNECTIONS = 4
# LMCache's server allocates what is still missing of a chunk for every piece that it receives: pieces that arrive as a
# whole are taken two to three times as fast as one that trickles in.
_LM_PIECE = 256 << 10
_REDIS_PIECE = 1 << 20
_REDIS_PIECES_AHEAD = 4
# Path of a Unix socket of the Redis that remote_url names: a part of the cost of TCP.
SOCKET_VARIABLE = "DISAGG_REDIS_SOCKET"
# Answers of 36 bytes (lm) to requests of 186: so many at a time stay far below the socket buffers.
_LOOKUPS_AT_ONCE = 256


class StoreUnavailable(ConnectionError):
    """The KV store cannot be reached."""


class StoreRefused(Exception):
    """The KV store answers, but will not do this (Redis without memory, a wrong password...)."""


class _Link:
    """A connected socket to a store; used by one thread at a time.

    It blocks in the kernel, with the kernel's own timeout, until all of a chunk has come or gone: with a timeout of
    Python's it would need the interpreter's lock after every piece, and the thread that drives the engine holds it.
    """

    def __init__(self, connected: socket.socket) -> None:
        self.socket = connected
        self._all = socket.MSG_WAITALL
        if isinstance(connected, ssl.SSLSocket):
            self._all = 0  # not for TLS
            connected.settimeout(IO_TIMEOUT_S)
        else:
            connected.settimeout(None)
            timeout = struct.pack("@ll", int(IO_TIMEOUT_S), int(IO_TIMEOUT_S % 1 * 1e6))
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeout)
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)
        self._buffer = bytearray(64)
        self._start = self._end = 0  # what of the buffer was received and not yet taken

    def send(self, data: bytes | memoryview) -> None:
        try:
            self.socket.sendall(data)
        except BlockingIOError:
            raise TimeoutError("timed out") from None

    def _receive(self, view: memoryview, flags: int) -> int:
        try:
            n = self.socket.recv_into(view, 0, flags)
        except BlockingIOError:
            raise TimeoutError("timed out") from None
        if n == 0:
            raise ConnectionResetError("the KV store closed the connection")
        return n

    def read_into(self, view: memoryview) -> None:
        if self._start < self._end:
            n = min(len(view), self._end - self._start)
            view[:n] = self._buffer[self._start : self._start + n]
            self._start += n
            view = view[n:]
        while len(view):
            view = view[self._receive(view, self._all) :]

    def read(self, length: int) -> bytes:
        data = bytearray(length)
        self.read_into(memoryview(data))
        return bytes(data)

    def read_line(self) -> bytes:
        """Up to CR LF, which is left out."""
        while (at := self._buffer.find(b"\r\n", self._start, self._end)) < 0:
            if self._start:
                self._buffer[: self._end - self._start] = self._buffer[self._start : self._end]
                self._start, self._end = 0, self._end - self._start
            if self._end == len(self._buffer):
                self._buffer.extend(bytes(len(self._buffer)))
            self._end += self._receive(memoryview(self._buffer)[self._end :], 0)
        line = bytes(self._buffer[self._start : at])
        self._start = at + 2
        return line

    def skip(self, length: int) -> None:
        scratch = memoryview(bytearray(min(length, 1 << 20)))
        while length > 0:
            part = scratch[: min(length, len(scratch))]
            self.read_into(part)
            length -= len(part)

    def close(self) -> None:
        self.socket.close()


def _bytes_of(obj: MemoryObj) -> memoryview:
    view = obj.byte_array
    view = view if isinstance(view, memoryview) else memoryview(view)
    return view if view.format == "B" else view.cast("B")


class Fetch(abc.ABC):
    """Chunks on their way from a store: iterate over ``(index of the key, tensor [2, layers, tokens, hidden])``.

    They come in any order; those that the store does not have, or that are not this model's, do not come. The tensors
    lie in memory that is not ours to keep: :meth:`done` says that one has been read, :meth:`close` ends it all.
    """

    @abc.abstractmethod
    def __iter__(self) -> Iterator[tuple[int, torch.Tensor]]: ...

    @abc.abstractmethod
    def done(self, index: int) -> None: ...

    @abc.abstractmethod
    def close(self) -> None: ...

    def __enter__(self) -> Fetch:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class _StagedFetch(Fetch):
    """Several connections read into staging memory, the consumer takes chunks while the next ones arrive."""

    def __init__(self, client: StoreClient, keys: Sequence[CacheEngineKey]) -> None:
        self._client, self._keys = client, keys
        self._next = itertools.count()
        self._arrived: queue.SimpleQueue[tuple[int, MemoryObj] | None] = queue.SimpleQueue()
        self._objs: dict[int, MemoryObj] = {}
        self._closed = self._failed = False
        self._readers = min(client.links, len(keys))
        for _ in range(self._readers):
            client.readers.submit(self._read)

    def _read(self) -> None:
        try:
            while not self._closed and (index := next(self._next)) < len(self._keys):
                obj = self._client.use(lambda link, key=self._keys[index]: self._client.get_one(link, key))
                if obj is not None:
                    self._arrived.put((index, obj))
        except Exception as error:
            if not self._failed:
                logger.warning("KV is not loaded: %s", error)
            self._failed = True
        finally:
            self._arrived.put(None)

    def __iter__(self) -> Iterator[tuple[int, torch.Tensor]]:
        while self._readers:
            item = self._arrived.get()
            if item is None:
                self._readers -= 1
                continue
            index, obj = item
            self._objs[index] = obj
            yield index, obj.tensor

    def done(self, index: int) -> None:
        self._client.give_back(self._objs.pop(index))

    def close(self) -> None:
        self._closed = True
        for index, _ in self:  # what still arrives
            self.done(index)
        for index in list(self._objs):
            self.done(index)


class StoreClient(RemoteConnector):
    """What the clients have in common: connections, deadlines, staging memory, LMCache's interface.

    Args:
        name: of the store, for messages; without secrets.
        local_cpu_backend: gives staging memory; its config and metadata are used.
        links: connections that carry chunks at once, each way.

    Raises:
        StoreUnavailable: it does not answer.
    """

    def __init__(
        self, name: str, loop: asyncio.AbstractEventLoop, local_cpu_backend: Any, links: int = CONNECTIONS
    ) -> None:
        super().__init__(local_cpu_backend.config, local_cpu_backend.metadata)
        self.loop = loop
        self.local_cpu_backend = local_cpu_backend
        self.links = max(1, links)
        self._name = name
        self._idle: list[_Link] = []
        self._lock = threading.Lock()
        self._failed_at = -1e9
        self._room = threading.Condition()
        self._staged: dict[int, MemoryObj] = {}  # by address
        # LMCache's calls and reads do not wait for each other
        self._threads = ThreadPoolExecutor(self.links, thread_name_prefix="kv-store")
        self.readers = ThreadPoolExecutor(self.links, thread_name_prefix="kv-read")
        self.use(self.check)  # fail here, at the start, rather than at the first request

    # the protocol of a store, on one connection

    @abc.abstractmethod
    def connect(self) -> _Link:
        """A new connection. Raises OSError."""

    @abc.abstractmethod
    def check(self, link: _Link) -> None:
        """Ask whether the store is there."""

    @abc.abstractmethod
    def put_all(self, link: _Link, keys: Sequence[CacheEngineKey], objs: Sequence[MemoryObj]) -> None:
        """Returns when the store has all chunks."""

    @abc.abstractmethod
    def get_one(self, link: _Link, key: CacheEngineKey) -> MemoryObj | None:
        """A chunk in staging memory, or None if it is not there or not this model's."""

    @abc.abstractmethod
    def count_on(self, link: _Link, keys: Sequence[CacheEngineKey]) -> int:
        """How many of ``keys``, counted from the first, the store has."""

    # connections

    def use(self, work: Callable[[_Link], T]) -> T:
        """Do ``work`` on a connection of its own.

        Raises:
            StoreUnavailable: the store does not answer, or did not a moment ago.
            StoreRefused: it answered with an error.
        """
        with self._lock:
            link = self._idle.pop() if self._idle else None
        if link is not None:
            try:
                return self._finish(link, work)
            except (OSError, ValueError, struct.error) as error:
                if isinstance(error, TimeoutError):
                    self._fail(error)
                # else: it was idle and the server was restarted meanwhile; a fresh connection tells
        if time.monotonic() - self._failed_at < RETRY_AFTER_S:
            raise StoreUnavailable(self._text("did not answer a moment ago"))
        try:
            link = self.connect()
        except OSError as error:
            self._fail(error)
        try:
            return self._finish(link, work)
        except (OSError, ValueError, struct.error) as error:
            self._fail(error)

    def _finish(self, link: _Link, work: Callable[[_Link], T]) -> T:
        try:
            result = work(link)
        except BaseException:  # answers may still be on their way: it can never be used again
            link.close()
            raise
        with self._lock:
            self._idle.append(link)
        return result

    def _fail(self, error: Exception) -> Any:
        self._failed_at = time.monotonic()
        with self._lock:
            idle, self._idle = self._idle, []
        for link in idle:
            link.close()
        raise StoreUnavailable(self._text(str(error) or type(error).__name__)) from error

    def _text(self, cause: str) -> str:
        return f"KV store {self._name}: {cause}"

    # staging memory

    def allocate(self, shape: torch.Size, dtype: torch.dtype, fmt: MemoryFormat, wait: bool = True) -> MemoryObj | None:
        """Staging memory for a chunk; while others use it all, waits or returns None.

        Raises:
            StoreRefused: none became free in time.
        """
        deadline = time.monotonic() + 4 * IO_TIMEOUT_S
        while True:
            obj = self.local_cpu_backend.allocate(shape, dtype, fmt, busy_loop=False)
            if obj is not None or not wait:
                return obj
            if time.monotonic() > deadline:
                raise StoreRefused("no staging memory became free: raise max_local_cpu_size")
            with self._room:
                self._room.wait(0.05)  # memory may also be freed by LMCache itself, without a word

    def give_back(self, obj: MemoryObj) -> None:
        obj.ref_count_down()
        with self._room:
            self._room.notify_all()

    def memory(self) -> list[tuple[int, int]]:
        """(address, bytes) of the staging memory: what may be registered for direct access by a device."""
        buffer = getattr(getattr(self.local_cpu_backend, "memory_allocator", None), "buffer", None)
        return [(buffer.data_ptr(), buffer.numel() * buffer.element_size())] if buffer is not None else []

    # for kv_transfer.py: blocking, from any thread

    def count_present(self, keys: Sequence[CacheEngineKey]) -> int:
        """How many of ``keys``, counted from the first, the store has."""
        return self.use(lambda link: self.count_on(link, keys))

    def stage(
        self, keys: Sequence[CacheEngineKey], shapes: Sequence[torch.Size], dtype: torch.dtype
    ) -> tuple[list[torch.Tensor | None], list[bool]]:
        """Memory to write chunks into: for each key a tensor, or None; and whether the store has the chunk already.

        As many as there is memory for now, so perhaps fewer than ``keys``, but at least one: waits while all of the
        memory is on its way. Each tensor must go to :meth:`commit` or :meth:`abandon`.

        Raises:
            StoreRefused: no memory became free in time.
        """
        tensors: list[torch.Tensor | None] = []
        for shape in shapes:
            obj = self.allocate(shape, dtype, self.meta_fmt, wait=not tensors)
            if obj is None:
                break
            self._staged[obj.tensor.data_ptr()] = obj
            tensors.append(obj.tensor)
        return tensors, [False] * len(tensors)

    def commit(self, keys: Sequence[CacheEngineKey], tensors: Sequence[torch.Tensor]) -> None:
        """Send staged chunks; returns when the store has them.

        Raises:
            StoreUnavailable, StoreRefused: some may be missing. The memory is given back in any case.
        """
        objs = [self._staged.pop(tensor.data_ptr()) for tensor in tensors]
        try:
            self.use(lambda link: self.put_all(link, keys, objs))
        finally:
            for obj in objs:
                self.give_back(obj)

    def abandon(self, keys: Sequence[CacheEngineKey], tensors: Sequence[torch.Tensor | None]) -> None:
        """Give staged chunks back unwritten; None is passed over."""
        for tensor in (tensor for tensor in tensors if tensor is not None):
            self.give_back(self._staged.pop(tensor.data_ptr()))

    def fetch(self, keys: Sequence[CacheEngineKey]) -> Fetch:
        """Begin to read the chunks."""
        return _StagedFetch(self, keys)

    # RemoteConnector

    async def _run(self, work: Callable[[_Link], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, self.use, work)

    def _shares(self, n: int) -> list[slice]:
        """``n`` items in contiguous shares, one for each connection that is worth using."""
        parts = min(self.links, n)
        return [slice(n * i // parts, n * (i + 1) // parts) for i in range(parts)]

    def support_batched_put(self) -> bool:
        return True

    async def batched_put(self, keys: list[CacheEngineKey], memory_objs: list[MemoryObj]) -> None:
        """Store the chunks; returns when the store has them all.

        Raises:
            StoreUnavailable, StoreRefused: some may be missing.
        """
        results = await asyncio.gather(
            *(
                self._run(lambda link, s=share: self.put_all(link, keys[s], memory_objs[s]))
                for share in self._shares(len(keys))
            ),
            return_exceptions=True,  # all have stopped reading the staging memory before it is freed
        )
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def put(self, key: CacheEngineKey, memory_obj: MemoryObj) -> None:
        await self.batched_put([key], [memory_obj])

    def support_batched_contains(self) -> bool:
        return True

    def batched_contains(self, keys: list[CacheEngineKey]) -> int:
        return self.count_present(keys)

    async def batched_async_contains(self, lookup_id: str, keys: list[CacheEngineKey], pin: bool = False) -> int:
        return await self._run(lambda link: self.count_on(link, keys))

    async def exists(self, key: CacheEngineKey) -> bool:
        return await self._run(lambda link: self.count_on(link, [key])) == 1

    def exists_sync(self, key: CacheEngineKey) -> bool:
        return self.count_present([key]) == 1

    def support_batched_get(self) -> bool:
        return True

    def _get_all(self, link: _Link, keys: Sequence[CacheEngineKey]) -> list[MemoryObj | None]:
        objs: list[MemoryObj | None] = []
        try:
            for key in keys:
                objs.append(self.get_one(link, key))
        except BaseException:
            for obj in objs:
                if obj is not None:
                    self.give_back(obj)
            raise
        return objs

    async def batched_get(self, keys: list[CacheEngineKey]) -> list[MemoryObj | None]:
        """The chunks, None for each that is not there.

        Raises:
            StoreUnavailable, StoreRefused: none is returned, none kept.
        """
        results = await asyncio.gather(
            *(self._run(lambda link, s=share: self._get_all(link, keys[s])) for share in self._shares(len(keys))),
            return_exceptions=True,
        )
        errors = [r for r in results if isinstance(r, BaseException)]
        objs = [obj for r in results if not isinstance(r, BaseException) for obj in r]
        if errors:
            for obj in objs:
                if obj is not None:
                    self.give_back(obj)
            raise errors[0]
        return objs

    async def get(self, key: CacheEngineKey) -> MemoryObj | None:
        return (await self.batched_get([key]))[0]

    def support_ping(self) -> bool:
        return True

    async def ping(self) -> int:
        """0 when the store answers.

        Raises:
            StoreUnavailable, StoreRefused: it does not.
        """
        await self._run(self.check)
        return 0

    async def list(self) -> list[str]:
        raise ValueError("listing the chunks of a store is not supported")

    async def close(self) -> None:
        self._threads.shutdown(wait=False)
        self.readers.shutdown(wait=False)
        with self._lock:
            idle, self._idle = self._idle, []
        for link in idle:
            link.close()

    def take(
        self, link: _Link, key: CacheEngineKey, shape: torch.Size, dtype: Any, fmt: MemoryFormat, length: int
    ) -> MemoryObj | None:
        """Read the bytes of a chunk that come next on ``link`` into staging memory; skip them if it is foreign."""
        if not fits(self, shape, dtype, fmt, length):
            logger.warning("Chunk %s not taken: foreign shape %s", key.to_string(), shape)
            link.skip(length)
            return None
        obj = self.allocate(shape, dtype, fmt)
        try:
            link.read_into(_bytes_of(obj)[:length])
        except BaseException:
            self.give_back(obj)
            raise
        return obj


def fits(
    connector: RemoteConnector, shape: torch.Size, dtype: torch.dtype | None, fmt: MemoryFormat, length: int
) -> bool:
    """Whether a chunk is one of this model's, perhaps part-filled: a foreign one must never reach the KV cache.

    Args:
        shape: ``[2, layers, tokens, hidden]``; tokens may be fewer than a whole chunk has.
        length: bytes.
    """
    want = connector.meta_shapes[0]
    if len(shape) != len(want) or dtype != connector.meta_dtypes[0] or fmt != connector.meta_fmt:
        return False
    if any(shape[i] != want[i] for i in range(len(want)) if i != 2) or not 0 < shape[2] <= want[2]:
        return False
    return length == shape.numel() * dtype.itemsize


def _header(command: ClientCommand, key: CacheEngineKey, obj: MemoryObj | None = None, length: int = 0) -> bytes:
    if obj is None:
        return ClientMetaMessage(command, key, 0, MemoryFormat(1), torch.float16, torch.Size([0, 0, 0, 0])).serialize()
    return ClientMetaMessage(
        command, key, length, obj.get_memory_format(), obj.get_dtype(), obj.get_shape()
    ).serialize()


_PING_KEY = CacheEngineKey("ping", 1, 0, 0, torch.float16)


class LMStoreConnector(StoreClient):
    """Client of ``python -m lmcache.v1.server``.

    Raises:
        StoreUnavailable: no server answers at ``host:port``.
    """

    def __init__(
        self, host: str, port: int, loop: asyncio.AbstractEventLoop, local_cpu_backend: Any, links: int = CONNECTIONS
    ) -> None:
        self._address = (host, port)
        super().__init__(f"lm://{host}:{port}", loop, local_cpu_backend, links)

    def connect(self) -> _Link:
        connected = socket.create_connection(self._address, timeout=CONNECT_TIMEOUT_S)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return _Link(connected)

    @staticmethod
    def _answer(link: _Link) -> ServerMetaMessage:
        return ServerMetaMessage.deserialize(link.read(ServerMetaMessage.packlength()))

    def check(self, link: _Link) -> None:
        link.send(_header(ClientCommand.HEALTH, _PING_KEY))
        if self._answer(link).code != ServerReturnCode.SUCCESS:
            raise StoreRefused("the KV store says that it is not healthy")

    def put_all(self, link: _Link, keys: Sequence[CacheEngineKey], objs: Sequence[MemoryObj]) -> None:
        for key, obj in zip(keys, objs, strict=True):
            data = _bytes_of(obj)
            link.send(_header(ClientCommand.PUT, key, obj, len(data)))
            for i in range(0, len(data), _LM_PIECE):
                link.send(data[i : i + _LM_PIECE])
        link.send(_header(ClientCommand.EXIST, keys[-1]))  # answered after the puts: their acknowledgement
        if self._answer(link).code != ServerReturnCode.SUCCESS:
            raise ConnectionError("the KV store dropped a chunk")

    def count_on(self, link: _Link, keys: Sequence[CacheEngineKey]) -> int:
        present = 0
        for i in range(0, len(keys), _LOOKUPS_AT_ONCE):
            part = keys[i : i + _LOOKUPS_AT_ONCE]
            link.send(b"".join(_header(ClientCommand.EXIST, key) for key in part))
            codes = [self._answer(link).code for _ in part]
            for code in codes:
                if code != ServerReturnCode.SUCCESS:
                    return present
                present += 1
        return present

    def get_one(self, link: _Link, key: CacheEngineKey) -> MemoryObj | None:
        link.send(_header(ClientCommand.GET, key))
        meta = self._answer(link)
        if meta.code != ServerReturnCode.SUCCESS:
            return None
        return self.take(link, key, meta.shape, meta.dtype, meta.fmt, meta.length)


class RedisStoreConnector(StoreClient):
    """Client of Redis; a chunk is two values, ``<key>kv_bytes`` and ``<key>metadata``, as LMCache has it.

    redis-py makes the connections (URL, password, TLS, database). The values go past its parser, which would copy
    each of them twice, in one thread.

    Args:
        url: ``redis://``, ``rediss://`` or ``unix://``.
    """

    def __init__(
        self, url: str, loop: asyncio.AbstractEventLoop, local_cpu_backend: Any, links: int = CONNECTIONS
    ) -> None:
        path = os.environ.get(SOCKET_VARIABLE, "")
        settings = {"protocol": 2, "socket_timeout": IO_TIMEOUT_S}
        if path and os.path.exists(path) and url.startswith("redis://"):
            self._pool = redis.ConnectionPool(connection_class=redis.UnixDomainSocketConnection, path=path, **settings)
        else:
            self._pool = redis.ConnectionPool.from_url(url, socket_connect_timeout=CONNECT_TIMEOUT_S, **settings)
        super().__init__("Redis", loop, local_cpu_backend, links)  # the URL may carry a password

    def connect(self) -> _Link:
        connection = self._pool.make_connection()
        try:
            connection.connect()
        except redis.RedisError as error:
            # its text may repeat the URL
            raise ConnectionError(f"no connection ({type(error).__name__})") from None
        link = _Link(connection._sock)
        link.connection = connection  # type: ignore[attr-defined]  # closes its socket when it is collected
        return link

    @staticmethod
    def _command(*words: bytes) -> bytes:
        return b"".join([b"*%d\r\n" % len(words), *(b"$%d\r\n%b\r\n" % (len(word), word) for word in words)])

    @staticmethod
    def _reply(link: _Link, kind: bytes) -> bytes:
        """The rest of a one-line reply: of ":" a number, of "+" a word, of "$" a length."""
        line = link.read_line()
        if line[:1] == b"-":
            raise StoreRefused(f"Redis answers {line[1:].decode(errors='replace')}")
        if line[:1] != kind:
            raise ValueError(f"Redis answers {line[:40]!r}")
        return line[1:]

    def check(self, link: _Link) -> None:
        link.send(self._command(b"PING"))
        self._reply(link, b"+")

    def put_all(self, link: _Link, keys: Sequence[CacheEngineKey], objs: Sequence[MemoryObj]) -> None:
        refused = None
        for key, obj in zip(keys, objs, strict=True):
            data, name = _bytes_of(obj), key.to_string().encode()
            meta = RemoteMetadata(len(data), obj.get_shapes(), obj.get_dtypes(), obj.get_memory_format()).serialize()
            value = name + b"kv_bytes"
            link.send(b"*3\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n" % (len(value), value, len(data)))
            link.send(data)
            link.send(b"\r\n" + self._command(b"SET", name + b"metadata", bytes(meta)))
            for _ in range(2):
                try:
                    self._reply(link, b"+")
                except StoreRefused as error:
                    refused = error
        if refused is not None:
            raise refused

    def count_on(self, link: _Link, keys: Sequence[CacheEngineKey]) -> int:
        present = 0
        for i in range(0, len(keys), _LOOKUPS_AT_ONCE):
            names = [key.to_string().encode() for key in keys[i : i + _LOOKUPS_AT_ONCE]]
            commands = (self._command(b"EXISTS", name + b"metadata", name + b"kv_bytes") for name in names)
            link.send(b"".join(commands))
            for count in [self._reply(link, b":") for _ in names]:
                if count != b"2":
                    return present
                present += 1
        return present

    def get_one(self, link: _Link, key: CacheEngineKey) -> MemoryObj | None:
        name = key.to_string().encode()
        link.send(self._command(b"GET", name + b"metadata"))
        length = int(self._reply(link, b"$"))
        if length < 0:
            return None
        raw = link.read(length + 2)[:-2]
        try:
            meta = RemoteMetadata.deserialize(raw)
        except (ValueError, KeyError, struct.error):
            meta = None
        if meta is None or len(meta.shapes) != 1:
            logger.warning("Chunk %s not taken: it is not LMCache's", key.to_string())
            return None
        if not fits(self, meta.shapes[0], meta.dtypes[0], meta.fmt, meta.length):
            logger.warning("Chunk %s not taken: foreign shape %s", key.to_string(), meta.shapes[0])
            return None
        obj = self.allocate(meta.shapes[0], meta.dtypes[0], meta.fmt)
        try:
            whole = self._read_pieces(link, name + b"kv_bytes", _bytes_of(obj)[: meta.length])
        except BaseException:
            self.give_back(obj)
            raise
        if not whole:
            self.give_back(obj)
            return None
        return obj

    def _read_pieces(self, link: _Link, name: bytes, target: memoryview) -> bool:
        """Read a value into ``target``; whether it was there and as long.

        In pieces: for a GET Redis makes a copy of the whole value, page by page new memory, before it sends the first
        byte, and sends it bit by bit between other work.
        """
        starts = range(0, len(target), _REDIS_PIECE)
        commands = [
            self._command(b"GETRANGE", name, b"%d" % start, b"%d" % (min(start + _REDIS_PIECE, len(target)) - 1))
            for start in starts
        ]
        link.send(b"".join(commands[:_REDIS_PIECES_AHEAD]))
        whole = True
        for i, start in enumerate(starts):
            part = target[start : start + _REDIS_PIECE]
            length = int(self._reply(link, b"$"))
            if length == len(part):
                link.read_into(part)
            else:
                whole = False
                link.skip(length)
            link.read_line()  # its end
            if i + _REDIS_PIECES_AHEAD < len(commands):
                link.send(commands[i + _REDIS_PIECES_AHEAD])
        return whole


def connect(url: str, loop: asyncio.AbstractEventLoop, local_cpu_backend: Any) -> StoreClient | None:
    """Our client for ``url``, or None where only LMCache's own will do (other stores).

    Raises:
        StoreUnavailable: the store does not answer, or refuses us.
    """
    if url.startswith("lm://"):
        host, _, port = url[len("lm://") :].rstrip("/").rpartition(":")
        return LMStoreConnector(host, int(port), loop, local_cpu_backend)
    if url.startswith(("redis://", "rediss://", "unix://")):
        try:
            return RedisStoreConnector(url, loop, local_cpu_backend)
        except (StoreRefused, redis.RedisError) as error:
            raise StoreUnavailable(f"KV store Redis refuses the connection: {type(error).__name__}") from None
    if url.startswith(("shm://", "plugin://shm")):
        from disagg_prefill_lmcache_v1.kv.stores import shm as kv_shm  # it imports this module

        return kv_shm.connect(url, loop, local_cpu_backend)
    if url.startswith(("nixl://", "plugin://nixl")):
        from disagg_prefill_lmcache_v1.kv.stores import nixl as kv_nixl

        return kv_nixl.connect(url, loop, local_cpu_backend)
    return None
