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

import ctypes
import itertools
import os
import re
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Protocol

import torch
from lmcache.logging import init_logger

from disagg_prefill_lmcache_v1.kv.layout import KVMover
from disagg_prefill_lmcache_v1.kv.stores.base import Fetch, Store

logger = init_logger(__name__)

THREADS_VARIABLE = "DISAGG_KV_COPY_THREADS"
DEFAULT_COPY_THREADS = 2
# Chunks that are staged with one call: few calls, and the first chunk need not wait for memory for the last.
STAGE_AT_ONCE = 8
# Device memory for chunks between the KV cache and the host. The engine waits only when all of it is on its way.
DEVICE_STAGING_BYTES = 512 << 20


class Written(Protocol):
    """The end of a copy: ``synchronize`` waits for it."""

    def synchronize(self) -> Any: ...


class HostCopy:
    """Copies chunks on the CPU, several at a time: for KV caches in host memory, and devices without streams of ours.

    Args:
        threads: copies at a time (``DISAGG_KV_COPY_THREADS``). One core cannot use all of the memory's bandwidth, and
            the engine waits meanwhile.

    Raises:
        ValueError: the variable is not a number of threads.
    """

    def __init__(self, mover: KVMover, threads: int | None = None) -> None:
        self._mover = mover
        # on a device the copy must be on the stream of the thread that computes
        here = mover.device.type != "cpu"
        self._threads = None if here else ThreadPoolExecutor(threads or copy_threads(), thread_name_prefix="kv-copy")
        self._pending: list[Future[None]] = []

    def use_memory(self, regions: Iterable[tuple[int, int]]) -> None:
        pass

    def begin(self, slots: torch.Tensor) -> Any:
        return slots if self._mover.device.type != "cpu" else slots.cpu()

    def gather(self, chunk: torch.Tensor, slots: Any, start: int, end: int) -> Written:
        """Copy the tokens ``start`` to ``end`` of ``slots`` into ``chunk``."""
        return self._start(self._mover.gather, chunk, slots[start:end])

    def scatter(self, chunk: torch.Tensor, skip: int, slots: Any, start: int, end: int) -> Written:
        """Copy all but the first ``skip`` tokens of ``chunk`` to the tokens ``start`` to ``end`` of ``slots``."""
        return self._start(self._mover.scatter, chunk[:, :, skip:], slots[start:end])

    def _start(self, move: Callable[[torch.Tensor, torch.Tensor], None], chunk: torch.Tensor, slots: Any) -> Written:
        if self._threads is None:
            move(chunk, slots)
            return _Copied(None)
        future = self._threads.submit(torch.inference_mode()(move), chunk, slots)
        self._pending.append(future)
        return _Copied(future)

    def finish(self) -> None:
        """Wait until the KV cache may be used again. Raises what a copy has raised."""
        pending, self._pending = self._pending, []
        wait(pending)
        for future in pending:
            future.result()


class _Copied:
    def __init__(self, future: Future[None] | None) -> None:
        self._future = future

    def synchronize(self) -> None:
        if self._future is not None:
            self._future.result()


def copy_threads() -> int:
    """``DISAGG_KV_COPY_THREADS``, by default 2, or 1 on one core."""
    text = os.environ.get(THREADS_VARIABLE, "") or str(min(DEFAULT_COPY_THREADS, os.cpu_count() or 1))
    if not re.fullmatch("[0-9]{1,3}", text) or not 1 <= int(text) <= 256:
        raise ValueError(f"{THREADS_VARIABLE}={text!r}: allowed: a whole number from 1 to 256")
    return int(text)


