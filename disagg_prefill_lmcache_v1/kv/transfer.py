"""The way of a request's KV between vLLM's KV cache and the store, in place of LMCache's ``store`` and ``retrieve``.

LMCache goes one step after the other: it copies all chunks to the host, in the engine's step, and then sends them; it
reads all chunks and then copies them to the device. Here the steps overlap:

- store: each chunk is gathered on the device and the engine goes on; copies to the host, in the background, run while
  the next chunks are gathered, and each chunk is sent as soon as it has arrived there;
- load: chunks are read over several connections at once, each is copied to the device while the next ones arrive, and
  the forward pass waits for them on the device only.

Keys, chunks, staging memory and statistics are LMCache's. A client of the store (stores/base.py) whose staging memory
is the store itself (stores/shm.py) saves the copies in between.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from lmcache.logging import init_logger

from disagg_prefill_lmcache_v1.kv.device_copy import CopyEvent, CudaCopy, HostCopy
from disagg_prefill_lmcache_v1.kv.mover import KVMover
from disagg_prefill_lmcache_v1.kv.stores.base import Fetch, Store

logger = init_logger(__name__)

# Chunks that are staged with one call: few calls, and the first chunk need not wait for memory for the last.
STAGE_AT_ONCE = 8


class KVTransfer:
    """Stores and loads requests; takes the place of ``store`` and ``retrieve`` of LMCache's engine.

    Args:
        engine: LMCache's.
        copy: of stores; ``load_copy`` of loads, which may be made by several threads beside the engine's.
        submitted, done: called with keys when they are on their way to the store, and with each when its way has
            ended, well or not.
    """

    def __init__(
        self,
        engine: Any,
        mover: KVMover,
        copy: HostCopy | CudaCopy,
        store: Store,
        submitted: Callable[[list[Any]], None],
        done: Callable[[Any], None],
        load_copy: HostCopy | CudaCopy | None = None,
    ) -> None:
        self._engine, self._mover, self._copy, self._store = engine, mover, copy, store
        self._load_copy = load_copy or copy
        self._submitted, self._done = submitted, done
        self._puts_fail = False
        self._putters = ThreadPoolExecutor(store.links, thread_name_prefix="kv-put")
        self._releaser = ThreadPoolExecutor(1, thread_name_prefix="kv-release")
        self._use_memory()
        if hasattr(store, "on_remap"):  # its memory is another one after a restart
            store.on_remap = self._use_memory

    def _use_memory(self) -> None:
        for copy in {self._copy, self._load_copy}:
            copy.use_memory(self._store.memory())

    def _ranges(self, tokens: Any, mask: Any, request_configs: Any) -> list[tuple[int, int, Any]]:
        chunks = self._engine.token_database.process_tokens(tokens=tokens, mask=mask, request_configs=request_configs)
        return [(start, end, key) for start, end, key in chunks if end > start]

    @torch.inference_mode()
    def store(self, tokens: Any, mask: torch.Tensor | None = None, **kwargs: Any) -> None:
        """Begin to store the tokens that ``mask`` marks; returns when their blocks may be written again.

        Args:
            tokens: the request's token ids.
            mask: ``[tokens]`` bool, False for a beginning of whole chunks that is stored already.
            kwargs: ``slot_mapping`` ``[tokens]`` int64, ``request_configs``, ``req_id``.
        """
        engine = self._engine
        if not engine.is_healthy():
            logger.warning("LMCache is unhealthy: KV is not stored")
            return
        if engine.is_frozen():
            return
        stats = engine.stats_monitor.on_store_request(len(tokens) if mask is None else int(mask.sum()))
        with stats.profile_process_tokens():
            chunks = self._ranges(tokens, mask, kwargs.get("request_configs"))
        self._submitted([key for _, _, key in chunks])
        with stats.profile_from_gpu():
            job = self._copy.begin(kwargs["slot_mapping"])
            left = chunks
            while left:
                count = self._store_some(left[:STAGE_AT_ONCE], job)
                if not count:  # of no use without those before them
                    for _, _, key in left:
                        self._done(key)
                    break
                left = left[count:]
            self._copy.finish(job)
        stored = sum(end - start for start, end, _ in chunks[: len(chunks) - len(left)])
        engine.stats_monitor.on_store_finished(stats, stored)
        logger.info(
            "[req_id=%s] Storing %d of %d tokens; the engine was held %.2f ms",
            kwargs.get("req_id"), stored, len(tokens), stats.time_to_store() * 1000,
        )  # fmt: skip

    def _store_some(self, chunks: list[tuple[int, int, Any]], job: Any) -> int:
        """Store as many as there is memory for now; returns how many, 0 if there will be none."""
        keys = [key for _, _, key in chunks]
        try:
            shapes = [self._mover.shape(end - start) for start, end, _ in chunks]
            tensors, present = self._store.stage(keys, shapes, self._mover.dtype)
        except Exception as error:
            logger.warning("KV is not stored: %s", error)
            return 0
        count = 0
        for (start, end, key), tensor, there in zip(chunks, tensors, present, strict=False):
            if tensor is not None:
                try:
                    copied = self._copy.gather(tensor, job, start, end)
                except BaseException:
                    self._store.abandon(keys[count:], tensors[count:])
                    raise
                self._putters.submit(self._put, key, tensor, copied)
            elif there:
                self._done(key)
            else:
                logger.warning("KV is not stored: the store has no room")
                self._store.abandon(keys[count + 1 :], tensors[count + 1 :])
                break
            count += 1
        return count

    def _put(self, key: Any, tensor: torch.Tensor, copied: CopyEvent) -> None:
        try:
            try:
                copied.synchronize()
            except BaseException:
                self._store.abandon([key], [tensor])
                raise
            self._store.commit([key], [tensor])
            self._puts_fail = False
        except Exception as error:
            if not self._puts_fail:  # a dead store is told once, not for every chunk
                logger.error("KV is not stored: %s", error)
            self._puts_fail = True
        finally:
            self._done(key)

    @torch.inference_mode()
    def retrieve(self, tokens: Any, mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        """Load the tokens that ``mask`` marks; the device's stream goes on when they are in the KV cache.

        Args:
            tokens, mask: as for :meth:`store`.
            kwargs: ``slot_mapping`` ``[tokens]`` int64, or shorter: what lies behind has no room in the KV cache and is
                not written; ``vllm_cached_tokens`` (not written: their blocks may be in use), ``request_configs``,
                ``req_id``.

        Returns:
            ``[tokens]`` bool: loaded, from the first on without a gap.
        """
        engine = self._engine
        loaded = torch.zeros(len(tokens), dtype=torch.bool)
        if not engine.is_healthy():
            logger.warning("LMCache is unhealthy: KV is not loaded")
            return loaded
        wanted = len(tokens) if mask is None else int(mask.sum())
        stats = engine.stats_monitor.on_retrieve_request(wanted)
        with stats.profile_process_tokens():
            chunks = self._ranges(tokens, mask, kwargs.get("request_configs"))
        arrived = [False] * len(chunks)
        if chunks:
            with stats.profile_to_gpu():
                self._load(chunks, arrived, kwargs["slot_mapping"], int(kwargs.get("vllm_cached_tokens", 0)))
        for (start, end, _), there in zip(chunks, arrived, strict=True):
            if not there:
                break
            loaded[start:end] = True
        count = int(loaded.sum())
        engine.stats_monitor.on_retrieve_finished(stats, torch.tensor(count))
        logger.info(
            "[req_id=%s] Loaded %d of %d tokens in %.2f ms",
            kwargs.get("req_id"), count, wanted, stats.time_to_retrieve() * 1000,
        )  # fmt: skip
        return loaded

    def _load(
        self, chunks: list[tuple[int, int, Any]], arrived: list[bool], mapping: torch.Tensor, cached: int
    ) -> None:
        try:
            fetch = self._store.fetch([key for _, _, key in chunks])
        except Exception as error:
            logger.warning("KV is not loaded: %s", error)
            return
        copy, room = self._load_copy, len(mapping)
        job = copy.begin(mapping)
        try:
            for index, tensor in fetch:
                start, end, _ = chunks[index]
                # Blocks that vLLM had cached may be shared with running requests: only later tokens are written.
                first, last = max(start, cached), min(end, room)
                whole = tensor.shape == self._mover.shape(end - start)
                if whole and first < last:
                    read = copy.scatter(tensor, first - start, job, first, last)
                    # its memory may be what the next chunk is waiting for
                    self._releaser.submit(self._release, fetch, index, read)
                else:
                    fetch.done(index)
                arrived[index] = whole
        finally:
            try:
                copy.finish(job)  # whatever happened: nothing may write to these blocks later
            finally:
                self._releaser.submit(fetch.close)  # after the chunks: it is one thread

    @staticmethod
    def _release(fetch: Fetch, index: int, read: CopyEvent) -> None:
        try:
            read.synchronize()
        finally:
            fetch.done(index)

    def close(self) -> None:
        self._putters.shutdown(wait=False, cancel_futures=True)
        self._releaser.shutdown(wait=False)
