"""Client of the KV store in shared memory (kv_shm_server.py): ``shm://HOST:PORT``, for servers on one machine.

A chunk is copied once on its way in and once on its way out, straight between the KV cache and memory that every client
has mapped. Two ways lead there:

- LMCache's own calls (``batched_put``, ``batched_get``, ...), with LMCache's staging memory in between, through its
  plugin seam ``remote_storage_plugins`` (ShmConnectorAdapter);
- ``stage``/``commit`` and ``fetch``, which hand out tensors that lie in the shared memory. They block, may be called
  by any thread, and are what a device copies from and to without another copy on the host.

What one client is writing nobody else sees before ``commit``; what it is reading stays until it has left ``fetch``.
Both hold while its connection is open, so a connection that has failed is not used again but stays open until all that
was handed out on it has been given back: no late write can reach a chunk of somebody else. A process that dies closes
its connections, and its unfinished chunks are freed.

Failures are kv_store.StoreUnavailable, as with the other stores: every operation has a deadline, a lost connection is
made again, a dead store fails at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from lmcache.logging import init_logger
from lmcache.utils import CacheEngineKey
from lmcache.v1.memory_management import MemoryObj
from lmcache.v1.storage_backend.connector import ConnectorAdapter, ConnectorContext
from lmcache.v1.storage_backend.connector.base_connector import RemoteConnector

from disagg_prefill_lmcache_v1.kv.stores import store as kv_store
from disagg_prefill_lmcache_v1.kv.stores.shm_server import BUSY, PRESENT, VERSION, exchange, populate
from disagg_prefill_lmcache_v1.kv.stores.store import StoreUnavailable

logger = init_logger(__name__)

SCHEME = "shm://"
PLUGIN = "shm"  # in remote_storage_plugins
# Where the store is, for LMCache's plugin seam: the variable wins over the key of extra_config.
URL_VARIABLE = "DISAGG_SHM_URL"
URL_KEY = f"remote_storage_plugin.{PLUGIN}.url"

THREADS = 4  # of the calls that copy
_POLL_S = 0.002  # while another client is writing a chunk


class StoreFull(RuntimeError):
    """The store has no room: all of it is being written or read right now, or the chunk is larger than the store."""


class _Segment:
    """The store's memory, mapped. It stays mapped as long as any tensor that lies in it exists.

    Raises:
        OSError: it cannot be mapped.
    """

    def __init__(self, hello: dict[str, Any]) -> None:
        self.name: str = hello["segment"]
        self.size: int = hello["size"]
        try:
            fd = os.open(f"/proc/{hello['pid']}/fd/{hello['fd']}", os.O_RDWR | os.O_CLOEXEC)
            try:
                status = os.fstat(fd)
                # another machine's or container's process may have this number
                if (status.st_dev, status.st_ino, status.st_size) != (hello["device"], hello["inode"], self.size):
                    raise OSError("not the store's")
                mapping = mmap.mmap(fd, self.size)
            finally:
                os.close(fd)
        except OSError as error:
            cause = f"its memory cannot be mapped ({error.strerror or error})"
            raise OSError(f"{cause}: the server must run on this machine, as the same user") from error
        self.memory = torch.frombuffer(mapping, dtype=torch.uint8)
        self._retired = threading.Event()
        # else every page costs a fault when it is first copied to or from: a third of the speed
        threading.Thread(target=self._populate, args=(mapping,), name="kv-store-map", daemon=True).start()

    def _populate(self, mapping: mmap.mmap) -> None:
        with contextlib.suppress(OSError):
            populate(mapping, self.size, self._retired.is_set)

    def tensor(self, offset: int, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        return self.memory[offset : offset + shape.numel() * dtype.itemsize].view(dtype).view(shape)

    def retire(self) -> None:
        """No new tensor will be asked for."""
        self._retired.set()


class _Session:
    """One connection to the server; any thread may ask."""

    def __init__(self, host: str, port: int, mapped: _Segment | None) -> None:
        self._lock = threading.Lock()  # held while a request is on its way
        self._state = threading.Lock()
        self._leases = 0
        self._failed = False
        self._socket = socket.create_connection((host, port), timeout=kv_store.CONNECT_TIMEOUT_S)
        try:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            hello = exchange(self._socket.sendall, self._read, ["hello"])
            if not isinstance(hello, dict) or hello.get("version") != VERSION:
                raise OSError("it is no KV store of this version")
            known = mapped is not None and mapped.name == hello["segment"]
            self.segment = mapped if known else _Segment(hello)
            self._socket.settimeout(kv_store.IO_TIMEOUT_S)
        except BaseException:
            self._socket.close()
            raise

    def ask(self, *request: Any) -> Any:
        """The answer to a request.

        Raises:
            OSError, ValueError: there is none; the session is of no further use.
        """
        with self._lock:
            if self._failed:
                raise ConnectionResetError("the connection has failed")
            try:
                return exchange(self._socket.sendall, self._read, request)
            except BaseException:
                self._failed = True  # before another thread could take the late answer for its own
                raise

    def _read(self, length: int) -> bytearray:
        data = bytearray(length)
        view, got = memoryview(data), 0
        while got < length:
            n = self._socket.recv_into(view[got:])
            if n == 0:
                raise ConnectionResetError("the KV store closed the connection")
            got += n
        return data

    # What was handed out on this session keeps its connection open: the server frees it all when that closes.

    def lease(self) -> None:
        with self._state:
            self._leases += 1

    def end_leases(self, count: int = 1) -> None:
        with self._state:
            self._leases -= count
            self._close_if_unused()

    def fail(self) -> None:
        with self._state:
            self._failed = True
            self._close_if_unused()

    def _close_if_unused(self) -> None:
        if self._failed and self._leases <= 0:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)  # wakes a thread that waits for an answer
            self._socket.close()


class _PinnedFetch(kv_store.Fetch):
    """Chunks that stay in the shared memory until this is closed."""

    def __init__(
        self, client: ShmStoreConnector, session: _Session, names: Sequence[str], found: Sequence[Any]
    ) -> None:
        self._client, self._session, self._names, self._found = client, session, names, found
        self._closed = False

    def __iter__(self) -> Iterator[tuple[int, torch.Tensor]]:
        client = self._client
        for i, chunk in enumerate(self._found):
            if chunk is None:
                continue
            offset, length, (dims, dtype_name, fmt) = chunk
            shape, dtype = torch.Size(dims), getattr(torch, dtype_name, None)
            if fmt != client.meta_fmt.value or not kv_store.fits(client, shape, dtype, client.meta_fmt, length):
                logger.warning("Chunk %s not taken: foreign shape %s", self._names[i], shape)
                continue
            yield i, self._session.segment.tensor(offset, shape, dtype)

    def done(self, index: int) -> None:
        pass

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        pinned = [name for name, chunk in zip(self._names, self._found, strict=True) if chunk is not None]
        self._client.end_fetch(self._session, pinned)


class ShmStoreConnector(RemoteConnector):
    """Client of ``kv_shm_server``; see the module's text.

    Args:
        host, port: of the server.
        local_cpu_backend: gives staging memory for chunks that LMCache's own calls read; its config and metadata are
            used.

    Attributes:
        on_remap: called, by the thread that noticed, when memory() has changed: the server was restarted. The old
            memory stays mapped until the call has returned. Other threads may already have tensors of the new one.

    Raises:
        StoreUnavailable: no server answers at ``host:port``, or its memory cannot be mapped.
    """

    def __init__(self, host: str, port: int, loop: asyncio.AbstractEventLoop, local_cpu_backend: Any) -> None:
        super().__init__(local_cpu_backend.config, local_cpu_backend.metadata)
        self.loop = loop
        self.local_cpu_backend = local_cpu_backend
        self.on_remap: Callable[[], None] | None = None
        self._address = (host, port)
        self._lock = threading.Lock()
        self._session: _Session | None = None
        self._segment: _Segment | None = None
        self._failed_at = -1e9
        self._closed = False
        self.links = THREADS
        # (key, address of the tensor) -> the session that it was reserved on
        self._staged: dict[tuple[str, int], _Session] = {}
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="kv-store")
        self._ask("ping")  # fail here, at the start, rather than at the first request

    # one request

    def _ask(self, *request: Any) -> Any:
        return self._ask_leased(*request, lease=False)[0]

    def _ask_leased(self, *request: Any, lease: bool = True) -> tuple[Any, _Session]:
        """The answer, and the session that gave it; with ``lease`` the caller must end a lease on it."""
        while True:
            session, fresh = self._connected()
            if lease:
                session.lease()
            try:
                return session.ask(*request), session
            except (OSError, ValueError, TypeError) as error:
                self._forget(session)
                if lease:
                    session.end_leases()
                # else: it was idle and the server was restarted meanwhile; a fresh connection tells
                if fresh or isinstance(error, TimeoutError):
                    self._fail(error)

    def _connected(self) -> tuple[_Session, bool]:
        with self._lock:
            if self._session is not None:
                return self._session, False
            if self._closed:
                raise StoreUnavailable(self._text("closed here"))
            if time.monotonic() - self._failed_at < kv_store.RETRY_AFTER_S:
                raise StoreUnavailable(self._text("did not answer a moment ago"))
            try:
                session = _Session(*self._address, self._segment)
            except (OSError, ValueError, TypeError, KeyError) as error:
                self._fail(error)
            old, self._segment = self._segment, session.segment
            self._session = session
        if old is not None and old is not session.segment:
            old.retire()
            logger.info("KV store %s%s:%d was restarted: its memory is mapped anew", SCHEME, *self._address)
            if self.on_remap is not None:
                self.on_remap()
        return session, True

    def _forget(self, session: _Session) -> None:
        session.fail()
        with self._lock:
            if self._session is session:
                self._session = None

    def _fail(self, error: Exception) -> Any:
        self._failed_at = time.monotonic()
        raise StoreUnavailable(self._text(str(error) or type(error).__name__)) from error

    def _text(self, cause: str) -> str:
        return f"KV store {SCHEME}{self._address[0]}:{self._address[1]}: {cause}"

    # the blocking path: any thread

    def count_present(self, keys: Sequence[CacheEngineKey]) -> int:
        """How many of ``keys``, counted from the first, the store has.

        Raises:
            StoreUnavailable
        """
        return self._exists(keys)[0]

    def _exists(self, keys: Sequence[CacheEngineKey]) -> tuple[int, bool]:
        """As count_present, and whether the next one is being written."""
        count, busy = self._ask("exists", _names(keys))
        return count, busy

    def stage(
        self, keys: Sequence[CacheEngineKey], shapes: Sequence[torch.Size], dtype: torch.dtype
    ) -> tuple[list[torch.Tensor | None], list[bool]]:
        """Room for chunks, to be filled and then given to ``commit`` or ``abandon``, every one.

        Returns:
            For each key a writable tensor of its shape in the shared memory, or None; and whether None is because the
            store has the chunk, or another is just writing it, rather than because there is no room.

        Raises:
            StoreUnavailable: nothing is reserved.
        """
        return self._stage(keys, [(shape, dtype) for shape in shapes])

    def _stage(
        self, keys: Sequence[CacheEngineKey], kinds: Sequence[tuple[torch.Size, torch.dtype]]
    ) -> tuple[list[torch.Tensor | None], list[bool]]:
        names = _names(keys)
        wanted = [
            (
                name,
                shape.numel() * dtype.itemsize,
                [list(shape), str(dtype).removeprefix("torch."), self.meta_fmt.value],
            )
            for name, (shape, dtype) in zip(names, kinds, strict=True)
        ]
        answers, session = self._ask_leased("reserve", wanted)
        tensors: list[torch.Tensor | None] = []
        for name, kind, answer in zip(names, kinds, answers, strict=True):
            tensors.append(session.segment.tensor(answer, *kind) if answer >= 0 else None)
            if tensors[-1] is not None:
                session.lease()
                self._staged[name, tensors[-1].data_ptr()] = session
        session.end_leases()
        return tensors, [answer in (PRESENT, BUSY) for answer in answers]

    def commit(self, keys: Sequence[CacheEngineKey], tensors: Sequence[torch.Tensor | None]) -> None:
        """Make staged chunks visible, all their bytes being written; None is passed over.

        Raises:
            StoreUnavailable: some are not in the store, and never will be: their room is given back.
        """
        lost, cause = 0, None
        for session, names in self._unstage(keys, tensors):
            if session is None:
                lost += len(names)
                continue
            try:
                lost += len(session.ask("commit", names))
            except (OSError, ValueError, TypeError) as error:
                self._forget(session)
                lost, cause = lost + len(names), error
            finally:
                session.end_leases(len(names))
        if cause is not None:
            self._fail(cause)
        if lost:
            raise StoreUnavailable(self._text(f"{lost} chunks were not reserved any more"))

    def abandon(self, keys: Sequence[CacheEngineKey], tensors: Sequence[torch.Tensor | None]) -> None:
        """Give staged chunks back unwritten; None is passed over. Nothing writes to the tensors any more."""
        for session, names in self._unstage(keys, tensors):
            if session is None:
                continue
            try:
                session.ask("abort", names)
            except (OSError, ValueError, TypeError):
                self._forget(session)  # they are freed when it closes
            finally:
                session.end_leases(len(names))

    def _unstage(
        self, keys: Sequence[CacheEngineKey], tensors: Sequence[torch.Tensor | None]
    ) -> list[tuple[_Session | None, list[str]]]:
        """Names by the session that they were staged on; None for those that were not."""
        groups: dict[_Session | None, list[str]] = {}
        for name, tensor in zip(_names(keys), tensors, strict=True):
            if tensor is not None:
                groups.setdefault(self._staged.pop((name, tensor.data_ptr()), None), []).append(name)
        return list(groups.items())

    def fetch(self, keys: Sequence[CacheEngineKey]) -> kv_store.Fetch:
        """Gives (index in ``keys``, tensor in the shared memory) of every chunk that is there and fits this model.

        The tensors are to be read only, and only until it is closed: after that their memory may be used for others.

        Raises:
            StoreUnavailable
        """
        names = _names(keys)
        found, session = self._ask_leased("pin", names)
        return _PinnedFetch(self, session, names, found)

    def end_fetch(self, session: _Session, names: Sequence[str]) -> None:
        """Give back what was pinned on ``session``."""
        try:
            if names:
                session.ask("release", names)
        except (OSError, ValueError, TypeError):
            self._forget(session)  # what was read is right all the same: it was pinned until now
        finally:
            session.end_leases()

    def memory(self) -> list[tuple[int, int]]:
        """(address, bytes) of the host memory that the tensors of ``stage`` and ``fetch`` lie in."""
        segment = self._segment
        return [] if segment is None else [(segment.memory.data_ptr(), segment.size)]

    def stats(self) -> dict[str, int]:
        """The server's counts: entries, reserved, pinned, bytes, size, evictions."""
        return self._ask("stats")

    # RemoteConnector

    async def _run(self, work: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *args)

    def support_batched_put(self) -> bool:
        return True

    async def batched_put(self, keys: list[CacheEngineKey], memory_objs: list[MemoryObj]) -> None:
        """Store the chunks; returns when the store has them all.

        Raises:
            StoreUnavailable, StoreFull: some may be missing.
        """
        deadline = time.monotonic() + kv_store.IO_TIMEOUT_S
        while not await self._run(self._put_all, keys, memory_objs):
            if time.monotonic() > deadline:
                raise StoreUnavailable(self._text("another client does not end writing a chunk"))
            await asyncio.sleep(_POLL_S)

    def _put_all(self, keys: Sequence[CacheEngineKey], objs: Sequence[MemoryObj]) -> bool:
        """Write those that are missing; False while another client is writing one."""
        tensors, present = self._stage(keys, [(obj.get_shape(), obj.get_dtype()) for obj in objs])
        try:
            for obj, tensor in zip(objs, tensors, strict=True):
                if tensor is not None:
                    data = torch.frombuffer(kv_store._bytes_of(obj), dtype=torch.uint8)
                    tensor.view(-1).view(torch.uint8).copy_(data[: tensor.nbytes])
        except BaseException:
            self.abandon(keys, tensors)
            raise
        self.commit(keys, tensors)
        if any(tensor is None and not there for tensor, there in zip(tensors, present, strict=True)):
            raise StoreFull(self._text("it has no room for a chunk"))
        count, busy = self._exists(keys)
        return count == len(keys) or not busy

    async def put(self, key: CacheEngineKey, memory_obj: MemoryObj) -> None:
        """As batched_put, but what is there is replaced: LMCache's check of a store that had failed depends on it."""
        await self._run(self.remove_sync, key)
        await self.batched_put([key], [memory_obj])

    def remove_sync(self, key: CacheEngineKey) -> bool:
        """Whether the chunk was there and is gone; one that is being read or written stays."""
        return self._ask("remove", _names([key])) == 1

    def support_batched_contains(self) -> bool:
        return True

    def batched_contains(self, keys: list[CacheEngineKey]) -> int:
        return self.count_present(keys)

    async def batched_async_contains(self, lookup_id: str, keys: list[CacheEngineKey], pin: bool = False) -> int:
        """As count_present; waits for chunks that are just being written."""
        deadline = time.monotonic() + kv_store.IO_TIMEOUT_S
        while True:
            count, busy = await self._run(self._exists, keys)
            if not busy or time.monotonic() > deadline:
                return count
            await asyncio.sleep(_POLL_S)

    async def exists(self, key: CacheEngineKey) -> bool:
        return await self._run(self.count_present, [key]) == 1

    def exists_sync(self, key: CacheEngineKey) -> bool:
        return self.count_present([key]) == 1

    def support_batched_get(self) -> bool:
        return True

    def _get_all(self, keys: Sequence[CacheEngineKey]) -> list[MemoryObj | None]:
        objs: list[MemoryObj | None] = [None] * len(keys)
        try:
            with self.fetch(keys) as chunks:
                for i, tensor in chunks:
                    obj = self.local_cpu_backend.allocate(tensor.shape, tensor.dtype, self.meta_fmt)
                    if obj is None:
                        logger.warning("Chunk %s not taken: no memory", keys[i].to_string())
                        continue
                    objs[i] = obj
                    data = torch.frombuffer(kv_store._bytes_of(obj), dtype=torch.uint8)
                    data[: tensor.nbytes].copy_(tensor.view(-1).view(torch.uint8))
        except BaseException:
            for obj in objs:
                if obj is not None:
                    obj.ref_count_down()
            raise
        return objs

    async def batched_get(self, keys: list[CacheEngineKey]) -> list[MemoryObj | None]:
        """The chunks, None for each that is not there.

        Raises:
            StoreUnavailable: none is returned, none kept.
        """
        return await self._run(self._get_all, keys)

    async def get(self, key: CacheEngineKey) -> MemoryObj | None:
        return (await self.batched_get([key]))[0]

    def support_ping(self) -> bool:
        return True

    async def ping(self) -> int:
        """0 when the store answers.

        Raises:
            StoreUnavailable: it does not.
        """
        await self._run(self._ask, "ping")
        return 0

    async def list(self) -> list[str]:
        raise ValueError("the store in shared memory has no listing")

    async def close(self) -> None:
        self._threads.shutdown(wait=False)
        with self._lock:
            self._closed = True
            session, self._session = self._session, None
        if session is not None:
            session.fail()
        if self._segment is not None:
            self._segment.retire()


