"""Clients of the KV stores: LMCache's ``lm://`` server and Redis.

The bytes in the store are exactly LMCache's own, so a stock LMCache reads them. What differs is how they get there:

- a put completes when the store has the chunk (``lm://`` has no acknowledgement: an EXIST after it on the same
  connection is one), so "visible" can be told from "sent";
- every operation has a deadline, a lost connection is made again, a dead store is noticed by ``ping`` and answers
  "not there" at once, so requests are recomputed instead of hanging;
- several chunks travel over several connections at once; a reader never sees another reader's bytes.

LMCache's own ``lm://`` client does none of this: it has one connection, shared by header and body reads that other
coroutines can come between, and never reconnects.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import redis.asyncio as redis
import torch
from lmcache.logging import init_logger
from lmcache.utils import CacheEngineKey
from lmcache.v1.memory_management import MemoryFormat, MemoryObj
from lmcache.v1.protocol import ClientCommand, ClientMetaMessage, RemoteMetadata, ServerMetaMessage, ServerReturnCode
from lmcache.v1.storage_backend.connector.base_connector import RemoteConnector
from redis.asyncio.retry import Retry
from redis.backoff import ConstantBackoff

logger = init_logger(__name__)
T = TypeVar("T")

# Seconds without a byte before an operation on the store is given up.
IO_TIMEOUT_S = 5.0
CONNECT_TIMEOUT_S = 2.0
# After a failure the store is left alone for this long; meanwhile every operation fails at once.
RETRY_AFTER_S = 0.5
CONNECTIONS = 4


class StoreUnavailable(ConnectionError):
    """The KV store cannot be reached."""


class _Link:
    """One connection to an ``lm://`` server; used by one thread at a time."""

    def __init__(self, host: str, port: int) -> None:
        self.socket = socket.create_connection((host, port), timeout=CONNECT_TIMEOUT_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.settimeout(IO_TIMEOUT_S)

    def ask(self, command: ClientCommand, key: CacheEngineKey) -> None:
        self.socket.sendall(_header(command, key))

    def answer(self) -> ServerMetaMessage:
        data = bytearray(ServerMetaMessage.packlength())
        self.read_into(memoryview(data))
        return ServerMetaMessage.deserialize(bytes(data))

    def read_into(self, view: memoryview) -> None:
        got = 0
        while got < len(view):
            n = self.socket.recv_into(view[got:])
            if n == 0:
                raise ConnectionResetError("the KV store closed the connection")
            got += n

    def skip(self, length: int) -> None:
        scratch = memoryview(bytearray(min(length, 1 << 20)))
        while length > 0:
            part = scratch[: min(length, len(scratch))]
            self.read_into(part)
            length -= len(part)

    def close(self) -> None:
        self.socket.close()


def _header(command: ClientCommand, key: CacheEngineKey, obj: MemoryObj | None = None, length: int = 0) -> bytes:
    if obj is None:
        return ClientMetaMessage(command, key, 0, MemoryFormat(1), torch.float16, torch.Size([0, 0, 0, 0])).serialize()
    return ClientMetaMessage(
        command, key, length, obj.get_memory_format(), obj.get_dtype(), obj.get_shape()
    ).serialize()


def _bytes_of(obj: MemoryObj) -> memoryview:
    view = obj.byte_array
    view = view if isinstance(view, memoryview) else memoryview(view)
    return view if view.format == "B" else view.cast("B")


class LMStoreConnector(RemoteConnector):
    """Client of ``python -m lmcache.v1.server``.

    Args:
        host, port: of the server.
        local_cpu_backend: gives staging memory for chunks that are read; its config and metadata are used.

    Raises:
        StoreUnavailable: no server answers at ``host:port``.
    """

    def __init__(
        self, host: str, port: int, loop: asyncio.AbstractEventLoop, local_cpu_backend: Any, links: int = CONNECTIONS
    ) -> None:
        super().__init__(local_cpu_backend.config, local_cpu_backend.metadata)
        self.loop = loop
        self.local_cpu_backend = local_cpu_backend
        self._address = (host, port)
        self._links = max(1, links)
        self._idle: list[_Link] = []
        self._lock = threading.Lock()
        self._failed_at = -1e9
        self._threads = ThreadPoolExecutor(self._links, thread_name_prefix="kv-store")
        self._use(lambda link: None)  # fail here, at the start, rather than at the first request

    # one operation, in a thread

    def _use(self, work: Callable[[_Link], T]) -> T:
        with self._lock:
            link = self._idle.pop() if self._idle else None
        if link is not None:
            try:
                return self._finish(link, work(link))
            except (OSError, ValueError, struct.error) as error:
                link.close()
                if isinstance(error, TimeoutError):
                    self._fail(error)
                # else: it was idle and the server was restarted meanwhile; a fresh connection tells
        if time.monotonic() - self._failed_at < RETRY_AFTER_S:
            raise StoreUnavailable(self._text("did not answer a moment ago"))
        try:
            link = _Link(*self._address)
        except OSError as error:
            self._fail(error)
        try:
            return self._finish(link, work(link))
        except (OSError, ValueError, struct.error) as error:
            link.close()
            self._fail(error)

    def _finish(self, link: _Link, result: T) -> T:
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
        return f"KV store lm://{self._address[0]}:{self._address[1]}: {cause}"

    async def _run(self, work: Callable[[_Link], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._use, work)

    def _shares(self, n: int) -> list[slice]:
        """``n`` items in contiguous shares, one for each connection that is worth using."""
        parts = min(self._links, n)
        return [slice(n * i // parts, n * (i + 1) // parts) for i in range(parts)]

    # RemoteConnector

    @staticmethod
    def _put_all(link: _Link, keys: Sequence[CacheEngineKey], objs: Sequence[MemoryObj]) -> None:
        for key, obj in zip(keys, objs, strict=True):
            data = _bytes_of(obj)
            link.socket.sendall(_header(ClientCommand.PUT, key, obj, len(data)))
            link.socket.sendall(data)
        link.ask(ClientCommand.EXIST, keys[-1])  # answered after the puts: their acknowledgement
        if link.answer().code != ServerReturnCode.SUCCESS:
            raise ConnectionError("the KV store dropped a chunk")

    def support_batched_put(self) -> bool:
        return True

    async def batched_put(self, keys: list[CacheEngineKey], memory_objs: list[MemoryObj]) -> None:
        """Store the chunks; returns when the store has them all.

        Raises:
            StoreUnavailable: some may be missing.
        """
        results = await asyncio.gather(
            *(
                self._run(lambda link, s=share: self._put_all(link, keys[s], memory_objs[s]))
                for share in self._shares(len(keys))
            ),
            return_exceptions=True,  # all have stopped reading the staging memory before it is freed
        )
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def put(self, key: CacheEngineKey, memory_obj: MemoryObj) -> None:
        await self.batched_put([key], [memory_obj])

    @staticmethod
    def _count_present(link: _Link, keys: Sequence[CacheEngineKey]) -> int:
        present = 0
        # 186 bytes asked, 36 answered: 256 at a time stay far below the socket buffers
        for i in range(0, len(keys), 256):
            part = keys[i : i + 256]
            link.socket.sendall(b"".join(_header(ClientCommand.EXIST, key) for key in part))
            codes = [link.answer().code for _ in part]
            for code in codes:
                if code != ServerReturnCode.SUCCESS:
                    return present
                present += 1
        return present

    def support_batched_contains(self) -> bool:
        return True

    def batched_contains(self, keys: list[CacheEngineKey]) -> int:
        """How many of ``keys``, counted from the first, the store has."""
        return self._use(lambda link: self._count_present(link, keys))

    async def batched_async_contains(self, lookup_id: str, keys: list[CacheEngineKey], pin: bool = False) -> int:
        return await self._run(lambda link: self._count_present(link, keys))

    async def exists(self, key: CacheEngineKey) -> bool:
        return await self._run(lambda link: self._count_present(link, [key])) == 1

    def exists_sync(self, key: CacheEngineKey) -> bool:
        return self.batched_contains([key]) == 1

    def _get_all(self, link: _Link, keys: Sequence[CacheEngineKey]) -> list[MemoryObj | None]:
        objs: list[MemoryObj | None] = []
        try:
            for key in keys:
                link.ask(ClientCommand.GET, key)
                meta = link.answer()
                if meta.code != ServerReturnCode.SUCCESS:
                    objs.append(None)
                    continue
                obj = None
                if _fits(self, meta.shape, meta.dtype, meta.fmt, meta.length):
                    obj = self.local_cpu_backend.allocate(meta.shape, meta.dtype, meta.fmt)
                if obj is None:
                    logger.warning("Chunk %s not taken: foreign shape %s or no memory", key.to_string(), meta.shape)
                    link.skip(meta.length)
                    objs.append(None)
                    continue
                objs.append(obj)
                link.read_into(_bytes_of(obj)[: meta.length])
        except BaseException:
            for obj in objs:
                if obj is not None:
                    obj.ref_count_down()
            raise
        return objs

    def support_batched_get(self) -> bool:
        return True

    async def batched_get(self, keys: list[CacheEngineKey]) -> list[MemoryObj | None]:
        """The chunks, None for each that is not there.

        Raises:
            StoreUnavailable: none is returned, none kept.
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
                    obj.ref_count_down()
            raise errors[0]
        return objs

    async def get(self, key: CacheEngineKey) -> MemoryObj | None:
        return (await self.batched_get([key]))[0]

    def support_ping(self) -> bool:
        return True

    async def ping(self) -> int:
        """0 when the store answers.

        Raises:
            StoreUnavailable: it does not.
        """

        def check(link: _Link) -> int:
            link.socket.sendall(_header(ClientCommand.HEALTH, _PING_KEY))
            return 0 if link.answer().code == ServerReturnCode.SUCCESS else 1

        return await self._run(check)

    async def list(self) -> list[str]:
        raise ValueError("the lm:// protocol has no listing")

    async def close(self) -> None:
        self._threads.shutdown(wait=False)
        with self._lock:
            idle, self._idle = self._idle, []
        for link in idle:
            link.close()


_PING_KEY = CacheEngineKey("ping", 1, 0, 0, torch.float16)


class RedisStoreConnector(RemoteConnector):
    """Client of Redis; a chunk is two values, ``<key>kv_bytes`` and ``<key>metadata``, as LMCache has it.

    LMCache's own client has no deadlines, tells nobody of a failed put, takes a chunk of which one value was evicted
    for present, and its ``close`` waits for its own event loop, so the process hangs at its end.
    """

    def __init__(self, url: str, loop: asyncio.AbstractEventLoop, local_cpu_backend: Any) -> None:
        super().__init__(local_cpu_backend.config, local_cpu_backend.metadata)
        self.loop = loop
        self.local_cpu_backend = local_cpu_backend
        self._redis = redis.Redis(
            connection_pool=redis.BlockingConnectionPool.from_url(
                url,
                max_connections=CONNECTIONS,
                timeout=IO_TIMEOUT_S,
                socket_connect_timeout=CONNECT_TIMEOUT_S,
                socket_timeout=IO_TIMEOUT_S,
                # connections that were idle while Redis was restarted are made again
                retry=Retry(ConstantBackoff(0.05), 2),
                retry_on_error=[redis.ConnectionError],
            )
        )

    def support_batched_put(self) -> bool:
        return True

    async def batched_put(self, keys: list[CacheEngineKey], memory_objs: list[MemoryObj]) -> None:
        """Store the chunks; returns when Redis has them all.

        Raises:
            redis.RedisError: some may be missing.
        """
        results = await asyncio.gather(
            *(self.put(key, obj) for key, obj in zip(keys, memory_objs, strict=True)),
            return_exceptions=True,  # all have stopped reading the staging memory before it is freed
        )
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def put(self, key: CacheEngineKey, memory_obj: MemoryObj) -> None:
        data = _bytes_of(memory_obj)
        meta = RemoteMetadata(
            len(data), memory_obj.get_shapes(), memory_obj.get_dtypes(), memory_obj.get_memory_format()
        ).serialize()
        name = key.to_string()
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.set(name + "kv_bytes", data)
            pipe.set(name + "metadata", meta)
            await pipe.execute()

    async def _count_present(self, keys: Sequence[CacheEngineKey]) -> int:
        async with self._redis.pipeline(transaction=False) as pipe:
            for key in keys:
                name = key.to_string()
                pipe.exists(name + "metadata", name + "kv_bytes")
            for i, count in enumerate(await pipe.execute()):
                if count != 2:
                    return i
        return len(keys)

    def support_batched_contains(self) -> bool:
        return True

    def batched_contains(self, keys: list[CacheEngineKey]) -> int:
        """How many of ``keys``, counted from the first, Redis has."""
        future = asyncio.run_coroutine_threadsafe(self._count_present(keys), self.loop)
        return future.result(IO_TIMEOUT_S + CONNECT_TIMEOUT_S)

    async def batched_async_contains(self, lookup_id: str, keys: list[CacheEngineKey], pin: bool = False) -> int:
        return await self._count_present(keys)

    async def exists(self, key: CacheEngineKey) -> bool:
        return await self._count_present([key]) == 1

    def exists_sync(self, key: CacheEngineKey) -> bool:
        return self.batched_contains([key]) == 1

    def support_batched_get(self) -> bool:
        return True

    async def batched_get(self, keys: list[CacheEngineKey]) -> list[MemoryObj | None]:
        """The chunks, None for each that is not there.

        Raises:
            redis.RedisError: none is returned, none kept.
        """
        results = await asyncio.gather(*(self.get(key) for key in keys), return_exceptions=True)
        errors = [r for r in results if isinstance(r, BaseException)]
        if errors:
            for obj in results:
                if obj is not None and not isinstance(obj, BaseException):
                    obj.ref_count_down()
            raise errors[0]
        return results

    async def get(self, key: CacheEngineKey) -> MemoryObj | None:
        name = key.to_string()
        raw_meta, raw = await self._redis.mget(name + "metadata", name + "kv_bytes")
        if raw_meta is None or raw is None:
            return None
        try:
            meta = RemoteMetadata.deserialize(raw_meta)
        except (ValueError, KeyError, struct.error):
            meta = None
        if meta is None or len(meta.shapes) != 1 or meta.length != len(raw):
            logger.warning("Chunk %s not taken: it is not LMCache's", name)
            return None
        obj = None
        if _fits(self, meta.shapes[0], meta.dtypes[0], meta.fmt, meta.length):
            obj = self.local_cpu_backend.allocate(meta.shapes, meta.dtypes, meta.fmt)
        if obj is None:
            logger.warning("Chunk %s not taken: foreign shape %s or no memory", name, meta.shapes[0])
            return None
        _bytes_of(obj)[: meta.length] = raw
        return obj

    def support_ping(self) -> bool:
        return True

    async def ping(self) -> int:
        return 0 if await self._redis.ping() else 1

    async def list(self) -> list[str]:
        raise ValueError("listing a shared Redis is not supported")

    async def close(self) -> None:
        await self._redis.aclose()


def _fits(
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


def connect(url: str, loop: asyncio.AbstractEventLoop, local_cpu_backend: Any) -> RemoteConnector | None:
    """Our client for ``url``, or None where only LMCache's own will do (other stores).

    Raises:
        StoreUnavailable: the store does not answer.
    """
    if url.startswith("lm://"):
        host, _, port = url[len("lm://") :].rstrip("/").rpartition(":")
        return LMStoreConnector(host, int(port), loop, local_cpu_backend)
    if url.startswith(("redis://", "rediss://", "unix://")):
        client = RedisStoreConnector(url, loop, local_cpu_backend)
        try:
            asyncio.run_coroutine_threadsafe(client.ping(), loop).result(IO_TIMEOUT_S)
        except Exception as error:
            # the URL may carry a password: only its class of failure is told
            raise StoreUnavailable(f"KV store Redis does not answer: {type(error).__name__}") from None
        return client
    return None
