"""What an engine asks of ``lmcache server``, with waits that end when the server has stopped answering.

LMCache's worker waits for four of the server's replies inside the engine's step, up to ``lmcache.mp.mq_timeout``
whatever its own heartbeat says, and does not catch the timeout of one of them: that ends the engine. Here a wait also
ends as soon as the heartbeat has given the server up, and what timed out is failed, never raised:

- a store is told as not stored; the server may have reserved memory for it and would refuse the same chunks until that
  reservation expires (10 minutes), so the KV is kept and handed over when the late reply comes;
- a load is told as failed, and vLLM computes the prompt.

One object serves one server and one engine process; methods are called by the engine's thread and by the thread that
confirms stores (mp_confirm.py).
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from lmcache.logging import init_logger
from lmcache.v1.mp_observability.errors import LMCacheTimeoutError
from lmcache.v1.multiprocess.transfer_context import gather_paged_kv_to_cpu

logger = init_logger(__name__)

_LOOK_S = 0.1  # how often a wait looks whether the server is healthy
_LATE_S = 600.0  # a reply that is later is not awaited: LMCache's reservation has expired
_LATE_BYTES = 1 << 30  # KV kept for late replies at most
_UNANSWERED = 64  # late replies that are remembered


class Reply:
    """LMCache's future, whose waits end when ``healthy`` says no. ``on_timeout`` is told once."""

    def __init__(self, future: Any, healthy: Callable[[], bool], on_timeout: Callable[[], None] | None = None) -> None:
        self._future, self._healthy, self._on_timeout = future, healthy, on_timeout

    def __getattr__(self, name: str) -> Any:
        return getattr(self._future, name)

    def wait(self, timeout: float | None = None) -> bool:
        end = time.monotonic() + (timeout if timeout is not None else float("inf"))
        while True:
            left = end - time.monotonic()
            done = self._future.wait(timeout=max(0.0, min(_LOOK_S, left)))
            healthy = self._healthy()  # what comes after the server was given up comes too late, too
            if done and healthy:
                return True
            if left <= 0 or not healthy:
                if self._on_timeout is not None:
                    self._on_timeout()
                    self._on_timeout = None
                return False

    def result(self, timeout: float | None = None) -> Any:
        if not self.wait(timeout):
            raise LMCacheTimeoutError("the KV server does not answer")
        return self._future.result(timeout=0)


class Both:
    """Two stores of one request, as one future. LMCache forgets the first when the second is handed over."""

    def __init__(self, first: Any, second: Any) -> None:
        self._first, self._second = first, second

    def query(self) -> bool:
        return self._first.query() and self._second.query()

    def result(self, timeout: float | None = None) -> bool:
        first, second = self._first.result(timeout=timeout), self._second.result(timeout=timeout)
        return bool(first and second)


class PatientClient:
    """LMCache's ``RequestClient`` for one server; see the module's text. Calls not named here are passed on."""

    def __init__(self, client: Any, healthy: Callable[[], bool]) -> None:
        self._client, self._healthy = client, healthy
        self._latest: dict[str, Reply] = {}  # request id -> the reply that its lookup waits for
        # Keys and futures of store preparations that got no answer in time.
        self.unanswered: deque[tuple[Any, Any]] = deque(maxlen=_UNANSWERED)
        self.reservation_left = False  # the server may hold a reservation of ours that is never filled

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    # the scheduler's

    def lookup(self, key: Any, tp_size: int) -> Reply:
        return self._remember(key.request_id, self._client.lookup(key, tp_size))

    def query_prefetch_status(self, request_id: str) -> Reply:
        return self._remember(request_id, self._client.query_prefetch_status(request_id))

    def _remember(self, request_id: str, future: Any) -> Reply:
        self._latest[request_id] = reply = Reply(future, self._healthy)
        return reply

    def wait_lookup(self, request_id: str, timeout: float) -> None:
        """Sleep until the server has said something about this request's lookup, ``timeout`` seconds at most."""
        reply = self._latest.get(request_id)
        if reply is not None:
            reply.wait(timeout)

    def end_session(self, request_id: str) -> Any:
        self._latest.pop(request_id, None)
        return self._client.end_session(request_id)

    def forget(self, request_id: str) -> None:
        self._latest.pop(request_id, None)

    # the worker's, all waited for in the engine's step

    def prepare_store(self, key: Any, instance_id: int) -> Reply:
        future = self._client.prepare_store(key, instance_id)

        def give_up() -> None:
            self.reservation_left = True
            self.unanswered.append((key, future))

        return Reply(future, self._healthy, give_up)

    def commit_store(self, key: Any, instance_id: int, data: bytes) -> Reply:
        return Reply(self._client.commit_store(key, instance_id, data), self._healthy)

    def prepare_retrieve(self, key: Any, instance_id: int) -> Reply:
        return Reply(self._client.prepare_retrieve(key, instance_id), self._healthy)

    def commit_retrieve(self, key: Any, instance_id: int) -> Reply:
        return Reply(self._client.commit_retrieve(key, instance_id), self._healthy)


