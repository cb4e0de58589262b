"""Tells when a request's chunks have arrived in the store."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from typing import Any

from lmcache.logging import init_logger

from disagg_prefill_lmcache_v1.kv import patches
from disagg_prefill_lmcache_v1.kv.visibility import Announcer

logger = init_logger(__name__)


class PutTracker:
    """Knows which chunks are on their way to the store, and tells when a request's chunks have arrived.

    ``submitted`` and ``confirm`` are called by the engine's thread; everything else runs on LMCache's storage loop.
    """

    def __init__(self, engine: Any, announcer: Announcer, rank: int, ranks: int, wait_timeout_s: float) -> None:
        self._engine = engine
        self._loop: asyncio.AbstractEventLoop = engine.storage_manager.loop
        self._announcer = announcer
        self._rank, self._ranks = rank, ranks
        self._on_the_way: dict[Any, int] = {}
        self._arrived = asyncio.Event()
        self._timeout_s = wait_timeout_s
        self._last_reason = ""

    def submitted(self, keys: Iterable[Any]) -> None:
        keys = list(keys)
        self._loop.call_soon_threadsafe(self._add, keys)

    def _add(self, keys: list[Any]) -> None:
        for key in keys:
            self._on_the_way[key] = self._on_the_way.get(key, 0) + 1

    def done(self, key: Any) -> None:
        """A put has ended, well or not (LMCache's completion callback, on the storage loop)."""
        self._loop.call_soon_threadsafe(self._remove, key)

    def _remove(self, key: Any) -> None:
        left = self._on_the_way.get(key, 0) - 1
        if left > 0:
            self._on_the_way[key] = left
        else:
            self._on_the_way.pop(key, None)
        arrived, self._arrived = self._arrived, asyncio.Event()
        arrived.set()

    def confirm(self, request_id: str, token_ids: list[int], request_configs: dict[str, Any] | None) -> None:
        """Announce, in the background, when all chunks of the prompt are visible in the store."""
        begin = time.perf_counter()
        asyncio.run_coroutine_threadsafe(self._confirm(request_id, token_ids, request_configs, begin), self._loop)

    async def _confirm(
        self, request_id: str, token_ids: list[int], request_configs: dict[str, Any] | None, begin: float
    ) -> None:
        state, reason = "failed", ""
        try:
            keys = [
                key
                for _, _, key in self._engine.token_database.process_tokens(
                    tokens=token_ids, request_configs=request_configs
                )
            ]
            reason = await asyncio.wait_for(self._find(keys), self._timeout_s)
            state = "failed" if reason else "stored"
        except asyncio.TimeoutError:
            reason = f"KV not in the store within {self._timeout_s:g} s"
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
        if reason != self._last_reason:
            if reason:
                logger.warning("KV of request %s is not visible: %s", request_id, reason)
            else:
                logger.info("KV is visible in the store again")
            self._last_reason = reason
        transfer_ms = (time.perf_counter() - begin) * 1000
        self._announcer.end(request_id, self._rank, self._ranks, state, reason, transfer_ms)

    async def _find(self, keys: list[Any]) -> str:
        """Wait for the puts of ``keys``, look them up; returns why they are not all there, or ""."""
        waiting_for = set(keys)
        while not waiting_for.isdisjoint(self._on_the_way):
            await self._arrived.wait()
        if not self._engine.is_healthy():
            return "LMCache is unhealthy (its KV store does not answer)"
        backend = patches.remote_backend(self._engine)
        if backend is None or backend.connection is None:
            return "no connection to the KV store"
        present = await backend.connection.batched_async_contains("", keys)
        return "" if present == len(keys) else f"{len(keys) - present} of {len(keys)} chunks are not in the KV store"
