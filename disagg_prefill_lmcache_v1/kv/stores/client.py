"""What the clients of stores behind a socket have in common: connections, deadlines, staging memory.

The bytes in the store are exactly LMCache's own, so a stock LMCache reads them. What differs is how they get there:
several chunks travel over several connections at once, each read straight into its staging memory, and a reader never
sees another reader's bytes. Deadlines, reconnection and acknowledgements are as base.py says.
"""

from __future__ import annotations

import abc
import asyncio
import itertools
import queue
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from lmcache.logging import init_logger
from lmcache.utils import CacheEngineKey
from lmcache.v1.memory_management import MemoryFormat, MemoryObj

from disagg_prefill_lmcache_v1.kv.stores import base
from disagg_prefill_lmcache_v1.kv.stores.base import Fetch, StoreRefused, StoreUnavailable
from disagg_prefill_lmcache_v1.kv.stores.link import Link
from disagg_prefill_lmcache_v1.kv.stores.lmcache_interface import LMCacheInterface

logger = init_logger(__name__)
T = TypeVar("T")

# Connections that carry chunks at once, each way. One is limited by one core's copying at each end.
CONNECTIONS = 4
# Answers of 36 bytes (lm) to requests of 186: so many at a time stay far below the socket buffers.
LOOKUPS_AT_ONCE = 256


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


class StoreClient(LMCacheInterface):
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
        self.links = max(1, links)
        # LMCache's calls and reads do not wait for each other
        super().__init__(loop, local_cpu_backend, ThreadPoolExecutor(self.links, thread_name_prefix="kv-store"))
        self.readers = ThreadPoolExecutor(self.links, thread_name_prefix="kv-read")
        self._name = name
        self._idle: list[Link] = []
        self._lock = threading.Lock()
        self._failed_at = -1e9
        self._room = threading.Condition()
        self._staged: dict[int, MemoryObj] = {}  # by address
        self.alive()  # fail here, at the start, rather than at the first request

    # the protocol of a store, on one connection

    @abc.abstractmethod
    def connect(self) -> Link:
        """A new connection. Raises OSError."""

    @abc.abstractmethod
    def check(self, link: Link) -> None:
        """Ask whether the store is there."""

    @abc.abstractmethod
    def put_all(self, link: Link, keys: Sequence[CacheEngineKey], objs: Sequence[MemoryObj]) -> None:
        """Returns when the store has all chunks."""

    @abc.abstractmethod
    def get_one(self, link: Link, key: CacheEngineKey) -> MemoryObj | None:
        """A chunk in staging memory, or None if it is not there or not this model's."""

    @abc.abstractmethod
    def count_on(self, link: Link, keys: Sequence[CacheEngineKey]) -> int:
        """How many of ``keys``, counted from the first, the store has."""

    # connections

    def use(self, work: Callable[[Link], T]) -> T:
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
        if time.monotonic() - self._failed_at < base.RETRY_AFTER_S:
            raise StoreUnavailable(self._text("did not answer a moment ago"))
        try:
            link = self.connect()
        except OSError as error:
            self._fail(error)
        try:
            return self._finish(link, work)
        except (OSError, ValueError, struct.error) as error:
            self._fail(error)

    def _finish(self, link: Link, work: Callable[[Link], T]) -> T:
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
        deadline = time.monotonic() + 4 * base.IO_TIMEOUT_S
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

    # base.Store

    def alive(self) -> None:
        self.use(self.check)

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

    # what LMCache asks

    def _shares(self, n: int) -> list[slice]:
        """``n`` items in contiguous shares, one for each connection that is worth using."""
        parts = min(self.links, n)
        return [slice(n * i // parts, n * (i + 1) // parts) for i in range(parts)]

    async def batched_put(self, keys: list[CacheEngineKey], memory_objs: list[MemoryObj]) -> None:
        """Store the chunks; returns when the store has them all.

        Raises:
            StoreUnavailable, StoreRefused: some may be missing.
        """
        results = await asyncio.gather(
            *(
                self._run(self.use, lambda link, s=share: self.put_all(link, keys[s], memory_objs[s]))
                for share in self._shares(len(keys))
            ),
            return_exceptions=True,  # all have stopped reading the staging memory before it is freed
        )
        for result in results:
            if isinstance(result, BaseException):
                raise result

    def _get_all(self, link: Link, keys: Sequence[CacheEngineKey]) -> list[MemoryObj | None]:
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
            *(
                self._run(self.use, lambda link, s=share: self._get_all(link, keys[s]))
                for share in self._shares(len(keys))
            ),
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

    async def close(self) -> None:
        self._threads.shutdown(wait=False)
        self.readers.shutdown(wait=False)
        with self._lock:
            idle, self._idle = self._idle, []
        for link in idle:
            link.close()