def _names(keys: Sequence[CacheEngineKey]) -> list[str]:
    return [key.to_string() for key in keys]


class ShmConnectorAdapter(ConnectorAdapter):
    """LMCache's plugin seam: ``remote_storage_plugins: ["shm"]``, or a ``remote_url`` that starts with ``shm://``."""

    def __init__(self) -> None:
        super().__init__(SCHEME)

    def can_parse(self, url: str) -> bool:
        return url.startswith(SCHEME) or url.startswith(f"plugin://{PLUGIN}")

    def create_connector(self, context: ConnectorContext) -> RemoteConnector:
        return connect(context.url, context.loop, context.local_cpu_backend)


def connect(url: str, loop: asyncio.AbstractEventLoop, local_cpu_backend: Any) -> ShmStoreConnector:
    """The client for ``shm://HOST:PORT``, or for ``plugin://shm``, whose address is in the configuration.

    Raises:
        StoreUnavailable: the store does not answer.
        ValueError: there is no address, or none that is understood.
    """
    if not url.startswith(SCHEME):
        url = os.environ.get(URL_VARIABLE) or local_cpu_backend.config.get_extra_config_value(URL_KEY, "")
    host, _, port = url.removeprefix(SCHEME).rstrip("/").rpartition(":")
    if not url.startswith(SCHEME) or not host or not port.isdecimal():
        raise ValueError(f"{URL_VARIABLE} or {URL_KEY} is {url!r}: allowed: {SCHEME}HOST:PORT")
    return ShmStoreConnector(host, int(port), loop, local_cpu_backend)
