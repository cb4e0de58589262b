"""The KV connector of backend mp: LMCache's ``LMCacheMPConnector``, whose KV cache lies in ``lmcache server``.

The transfer, the keys and the server are LMCache's own. Added here is what disaggregated prefill promises:

- a server that is killed, frozen, restarted or full costs reuse, never an engine, an answer or more than the deadline
  (mp_client.py); so engines copy KV themselves on every device, never the server;
- word of when a request's KV can be found (mp_confirm.py, visibility.py);
- requests with other weights, of the model or of a LoRA adapter, have other keys: LMCache's know names at most;
- what a client may send never ends the engine: a ``cache_salt`` or ``kv_transfer_params`` that LMCache cannot take;
- an idle engine sleeps while it waits for a lookup. vLLM asks again and again instead, with empty steps that keep every
  core busy: on few cores the server it waits for gets no time (lookups of 10 s with two ranks);
- loading is a choice for each request (policy.py), and what was loaded is counted (meter.py).
"""

from __future__ import annotations

import os
import time
import uuid
from typing import Any

from lmcache.integration.vllm.lmcache_mp_connector import LMCacheMPConnector
from lmcache.integration.vllm.lmcache_mp_metadata import LMCacheMPRequestState
from lmcache.logging import init_logger
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

from disagg_prefill_lmcache_v1.kv import patches
from disagg_prefill_lmcache_v1.kv.ending import process_ends_on_error
from disagg_prefill_lmcache_v1.kv.fingerprint import digest, model_fingerprint
from disagg_prefill_lmcache_v1.kv.identity import Identities
from disagg_prefill_lmcache_v1.kv.load_scheduler import LoadScheduler
from disagg_prefill_lmcache_v1.kv.meter import LoadMetrics, LoadStats, Meter
from disagg_prefill_lmcache_v1.kv.mp_client import GuardedWorker, PatientClient
from disagg_prefill_lmcache_v1.kv.mp_confirm import Confirmer, Stored
from disagg_prefill_lmcache_v1.kv.policy import LoadPolicy
from disagg_prefill_lmcache_v1.kv.reuse import ReuseAccount
from disagg_prefill_lmcache_v1.kv.settings import from_environment
from disagg_prefill_lmcache_v1.kv.support import refuse_model
from disagg_prefill_lmcache_v1.kv.visibility import Announcer

logger = init_logger(__name__)

TIMEOUT_KEY, HEARTBEAT_KEY = "lmcache.mp.mq_timeout", "lmcache.mp.heartbeat_interval"
MODE_KEY, MODE_VARIABLE = "lmcache.mp.mp_transfer_mode", "LMCACHE_MP_TRANSFER_MODE"
DEFAULT_TIMEOUT_S = 10.0
# A frozen server is given up after two heartbeats at most: within the deadline.
HEARTBEATS = 3
# An idle scheduler waits this long for a lookup before it lets other requests in.
IDLE_WAIT_S = 0.05
_POLL_S = 0.001


def take_deadline(vllm_config: Any) -> float:
    """Seconds that the server may take for a reply (``lmcache.mp.mq_timeout``, 10 unless it is given), set for LMCache.

    Raises:
        ValueError: it is not a number above 0.
    """
    extra = vllm_config.kv_transfer_config.kv_connector_extra_config
    try:
        seconds = float(extra.get(TIMEOUT_KEY, DEFAULT_TIMEOUT_S))
    except (TypeError, ValueError):
        seconds = -1.0
    if not 0 < seconds < 3600:
        allowed = "a number of seconds above 0 and below 3600 is allowed"
        raise ValueError(f"kv_connector_extra_config {TIMEOUT_KEY}={extra[TIMEOUT_KEY]!r}: {allowed}")
    extra[TIMEOUT_KEY] = seconds
    extra.setdefault(HEARTBEAT_KEY, seconds / HEARTBEATS)
    if MODE_VARIABLE not in os.environ:
        # Otherwise the server copies, on CUDA: after a freeze it goes on with transfers that were given up, and reads
        # and writes blocks that belong to other requests by then.
        extra.setdefault(MODE_KEY, "engine_driven")
    return seconds


