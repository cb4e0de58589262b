"""LMCache's interface to a store, ``RemoteConnector``, over a client's blocking methods (base.py)."""

from __future__ import annotations

import abc
import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Any, TypeVar

from lmcache.utils import CacheEngineKey
from lmcache.v1.memory_management import MemoryObj
from lmcache.v1.storage_backend.connector.base_connector import RemoteConnector

T = TypeVar("T")


class LMCacheInterface(RemoteConnector):
    """What LMCache asks of a store; a client says ``count_present``, ``batched_put``, ``batched_get`` and ``alive``.

    Args:
        local_cpu_backend: gives staging memory; its config and metadata are used.
        threads: the blocking calls of LMCache's loop run there.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, local_cpu_backend: Any, threads: Executor) -> None:
        super().__init__(local_cpu_backend.config, local_cpu_backend.metadata)
        self.loop = loop
        self.local_cpu_backend = local_cpu_backend
        self._threads = threads

    @abc.abstractmethod
    def count_present(self, keys: Sequence[CacheEngineKey]) -> int: ...

    @abc.abstractmethod
    def alive(self) -> None:
        """Raises StoreUnavailable, StoreRefused: the store does not answer."""

    async def _run(self, work: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *args)

    def support_batched_put(self) -> bool:
        return True

    def support_batched_contains(self) -> bool:
        return True

    def support_batched_get(self) -> bool:
        return True

    def support_ping(self) -> bool:
        return True

    async def put(self, key: CacheEngineKey, memory_obj: MemoryObj) -> None:
        await self.batched_put([key], [memory_obj])

    def batched_contains(self, keys: list[CacheEngineKey]) -> int:
        return self.count_present(keys)

    async def batched_async_contains(self, lookup_id: str, keys: list[CacheEngineKey], pin: bool = False) -> int:
        return await self._run(self.count_present, keys)

    async def exists(self, key: CacheEngineKey) -> bool:
        return await self._run(self.count_present, [key]) == 1

    def exists_sync(self, key: CacheEngineKey) -> bool:
        return self.count_present([key]) == 1

    async def get(self, key: CacheEngineKey) -> MemoryObj | None:
        return (await self.batched_get([key]))[0]

    async def ping(self) -> int:
        """0 when the store answers. Raises StoreUnavailable, StoreRefused: it does not.

        Not in the threads of the other calls: behind their chunks a ping would come too late, and LMCache would take a
        busy store for a dead one.
        """
        await asyncio.to_thread(self.alive)
        return 0

    async def list(self) -> list[str]:
        raise ValueError("listing the chunks of a store is not supported")
