"""The connector in vLLM's scheduler: what is loaded and how, what is stored, what the API server is told."""

from __future__ import annotations

from typing import Any

import torch
from lmcache.integration.vllm.utils import (
    apply_mm_hashes_to_token_ids,
    extract_mm_features,
    extract_request_configs_from_sampling_params,
)
from lmcache.logging import init_logger

from disagg_prefill_lmcache_v1.kv import patches
from disagg_prefill_lmcache_v1.kv.identity import Identities, not_to_be_stored
from disagg_prefill_lmcache_v1.kv.load_scheduler import LoadRequest, LoadScheduler
from disagg_prefill_lmcache_v1.kv.meter import LoadStats
from disagg_prefill_lmcache_v1.kv.reuse import ReuseAccount
from disagg_prefill_lmcache_v1.kv.visibility import Announcer

logger = init_logger(__name__)


class DisaggScheduler:
    """What LMCache's scheduler side (``impl``) is extended by; called by the scheduler's thread.

    Args:
        role: "kv_producer", "kv_consumer" or "kv_both".
        async_load: whether loads are asynchronous to vLLM.
    """

    def __init__(
        self, impl: Any, role: str, loads: LoadScheduler, announcer: Announcer, async_load: bool = False
    ) -> None:
        self._impl = impl
        self._role = role
        self.loads = loads
        self.identities = Identities()
        self._reuse = ReuseAccount(announcer, loads.ranks, async_load) if role != "kv_producer" else None
        self._announcer = announcer
        self._async_load = async_load
        self.saves_answers = False  # a kv_consumer stores what it computes, and nobody waits for that
        self._in_store: dict[str, int] = {}  # tokens of requests that the store had, and that are computed all the same
        self._begun: list[LoadRequest] = []  # to be told to the workers with the next step
        self._loading: dict[str, LoadRequest] = {}
        self._failed: set[str] = set()  # requests of which a load has failed: they are computed

    def matched(self, request: Any, cached: int, found: int | None) -> tuple[int | None, bool]:
        """What to tell vLLM of ``found`` tokens that the store has beyond the ``cached`` that vLLM has."""
        if self._reuse:
            self._reuse.looked_up(request.request_id, cached)
        if not found:
            return found, False
        request_id = request.request_id
        if request_id not in self._failed and self.loads.choose(request_id, found):
            return found, self._async_load
        # As if the store had nothing. LMCache wants the entry itself when the request comes back after a preemption.
        spec = self._impl.load_specs[request_id]
        if self.saves_answers:
            self._in_store[request_id] = spec.lmcache_cached_tokens
        spec.lmcache_cached_tokens, spec.can_load = 0, False
        return 0, False

    def allocated(self, request: Any, blocks: Any, external_tokens: int) -> None:
        """The request has its blocks, and ``external_tokens`` of it are to be loaded."""
        self.loads.scheduled(request.request_id, external_tokens)
        if self._reuse:
            self._reuse.scheduled(request.request_id, external_tokens)
        if not external_tokens or not self._async_load:
            return
        spec = self._impl.load_specs[request.request_id]
        end = spec.vllm_cached_tokens + external_tokens  # of a prompt that the store has whole all but the last one
        (block_ids,) = blocks.get_block_ids()
        load = LoadRequest(
            request.request_id,
            _chunk_tokens(request, spec.lmcache_cached_tokens),
            block_ids[: -(-end // self._impl._block_size)],
            spec.vllm_cached_tokens,
            spec.vllm_cached_tokens // self._impl._block_size,
            end,
            extract_request_configs_from_sampling_params(request.sampling_params),
        )
        self._begun.append(load)
        self._loading[request.request_id] = load

    def reported(self, output: Any) -> None:
        """What the workers have to say after a step (``KVConnectorOutput``)."""
        stats = output.kv_connector_stats
        if isinstance(stats, LoadStats):
            self.loads.observe(stats.data)
            if self._reuse:
                self._reuse.loaded(stats.data.get("used_tokens", {}))
            output.kv_connector_stats = None  # the totals follow by get_kv_connector_stats
        if output.invalid_block_ids and self._loading:
            for load in self._loading.values():
                if not output.invalid_block_ids.isdisjoint(load.loaded_blocks):
                    self._failed.add(load.request_id)
        for request_id in output.finished_recving or ():
            self._loading.pop(request_id, None)

    def finished(self, request_id: str) -> None:
        self.loads.finished(request_id)
        if self._reuse:
            self._reuse.finished(request_id)
        self._failed.discard(request_id)
        self._in_store.pop(request_id, None)
        self._loading.pop(request_id, None)
        self._impl.load_specs.pop(request_id, None)

    def before_step(self, scheduler_output: Any) -> None:
        """Correct what LMCache assumes to be loaded of requests whose asynchronous load has failed."""
        if not self._failed:
            return
        computed = {request.req_id: request.num_computed_tokens for request in scheduler_output.scheduled_new_reqs}
        cached = scheduler_output.scheduled_cached_reqs
        computed |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        for request_id in self._failed & self._impl.load_specs.keys() & computed.keys():
            spec, tokens = self._impl.load_specs[request_id], computed[request_id]
            if spec.lmcache_cached_tokens > tokens:
                spec.vllm_cached_tokens = tokens
                spec.lmcache_cached_tokens = tokens // self._impl._lmcache_chunk_size * self._impl._lmcache_chunk_size

    def after_step(self, meta: Any, scheduler_output: Any) -> None:
        """Add to the step's metadata what its workers compute, load and store."""
        self._add_step(meta, scheduler_output)
        if self._role == "kv_consumer":
            for request in meta.requests if self._in_store else ():
                spec, stored = request.save_spec, self._in_store.get(request.req_id, 0)
                spec.skip_leading_tokens = max(spec.skip_leading_tokens, stored)
                spec.can_save &= len(request.token_ids) > stored
            return
        trackers = self._impl._request_trackers
        said = {request.req_id: request for request in meta.requests}
        for request in scheduler_output.scheduled_new_reqs:
            self._announcer.begin(request.req_id)
            tracker = trackers.get(request.req_id)
            if tracker is not None and not_to_be_stored(tracker.request_configs):
                self._announcer.end(request.req_id, 0, 1, "none")
        for request_id in scheduler_output.num_scheduled_tokens:
            if request_id in trackers:
                tail = patches.tail_to_store(self._impl, trackers[request_id], said.get(request_id))
                if tail is not None:
                    if request_id in said:
                        meta.requests.remove(said[request_id])
                    meta.add_request(tail)

    def _add_step(self, meta: Any, scheduler_output: Any) -> None:
        begun = [
            (request.req_id, len(request.prompt_token_ids or ()), request.num_computed_tokens)
            for request in scheduler_output.scheduled_new_reqs
        ]
        cached = scheduler_output.scheduled_cached_reqs
        for request_id in cached.resumed_req_ids:
            request = self._impl._unfinished_requests[request_id]
            computed = cached.num_computed_tokens[cached.req_ids.index(request_id)]
            begun.append((request_id, request.num_prompt_tokens, computed))
        meta.step = self.loads.step(begun, scheduler_output.num_scheduled_tokens)
        meta.step.loads, self._begun = self._begun, []
        for load in meta.step.loads:
            load.step = meta.step.number


def _chunk_tokens(request: Any, count: int) -> list[int]:
    """The first ``count`` tokens of the request, as LMCache's lookup and its chunk keys take them."""
    hashes, positions = extract_mm_features(request)
    if not hashes:
        return list(request.all_token_ids[:count])
    tokens = torch.tensor(request.prompt_token_ids)
    apply_mm_hashes_to_token_ids(tokens, hashes, positions)
    return tokens.tolist()[:count]