class LMCacheDisaggMPConnector(LMCacheMPConnector):
    """See the module's text. The name must contain "LMCache": the Gaudi plugin looks for it.

    Raises (at server start):
        ValueError, ConnectionError: with what to change.
    """

    _load_scheduler: LoadScheduler | None = None  # the scheduler's
    _meter: Meter | None = None  # the worker's
    _confirmer: Confirmer | None = None

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any = None) -> None:
        with process_ends_on_error():
            refuse_model(vllm_config)
            timeout_s = take_deadline(vllm_config)
            super().__init__(vllm_config, role, kv_cache_config)
            self._announcer = Announcer()
            self._ranks = vllm_config.parallel_config.world_size
            if role == KVConnectorRole.WORKER:
                self._start_worker(vllm_config, timeout_s)
            else:
                self._start_scheduler(vllm_config)

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: Any) -> str | None:
        """None: any. vLLM asks before it lays out the KV cache, where it fails itself, less clearly, on some models."""
        with process_ends_on_error():
            refuse_model(vllm_config)
        return super().get_required_kvcache_layout(vllm_config)

    def _start_worker(self, vllm_config: Any, timeout_s: float) -> None:
        device = vllm_config.device_config.device.type
        if device == "cpu":
            patches.survive_seeded_requests()
        elif device == "hpu":
            patches.report_everything(self)
        self._meter = Meter(device)
        self._guard = GuardedWorker(self.worker_adapter, timeout_s)
        self._loads: dict[str, tuple[str, float, int, set[int]]] = {}
        if self._announcer and self._can_store and vllm_config.parallel_config.rank == 0:
            self._confirmer = Confirmer(self.worker_adapter, self._announcer, from_environment().wait_timeout)

    def _start_scheduler(self, vllm_config: Any) -> None:
        self._idle = True
        self._held: set[str] = set()  # finished requests whose blocks wait for the workers' word
        self._fingerprint, self._identities = model_fingerprint(vllm_config), Identities()
        self._reuse = ReuseAccount(self._announcer, self._ranks, beside=True)
        policy = LoadPolicy(from_environment().load, beside=True)
        self._load_scheduler = LoadScheduler(policy, self._ranks)
        adapter = self.scheduler_adapter
        self._clients = [PatientClient(c, lambda: adapter.is_healthy) for c in adapter.req_clients.values()]
        adapter.req_clients = dict(zip(adapter.req_clients, self._clients, strict=True))

    # worker side

    def register_kv_caches(self, kv_caches: Any) -> None:
        with process_ends_on_error():
            super().register_kv_caches(kv_caches)

    def bind_connector_metadata(self, connector_metadata: Any) -> None:
        super().bind_connector_metadata(connector_metadata)
        if self._meter:
            self._meter.step_begin(getattr(connector_metadata, "step", None))

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        metadata, begin = self._get_connector_metadata(), time.perf_counter()
        super().start_load_kv(forward_context, **kwargs)
        step = getattr(metadata, "step", None)
        for request in metadata.requests:
            if request.direction == "RETRIEVE":
                op = request.op
                tokens = op.end - op.start - op.skip_first_n_tokens
                name = f"{step.number if step else 0}:{request.request_id}"
                self._loads[request.request_id] = (name, begin, tokens, set(op.flat_block_ids))

    def wait_for_save(self) -> None:
        if self._meter:
            self._meter.step_end()
        super().wait_for_save()
        for stored in getattr(self._get_connector_metadata(), "completed", ()):
            if self._confirmer:
                self._confirmer.confirm(stored)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        self._guard.watch_transfers()
        sent, received = super().get_finished(finished_req_ids)
        times, used = {}, {}
        for request_id in received or ():
            if request_id in self._loads:
                name, begin, tokens, blocks = self._loads.pop(request_id)
                complete = blocks.isdisjoint(self.worker_adapter.error_block_ids)
                times[name] = [time.perf_counter() - begin, 1, tokens if complete else 0]
                used[request_id] = [0.0, 1, tokens if complete else 0]
        self._load_stats = LoadStats(data={"load_times": times, "used_tokens": used}) if times else None
        return sent, received

    def shutdown(self) -> None:
        if self._confirmer:
            self._confirmer.close()
        if self.role == KVConnectorRole.WORKER:
            self._guard.leave()
        super().shutdown()

    # both sides: measurements go from the workers to the scheduler, totals from there to the API server

    _load_stats: LoadStats | None = None

    def get_kv_connector_stats(self) -> LoadStats | None:
        if self._meter is not None:
            stats, self._load_stats = self._load_stats, None
            measured = self._meter.take()
            return stats.aggregate(measured) if stats and measured else stats or measured
        totals = self._load_scheduler.take() if self._load_scheduler else {}
        return LoadStats(data=totals) if totals else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> LoadStats:
        return LoadStats(data=data or {})

    @classmethod
    def build_prom_metrics(cls, *args: Any) -> LoadMetrics:
        return LoadMetrics(*args)

    # scheduler side

    def update_connector_output(self, connector_output: Any) -> None:
        stats = connector_output.kv_connector_stats
        if self._load_scheduler and isinstance(stats, LoadStats):
            self._load_scheduler.observe(stats.data)
            self._reuse.loaded(stats.data.get("used_tokens", {}))
            connector_output.kv_connector_stats = None  # the totals follow by get_kv_connector_stats
        # A request that was aborted while it loaded is freed when the load is reported; vLLM ends the engine when it
        # is then reported as stored.
        self._held -= set(connector_output.finished_recving or ())
        sent = self._held & set(connector_output.finished_sending or ())
        self._held -= sent
        connector_output.finished_sending = sent
        super().update_connector_output(connector_output)

    def _get_or_create_request_tracker(self, request: Any) -> Any:
        known = self.request_trackers.get(request.request_id)
        tracker = super()._get_or_create_request_tracker(request)
        if tracker is not known:
            salt = cache_salt_of(request, self._fingerprint, self._identities)
            tracker.cache_salt = salt or uuid.uuid4().hex  # nobody's
            tracker.request_configs = None  # no part of a key, and LMCache does not check them
            tracker.max_offload_tokens = 0 if salt is None or skips_save(request) else None
        return tracker

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        name = request.request_id
        found, asynchronous = super().get_num_new_matched_tokens(request, num_computed_tokens)
        end = time.monotonic() + IDLE_WAIT_S
        while found is None and self._idle and time.monotonic() < end:
            for client in self._clients:
                client.wait_lookup(name, max(0.0, end - time.monotonic()))
            found, asynchronous = super().get_num_new_matched_tokens(request, num_computed_tokens)
            if found is None:
                time.sleep(_POLL_S)  # the server is still looking
        self._reuse.looked_up(name, num_computed_tokens)
        if not found or self._load_scheduler is None or self._load_scheduler.choose(name, found):
            return found, asynchronous
        return 0, False  # LMCache gives the locks back in update_state_after_alloc

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        super().update_state_after_alloc(request, blocks, num_external_tokens)
        name = request.request_id
        if self._load_scheduler:
            self._load_scheduler.scheduled(name, num_external_tokens)
            self._reuse.scheduled(name, num_external_tokens)
            if not num_external_tokens and not self._load_scheduler.choose(name, 0):
                self.request_trackers[name].num_lmcache_hit_tokens = 0  # not loaded: LMCache counts it as computed

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        name = request.request_id
        if self._load_scheduler:
            self._load_scheduler.finished(name)
            self._reuse.finished(name)
        for client in self._clients:
            client.forget(name)
        tracker = self.request_trackers.get(name)
        if tracker is None:
            self._identities.give(request)  # what the client sent is not asked about a request that nobody knows
        elif tracker.state == LMCacheMPRequestState.PREFETCHING and tracker.num_scheduled_tokens == 0:
            self._free_locks(tracker)
        held, parameters = super().request_finished(request, block_ids)
        if held:
            self._held.add(name)
        return held, parameters

    def _free_locks(self, tracker: Any) -> None:
        """Give back what a lookup has locked for a request that never got its memory.

        LMCache leaves it locked for 5 minutes: aborted requests would fill the server with what it cannot evict.
        """
        chunk = self.scheduler_adapter.lmcache_tokens_per_chunk
        tokens = tracker.get_token_ids()
        if end := len(tokens) // chunk * chunk:
            name, salt = tracker.request_id, tracker.cache_salt
            self.scheduler_adapter.free_lookup_locks(tokens, 0, end, name, cache_salt=salt)

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        meta = super().build_connector_meta(scheduler_output)
        self._idle = scheduler_output.total_num_scheduled_tokens == 0
        if self._load_scheduler:
            meta.step = self._load_scheduler.step(self._begun(scheduler_output), scheduler_output.num_scheduled_tokens)
        if self._can_store:
            for request in scheduler_output.scheduled_new_reqs:
                self._announcer.begin(request.req_id)
            meta.completed = [s for r in scheduler_output.num_scheduled_tokens if (s := self._completed(r)) is not None]
        return meta

    def _begun(self, scheduler_output: Any) -> list[tuple[str, int, int]]:
        """Id, prompt tokens and tokens already there of requests that are new or come back in this step."""
        begun = [
            (request.req_id, len(request.prompt_token_ids or ()), request.num_computed_tokens)
            for request in scheduler_output.scheduled_new_reqs
        ]
        cached = scheduler_output.scheduled_cached_reqs
        for request_id in cached.resumed_req_ids:
            tracker = self.request_trackers[request_id]
            computed = cached.num_computed_tokens[cached.req_ids.index(request_id)]
            begun.append((request_id, tracker.num_prompt_tokens, computed))
        return begun

    def _completed(self, request_id: str) -> Stored | None:
        """What is to be confirmed of a request whose prefill this step completes; one without a store is announced."""
        tracker = self.request_trackers.get(request_id)
        if tracker is None or getattr(tracker, "announced", False):
            return None
        there = max(tracker.num_vllm_hit_tokens, tracker.num_lmcache_hit_tokens)
        if tracker.num_scheduled_tokens + there < tracker.num_prompt_tokens:
            return None
        tracker.announced = True
        chunk = self.scheduler_adapter.lmcache_tokens_per_chunk
        end = tracker.num_prompt_tokens // chunk * chunk
        if tracker.max_offload_tokens == 0:
            self._announcer.end(request_id, 0, 1, "none")
        elif end <= tracker.num_lmcache_hit_tokens:
            self._announcer.end(request_id, 0, 1, "stored")  # was found there, or is shorter than a chunk
        else:
            return Stored(request_id, tracker.get_token_ids()[:end], end, tracker.cache_salt)
        return None


def cache_salt_of(request: Any, fingerprint: str, identities: Identities) -> str | None:
    """What keeps KV of this request apart from other requests' of the same tokens, as LMCache takes it.

    Model, adapter and the client's salt in one digest: LMCache knows a model and an adapter by name alone, and refuses
    salts with some characters or of more than 128, inside the engine, which ends it. None: it cannot be told.
    """
    identity = identities.digest(request)
    return None if identity is None else digest(fingerprint, identity)


def skips_save(request: Any) -> bool:
    """Whether the request asks not to be stored, as with the other backends (``lmcache.skip_save``)."""
    extra = getattr(getattr(request, "sampling_params", None), "extra_args", None)
    parameters = extra.get("kv_transfer_params") if isinstance(extra, dict) else None
    return isinstance(parameters, dict) and bool(parameters.get("lmcache.skip_save"))