class CudaCopy:
    """Copies chunks on the device's streams; nothing here waits on the CPU.

    Gather and scatter run on vLLM's own stream, so that nothing overtakes its writes and reads of the KV cache; the
    copies to and from the host run on streams of their own, through a ring of staging chunks on the device.

    Args:
        tokens: of a whole chunk.
    """

    def __init__(self, mover: KVMover, tokens: int, staging_bytes: int = DEVICE_STAGING_BYTES) -> None:
        self._mover = mover
        count = max(2, staging_bytes // (mover.shape(tokens).numel() * mover.dtype.itemsize))
        whole = mover.shape(tokens)
        self._ring = [torch.empty(whole, dtype=mover.dtype, device=mover.device) for _ in range(count)]
        self._views = [mover.row_views(staging) for staging in self._ring]
        # per staging chunk: when it may be written again
        self._free: list[torch.cuda.Event | None] = [None] * count
        self._turn = itertools.cycle(range(count))
        self._to_host = torch.cuda.Stream(mover.device)
        self._to_device = torch.cuda.Stream(mover.device)
        self._registered: dict[int, int] = {}

    def finish(self) -> None:
        """The device's stream knows by itself when to go on."""

    def use_memory(self, regions: Iterable[tuple[int, int]]) -> None:
        """Let the device read and write host memory directly, (address, bytes) each; from now on no other."""
        regions = list(regions)
        for address in self._registered.keys() - dict(regions).keys():
            torch.cuda.synchronize(self._mover.device)
            torch.cuda.cudart().cudaHostUnregister(address)
            del self._registered[address]
        for address, size in regions:
            if self._registered.get(address) == size or _is_pinned(address):
                continue
            code = torch.cuda.cudart().cudaHostRegister(address, size, 0)
            if int(code) == 0:
                self._registered[address] = size
            else:
                logger.warning("%d MiB of host memory cannot be registered (%s): copies are slower", size >> 20, code)

    def _staging(self, turn: int, shape: torch.Size) -> tuple[torch.Tensor, list[list[torch.Tensor]]]:
        staging = self._ring[turn]
        if shape == staging.shape:
            return staging, self._views[turn]
        staging = staging.view(-1)[: shape.numel()].view(shape)
        return staging, self._mover.row_views(staging)

    def begin(self, slots: torch.Tensor) -> Any:
        return self._mover.rows_of(slots.to(self._mover.device, non_blocking=True))

    def gather(self, chunk: torch.Tensor, rows: Any, start: int, end: int) -> Written:
        compute = torch.cuda.current_stream(self._mover.device)
        turn = next(self._turn)
        if (free := self._free[turn]) is not None:
            compute.wait_event(free)
        staging, views = self._staging(turn, chunk.shape)
        self._mover.move_rows(views, rows[:, start:end], to_cache=False)
        self._to_host.wait_stream(compute)
        with torch.cuda.stream(self._to_host):
            chunk.copy_(staging, non_blocking=True)
            written = torch.cuda.Event(blocking=True)
            written.record()
        self._free[turn] = written
        return written

    def scatter(self, chunk: torch.Tensor, skip: int, rows: Any, start: int, end: int) -> Written:
        compute = torch.cuda.current_stream(self._mover.device)
        turn = next(self._turn)
        if (free := self._free[turn]) is not None:
            self._to_device.wait_event(free)
        staging, views = self._staging(turn, chunk.shape)
        with torch.cuda.stream(self._to_device):
            staging.copy_(chunk, non_blocking=True)
            read = torch.cuda.Event(blocking=True)
            read.record()
        compute.wait_event(read)
        if skip:
            views = self._mover.row_views(staging[:, :, skip:])
        self._mover.move_rows(views, rows[:, start:end], to_cache=True)
        self._free[turn] = torch.cuda.Event()
        self._free[turn].record(compute)
        return read


def _is_pinned(address: int) -> bool:
    return torch.frombuffer((ctypes.c_byte * 1).from_address(address), dtype=torch.uint8).is_pinned()


class KVTransfer:
    """Stores and loads requests; takes the place of ``store`` and ``retrieve`` of LMCache's engine.

    Args:
        engine: LMCache's.
        copy: HostCopy or CudaCopy.
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
    ) -> None:
        self._engine, self._mover, self._copy, self._store = engine, mover, copy, store
        self._submitted, self._done = submitted, done
        self._puts_fail = False
        self._putters = ThreadPoolExecutor(store.links, thread_name_prefix="kv-put")
        self._releaser = ThreadPoolExecutor(1, thread_name_prefix="kv-release")
        copy.use_memory(store.memory())
        if hasattr(store, "on_remap"):  # its memory is another one after a restart
            store.on_remap = lambda: copy.use_memory(store.memory())

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
            slots = self._copy.begin(kwargs["slot_mapping"])
            left = chunks
            while left:
                count = self._store_some(left[:STAGE_AT_ONCE], slots)
                if not count:  # of no use without those before them
                    for _, _, key in left:
                        self._done(key)
                    break
                left = left[count:]
            self._copy.finish()
        stored = sum(end - start for start, end, _ in chunks[: len(chunks) - len(left)])
        engine.stats_monitor.on_store_finished(stats, stored)
        logger.info(
            "[req_id=%s] Storing %d of %d tokens; the engine was held %.2f ms",
            kwargs.get("req_id"), stored, len(tokens), stats.time_to_store() * 1000,
        )  # fmt: skip

    def _store_some(self, chunks: list[tuple[int, int, Any]], slots: Any) -> int:
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
                    written = self._copy.gather(tensor, slots, start, end)
                except BaseException:
                    self._store.abandon(keys[count:], tensors[count:])
                    raise
                self._putters.submit(self._put, key, tensor, written)
            elif there:
                self._done(key)
            else:
                logger.warning("KV is not stored: the store has no room")
                self._store.abandon(keys[count + 1 :], tensors[count + 1 :])
                break
            count += 1
        return count

    def _put(self, key: Any, tensor: torch.Tensor, written: Written) -> None:
        try:
            try:
                written.synchronize()
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
            kwargs: ``slot_mapping`` ``[tokens]`` int64, ``vllm_cached_tokens`` (not written: their blocks may be in
                use), ``request_configs``, ``req_id``.

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
        slots = self._copy.begin(mapping)
        try:
            fetch = self._store.fetch([key for _, _, key in chunks])
        except Exception as error:
            logger.warning("KV is not loaded: %s", error)
            return
        try:
            for index, tensor in fetch:
                start, end, _ = chunks[index]
                first = max(start, cached)
                whole = tensor.shape == self._mover.shape(end - start)
                # Blocks that vLLM had cached may be shared with running requests: only later tokens are written.
                if whole and first < end:
                    read = self._copy.scatter(tensor, first - start, slots, first, end)
                    # its memory may be what the next chunk is waiting for
                    self._releaser.submit(self._release, fetch, index, read)
                else:
                    fetch.done(index)
                arrived[index] = whole
            self._copy.finish()
        finally:
            self._releaser.submit(fetch.close)  # after the chunks: it is one thread

    @staticmethod
    def _release(fetch: Fetch, index: int, read: Written) -> None:
        try:
            read.synchronize()
        finally:
            fetch.done(index)

    def close(self) -> None:
        self._putters.shutdown(wait=False, cancel_futures=True)
        self._releaser.shutdown(wait=False)
