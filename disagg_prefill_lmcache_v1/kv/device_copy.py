"""Copies between the KV cache, where vLLM computes, and chunks in host memory."""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple, Protocol

import torch
from lmcache.logging import init_logger

from disagg_prefill_lmcache_v1.kv.mover import KVMover

logger = init_logger(__name__)

# Device memory for chunks between the KV cache and the host. The engine waits only when all of it is on its way.
DEVICE_STAGING_BYTES = 256 << 20


class CopyEvent(Protocol):
    """The end of a copy: ``synchronize`` waits for it."""

    def synchronize(self) -> Any: ...


class HostCopy:
    """Copies chunks on the CPU, several at a time: for KV caches in host memory, and devices without streams of ours.

    Args:
        threads: copies at a time. One core cannot use all of the memory's bandwidth, and the engine waits meanwhile.
    """

    def __init__(self, mover: KVMover, threads: int = 2) -> None:
        self._mover = mover
        # on a device the copy must be on the stream of the thread that computes
        here = mover.device.type != "cpu"
        self._threads = None if here else ThreadPoolExecutor(threads, thread_name_prefix="kv-copy")

    def use_memory(self, regions: Iterable[tuple[int, int]]) -> None:
        pass

    def begin(self, slots: torch.Tensor) -> _HostJob:
        """One request's copies, to or from the tokens at ``slots`` (``[tokens]`` int64); any thread."""
        return _HostJob(slots if self._mover.device.type != "cpu" else slots.cpu(), [])

    def gather(self, chunk: torch.Tensor, job: _HostJob, start: int, end: int) -> CopyEvent:
        """Copy the tokens ``start`` to ``end`` of the slots into ``chunk``."""
        return self._start(self._mover.gather, chunk, job, start, end)

    def scatter(self, chunk: torch.Tensor, skip: int, job: _HostJob, start: int, end: int) -> CopyEvent:
        """Copy ``chunk``, from its token ``skip`` on, to the tokens ``start`` to ``end`` of the slots."""
        return self._start(self._mover.scatter, chunk[:, :, skip : skip + end - start], job, start, end)

    def _start(self, move: Callable[..., None], chunk: torch.Tensor, job: _HostJob, start: int, end: int) -> CopyEvent:
        if self._threads is None:
            move(chunk, job.slots[start:end])
            return _Copied(None)
        future = self._threads.submit(torch.inference_mode()(move), chunk, job.slots[start:end])
        job.pending.append(future)
        return _Copied(future)

    def finish(self, job: _HostJob) -> None:
        """Wait until nothing of the job reads or writes the KV cache any more. Raises what a copy has raised."""
        wait(job.pending)
        for future in job.pending:
            future.result()


class _HostJob(NamedTuple):
    slots: torch.Tensor
    pending: list[Future[None]]


class _Copied:
    def __init__(self, future: Future[None] | None) -> None:
        self._future = future

    def synchronize(self) -> None:
        if self._future is not None:
            self._future.result()


class CudaCopy:
    """Copies chunks on the device's streams; nothing here waits on the CPU.

    Gather and scatter run on the current stream: vLLM's own for what the engine's steps do, so that nothing overtakes
    their writes and reads of the KV cache, a load's own for loads beside the steps. The copies to and from the host run
    on streams of their own, through a ring of staging chunks on the device.

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
        self._lock = threading.Lock()  # a load's thread, several of them, or the engine's

    def finish(self, rows: torch.Tensor) -> None:
        """The current stream knows by itself when to go on."""

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

    def begin(self, slots: torch.Tensor) -> torch.Tensor:
        return self._mover.rows_of(slots.to(self._mover.device, non_blocking=True))

    def gather(self, chunk: torch.Tensor, rows: torch.Tensor, start: int, end: int) -> CopyEvent:
        current = torch.cuda.current_stream(self._mover.device)
        with self._lock:
            turn = next(self._turn)
            if (free := self._free[turn]) is not None:
                current.wait_event(free)
            staging, views = self._staging(turn, chunk.shape)
            self._mover.move_rows(views, rows[:, start:end], to_cache=False)
            self._to_host.wait_stream(current)
            with torch.cuda.stream(self._to_host):
                chunk.copy_(staging, non_blocking=True)
                copied = torch.cuda.Event(blocking=True)
                copied.record()
            self._free[turn] = copied
        return copied

    def scatter(self, chunk: torch.Tensor, skip: int, rows: torch.Tensor, start: int, end: int) -> CopyEvent:
        current = torch.cuda.current_stream(self._mover.device)
        with self._lock:
            turn = next(self._turn)
            if (free := self._free[turn]) is not None:
                self._to_device.wait_event(free)
            staging, views = self._staging(turn, chunk.shape)
            with torch.cuda.stream(self._to_device):
                staging.copy_(chunk, non_blocking=True)
                read = torch.cuda.Event(blocking=True)
                read.record()
            current.wait_event(read)
            if end - start < chunk.shape[2]:
                views = self._mover.row_views(staging[:, :, skip : skip + end - start])
            self._mover.move_rows(views, rows[:, start:end], to_cache=True)
            self._free[turn] = torch.cuda.Event()
            self._free[turn].record(current)
        return read


def _is_pinned(address: int) -> bool:
    return torch.frombuffer((ctypes.c_byte * 1).from_address(address), dtype=torch.uint8).is_pinned()