class GuardedWorker:
    """Makes LMCache's worker adapter survive a server that does not answer.

    Args:
        adapter: its ``LMCacheMPWorkerAdapter``, before the KV caches are registered.
        timeout_s: ``lmcache.mp.mq_timeout``.
    """

    def __init__(self, adapter: Any, timeout_s: float) -> None:
        self._adapter, self._timeout_s = adapter, timeout_s
        self._health = adapter._health_event
        self.client = adapter.req_client = PatientClient(adapter.req_client, self._health.is_set)
        self._store, adapter.submit_store_request = adapter.submit_store_request, self._submit_store
        self._retrieve, adapter.submit_retrieve_request = adapter.submit_retrieve_request, self._submit_retrieve
        self._since: dict[str, float] = {}  # transfers on their way -> begin
        self._late_bytes = 0

    def _submit_store(self, request_id: str, op: Any, event: Any, **more: Any) -> None:
        futures = self._adapter.store_futures
        earlier = futures.get(request_id)
        try:
            self._store(request_id, op, event, **more)
            if earlier is not None and futures.get(request_id) is not earlier:
                futures[request_id] = Both(earlier, futures[request_id])
        except (TimeoutError, RuntimeError, ValueError, OSError) as error:
            self._give_up(f"KV of request {request_id} is not stored: {error}")
            self._keep_late(op)

    def _submit_retrieve(self, request_id: str, op: Any, event: Any, **more: Any) -> None:
        begin = time.monotonic()
        try:
            self._retrieve(request_id, op, event, **more)
        except (TimeoutError, RuntimeError, ValueError, OSError) as error:
            self._give_up(f"KV of request {request_id} is not loaded: {error}")
            self._retrieve(request_id, op, event, **more)  # unhealthy now: it is reported as failed, nothing is sent
            return
        if time.monotonic() - begin >= self._timeout_s:
            self._give_up(f"KV of request {request_id} is not loaded: the KV server does not answer")

    def _give_up(self, reason: str) -> None:
        """Until the heartbeat finds the server and has registered the KV caches again, nothing is asked of it."""
        if self._health.is_set():
            logger.warning("%s", reason)
        self._health.clear()

    def watch_transfers(self) -> None:
        """Give the server up when a transfer that it carries out has taken longer than the deadline.

        A server that was restarted between two heartbeats knows nothing of it and would never say so.
        """
        now, waiting = time.monotonic(), {*self._adapter.store_futures, *self._adapter.retrieve_futures}
        self._since = {name: self._since.get(name, now) for name in waiting}
        if any(now - begin > self._timeout_s for begin in self._since.values()):
            self._give_up(f"{len(waiting)} KV transfers got no answer within {self._timeout_s:g} s")
        if self._adapter.store_futures and not self._health.is_set() and self._adapter.transfer_ctx is not None:
            # LMCache is about to give the blocks back; nobody may be reading them any more.
            self._adapter.transfer_ctx.flush_inflight_stores()

    def leave(self) -> None:
        """Before the adapter is shut down. A server that has a reservation of ours left must not hear of it.

        It would take the reserved memory for stored KV and serve whatever lies there.
        """
        if self.client.reservation_left and self._adapter.transfer_ctx is not None:
            self._adapter.transfer_ctx.close()
            self._adapter.transfer_ctx = None

    # late replies

    def _keep_late(self, op: Any) -> None:
        adapter = self._adapter
        while self.client.unanswered:
            key, future = self.client.unanswered.popleft()
            chunks = gather_paged_kv_to_cpu(
                adapter.kv_caches, op.flat_block_ids, adapter.blocks_in_chunk, layout_hints=adapter._layout_hints
            )
            size = sum(chunk.nbytes for chunk in chunks)
            if self._late_bytes + size <= _LATE_BYTES:
                self._late_bytes += size
                threading.Thread(target=self._finish_late, args=(key, future, chunks, size), daemon=True).start()

    def _finish_late(self, key: Any, future: Any, chunks: list[torch.Tensor], size: int) -> None:
        with contextlib.suppress(Exception):  # the server may have gone for good, or come back without its memory
            if future.wait(timeout=_LATE_S):
                context = future.result(timeout=0).context
                worker = self._adapter.transfer_ctx.engine_driven_context
                slots = worker._build_slot_tensors(context.get("slots") or [])
                for slot, index in zip(slots, context.get("chunk_indices") or [], strict=True):
                    slot.copy_(chunks[index])
                if slots:
                    self.client.commit_store(key, self._adapter.instance_id, b"").result(timeout=self._timeout_s)
                    logger.info("KV of request %s was stored late", key.request_id)
        self._late_bytes -= size
