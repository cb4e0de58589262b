"""Client of the KV store in shared memory (shm_server.py): ``shm:///PATH`` of its socket, for one machine and one user.

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

Failures are base.StoreUnavailable, as with the other stores: every operation has a deadline, a lost connection is
made again, a dead store fails at once.
"""

from __future__ import annotations

import asyncio
import os
import socket
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

from disagg_prefill_lmcache_v1.kv.stores import base
from disagg_prefill_lmcache_v1.kv.stores.base import Fetch, StoreUnavailable, bytes_of, fits
from disagg_prefill_lmcache_v1.kv.stores.lmcache_interface import LMCacheInterface
from disagg_prefill_lmcache_v1.kv.stores.shm_index import BUSY, PRESENT
from disagg_prefill_lmcache_v1.kv.stores.shm_session import Session, Sessions
from disagg_prefill_lmcache_v1.same_user import connect as connect_to

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


class _PinnedFetch(Fetch):
    """Chunks that stay in the shared memory until this is closed."""

    def __init__(self, client: ShmStoreConnector, session: Session, names: Sequence[str], found: Sequence[Any]) -> None:
        self._client, self._session, self._names, self._found = client, session, names, found
        self._closed = False

    def __iter__(self) -> Iterator[tuple[int, torch.Tensor]]:
        client = self._client
        for i, chunk in enumerate(self._found):
            if chunk is None:
                continue
            offset, length, (dims, dtype_name, fmt) = chunk
            shape, dtype = torch.Size(dims), getattr(torch, dtype_name, None)
            if fmt != client.meta_fmt.value or not fits(client, shape, dtype, client.meta_fmt, length):
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


class ShmStoreConnector(Sessions, LMCacheInterface):
    """Client of ``shm_server``; see the module's text.

    Args:
        name: of the store, for messages.
        dial: makes a connection to its server.
        local_cpu_backend: gives staging memory for chunks that LMCache's own calls read; its config and metadata are
            used.

    Raises:
        StoreUnavailable: no server answers, or its memory cannot be mapped.
    """

    def __init__(
        self, name: str, dial: Callable[[], socket.socket], loop: asyncio.AbstractEventLoop, local_cpu_backend: Any
    ) -> None:
        LMCacheInterface.__init__(
            self, loop, local_cpu_backend, ThreadPoolExecutor(THREADS, thread_name_prefix="kv-store")
        )
        Sessions.__init__(self, name, dial)
        self.links = THREADS
        # (key, address of the tensor) -> the session that it was reserved on
        self._staged: dict[tuple[str, int], Session] = {}
        self.alive()  # fail here, at the start, rather than at the first request

    # base.Store

    def alive(self) -> None:
        self._ask("ping")

    def count_present(self, keys: Sequence[CacheEngineKey]) -> int:
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
    ) -> list[tuple[Session | None, list[str]]]:
        """Names by the session that they were staged on; None for those that were not."""
        groups: dict[Session | None, list[str]] = {}
        for name, tensor in zip(_names(keys), tensors, strict=True):
            if tensor is not None:
                groups.setdefault(self._staged.pop((name, tensor.data_ptr()), None), []).append(name)
        return list(groups.items())

    def fetch(self, keys: Sequence[CacheEngineKey]) -> Fetch:
        """Gives (index in ``keys``, tensor in the shared memory) of every chunk that is there and fits this model.

        The tensors are to be read only, and only until it is closed: after that their memory may be used for others.

        Raises:
            StoreUnavailable
        """
        names = _names(keys)
        found, session = self._ask_leased("pin", names)
        return _PinnedFetch(self, session, names, found)

    def end_fetch(self, session: Session, names: Sequence[str]) -> None:
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

    # what LMCache asks

    async def batched_put(self, keys: list[CacheEngineKey], memory_objs: list[MemoryObj]) -> None:
        """Store the chunks; returns when the store has them all.

        Raises:
            StoreUnavailable, StoreFull: some may be missing.
        """
        deadline = time.monotonic() + base.IO_TIMEOUT_S
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
                    data = torch.frombuffer(bytes_of(obj), dtype=torch.uint8)
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

    async def batched_async_contains(self, lookup_id: str, keys: list[CacheEngineKey], pin: bool = False) -> int:
        """As count_present; waits for chunks that are just being written."""
        deadline = time.monotonic() + base.IO_TIMEOUT_S
        while True:
            count, busy = await self._run(self._exists, keys)
            if not busy or time.monotonic() > deadline:
                return count
            await asyncio.sleep(_POLL_S)

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
                    data = torch.frombuffer(bytes_of(obj), dtype=torch.uint8)
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

    async def close(self) -> None:
        self._threads.shutdown(wait=False)
        self.end_sessions()


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
    """The client for ``shm:///PATH``, or for ``plugin://shm``, whose address is in the configuration.

    Raises:
        StoreUnavailable: the store does not answer.
        ValueError: there is no address, or none that is understood.
    """
    if not url.startswith(SCHEME):
        url = os.environ.get(URL_VARIABLE) or local_cpu_backend.config.get_extra_config_value(URL_KEY, "")
    path = url.removeprefix(SCHEME)
    if not url.startswith(SCHEME) or not path.startswith("/") or path.endswith("/"):
        raise ValueError(f"{URL_VARIABLE} or {URL_KEY} is {url!r}: allowed: {SCHEME}/PATH of the server's socket")
    return ShmStoreConnector(url, lambda: connect_to(path, base.CONNECT_TIMEOUT_S), loop, local_cpu_backend)
