"""Loads that run beside the engine's steps."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from lmcache.logging import init_logger

from disagg_prefill_lmcache_v1.kv.load_scheduler import LoadRequest

logger = init_logger(__name__)

# One load alone cannot use a store's connections and a card's copy engines all the time.
LOADS_AT_ONCE = 2


class BackgroundLoader:
    """Runs loads in threads of its own; the engine's thread starts them and takes what has ended, once a step.

    On cuda a load runs on a stream of its own that begins when all the engine has handed to its stream so far is done:
    the blocks may have been another request's. It has ended when its last write to the KV cache has.

    Args:
        load: loads a request, returns the ids of the blocks that could not be loaded; called in the threads.
        device: of the KV cache. On one that is neither cpu nor cuda a load runs at once, in the engine's thread.
    """

    def __init__(self, load: Callable[[LoadRequest], set[int]], device: torch.device) -> None:
        self._load = load
        self._device = device
        self._stream = threading.local()
        self._ended: deque[tuple[LoadRequest, set[int]]] = deque()
        beside = device.type in ("cpu", "cuda")
        self._threads = ThreadPoolExecutor(LOADS_AT_ONCE, thread_name_prefix="kv-load") if beside else None

    def start(self, requests: Iterable[LoadRequest]) -> None:
        """Begin to load; every request comes out of :meth:`take` once, whatever happens."""
        begin = None
        for request in requests:
            if self._threads is None:
                self._run(request, None)
                continue
            if begin is None and self._device.type == "cuda":
                begin = torch.cuda.Event()
                begin.record(torch.cuda.current_stream(self._device))
            self._threads.submit(self._run, request, begin)

    def take(self) -> list[tuple[LoadRequest, set[int]]]:
        """Loads that have ended since the last call, each with its blocks that could not be loaded."""
        return [self._ended.popleft() for _ in range(len(self._ended))]

    def _run(self, request: LoadRequest, begin: Any) -> None:
        failed = set(request.loaded_blocks)
        try:
            with self._on_own_stream(begin):
                failed = self._load(request)
        except BaseException as error:
            failed = set(request.loaded_blocks)
            logger.error("KV of request %s is not loaded: %s: %s", request.request_id, type(error).__name__, error)
        self._ended.append((request, failed))

    @contextlib.contextmanager
    def _on_own_stream(self, begin: Any) -> Iterator[None]:
        if begin is None:
            yield
            return
        stream = getattr(self._stream, "value", None)
        if stream is None:
            torch.cuda.set_device(self._device)  # a thread begins with the first card
            stream = self._stream.value = torch.cuda.Stream(self._device)
        stream.wait_event(begin)
        try:
            with torch.cuda.stream(stream):
                yield
        finally:
            stream.synchronize()

    def close(self) -> None:
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
