"""Both sides of the KV connector, on LMCache's real bookkeeping, without servers, stores or devices."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed: its connector interface is what is tested")
pytest.importorskip("lmcache", reason="LMCache is not installed: its connector is what is tested")

from lmcache.integration.vllm.vllm_v1_adapter import LMCacheConnectorV1Impl, LoadSpec, ReqMeta

from disagg_prefill_lmcache_v1.kv.connector import LMCacheDisaggConnectorV1
from disagg_prefill_lmcache_v1.kv.load_scheduler import LoadScheduler
from disagg_prefill_lmcache_v1.kv.meter import Meter
from disagg_prefill_lmcache_v1.kv.policy import LoadPolicy
from disagg_prefill_lmcache_v1.kv.scheduler import DisaggScheduler
from disagg_prefill_lmcache_v1.kv.worker import DisaggWorker

BLOCK, CHUNK = 32, 64


class Heard:
    """An announcer that keeps what was said."""

    def __init__(self):
        self.said = []

    def __bool__(self):
        return True

    def begin(self, request_id):
        self.said.append(("begin", request_id))

    def end(self, request_id, rank, ranks, state, reason="", transfer_ms=0.0):
        self.said.append(("end", request_id, state, reason))

    def reused(self, request_id, tokens, scheduled_at, load_s=0.0):
        self.said.append(("reused", request_id, tokens))


def make_worker(engine, device="cpu"):
    """A worker whose engine's ``retrieve`` is what loads; no store of ours."""
    worker = object.__new__(DisaggWorker)
    engine.config = SimpleNamespace(chunk_size=CHUNK)
    engine.stats_monitor = SimpleNamespace(
        update_interval_vllm_hit_tokens=lambda n: None, update_interval_prompt_tokens=lambda n: None
    )
    if not hasattr(engine, "lookup_unpin"):
        engine.lookup_unpin = lambda request_id: None
    vars(worker).update(
        engine=engine, role="kv_consumer", saves_answers=False, meter=Meter(device), failed_blocks=set(),
        _transfer=None, _tracker=None, _loader=None, _step=None, _block_size=BLOCK, _kv_caches=[],
        _device=torch.device("cpu"),
    )  # fmt: skip
    return worker


def to_load(tokens, cached=0, name="r", slots=None):
    """LMCache's metadata for a request of which ``tokens`` are to be loaded."""
    return ReqMeta(
        name, [0] * tokens, torch.arange(tokens) if slots is None else slots, load_spec=LoadSpec(cached, tokens, True)
    )


class Lookup:
    """LMCache's lookup client: what it finds is a setting."""

    def __init__(self, found):
        self.found, self.asked = found, 0

    def lookup_cache(self, lookup_id):
        return -1

    def lookup(self, tokens, lookup_id, request_configs=None):
        self.asked += 1
        return self.found

    def clear_lookup_status(self, lookup_id):
        pass

    def supports_producer_reuse(self):
        return True


def scheduler_side(lookup, role="kv_consumer", load="always", async_load=False):
    """The connector as the scheduler has it; LMCache's half is its own, without services."""
    impl = object.__new__(LMCacheConnectorV1Impl)
    vars(impl).update(
        kv_role=role, load_specs={}, _requests_priority={}, skip_last_n_tokens=0, _max_tokens_per_load=0,
        _unfinished_requests={}, _request_trackers={}, _block_size=BLOCK, _lmcache_chunk_size=CHUNK,
        _discard_partial_chunks=False, force_skip_save=False, async_loading=False,
        config=SimpleNamespace(
            min_retrieve_tokens=0, priority_limit=None, save_decode_cache=False,
            get_extra_config_value=lambda name, default: default,
        ),
        _manager=SimpleNamespace(lookup_client=lookup, lmcache_engine=None),
    )  # fmt: skip
    connector = object.__new__(LMCacheDisaggConnectorV1)
    connector._lmcache_engine = impl
    connector._scheduler = DisaggScheduler(impl, role, LoadScheduler(LoadPolicy(load)), Heard(), async_load)
    return connector


class Scheduler:
    """LMCache's real scheduler side with a request that is new and, after a preemption, comes back."""

    def __init__(self, loads, found, prompt_len=300, role="kv_consumer"):
        self.connector = scheduler_side(Lookup(found), role, "always" if loads else "never")
        self.impl, self.loads = self.connector._lmcache_engine, self.connector._scheduler.loads
        self.request = SimpleNamespace(
            request_id="r", all_token_ids=list(range(prompt_len)), prompt_token_ids=list(range(prompt_len)),
            num_tokens=prompt_len, num_prompt_tokens=prompt_len, sampling_params=SimpleNamespace(extra_args=None),
            num_computed_tokens=0, mm_features=[], kv_transfer_params=None, status="running",
        )  # fmt: skip

    def schedule(self, cached=0, resumed=False):
        """One step that schedules the whole prompt; the metadata for the workers, and the tokens to load."""
        request, connector = self.request, self.connector
        tokens, _ = connector.get_num_new_matched_tokens(request, cached)
        again, _ = connector.get_num_new_matched_tokens(request, cached)  # it had to wait
        assert again == tokens
        connector.update_state_after_alloc(request, None, tokens)
        request.num_computed_tokens = cached + tokens
        new = SimpleNamespace(
            req_id="r", prompt_token_ids=request.prompt_token_ids, block_ids=(list(range(20)),),
            num_computed_tokens=cached + tokens, sampling_params=request.sampling_params, mm_features=[],
        )  # fmt: skip
        olds = SimpleNamespace(
            req_ids=["r"] if resumed else [], resumed_req_ids={"r"} if resumed else set(),
            new_block_ids=[(list(range(20)),)], num_computed_tokens=[cached + tokens],
        )  # fmt: skip
        output = SimpleNamespace(
            finished_req_ids=set(), scheduled_new_reqs=[] if resumed else [new], scheduled_cached_reqs=olds,
            num_scheduled_tokens={"r": request.num_tokens - cached - tokens},
        )  # fmt: skip
        return connector.build_connector_meta(output), tokens
