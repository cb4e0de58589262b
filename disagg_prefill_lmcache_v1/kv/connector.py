"""The KV connector of both servers: LMCache's ``LMCacheConnectorV1`` with what disaggregated prefill needs.

vLLM loads the class through its documented seam, ``kv_connector_module_path`` in ``--kv-transfer-config``. On every
device the engine, the YAML and the store are LMCache's own; added here are

- on the CPU, where LMCache has none, and on CUDA where its kernels do not load, the copy between vLLM's KV cache and
  chunks (layout.py). On HPU, and on CUDA otherwise, it is LMCache's own, on streams that wait for vLLM's;
- loads that depend on nothing but the step's metadata, beside the engine's steps where that is right or quicker
  (loader.py); what could not be loaded is always reported, so vLLM recomputes it. LMCache compares counts and misses
  some when part of the prompt was cached in vLLM;
- the last, part-filled chunk of every prompt is stored. LMCache leaves it out when prefill ran in several steps or
  started from a cached prefix;
- word of when a request's KV is visible in the store (visibility.py);
- store clients with acknowledgements, deadlines and reconnection (stores/);
- loading is a choice for each request, made from measured times (policy.py, meter.py);
- a clear error at start for what would corrupt: MLA, quantised KV, unknown layouts, an unreachable store.

The two sides are scheduler.py and worker.py; what they reach into or replace of LMCache and vLLM is in patches.py.
"""

from __future__ import annotations

from typing import Any

import torch
from lmcache.integration.vllm.lmcache_connector_v1 import LMCacheConnectorV1Dynamic
from lmcache.logging import init_logger
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.v1.core.sched.output import SchedulerOutput

from disagg_prefill_lmcache_v1.kv import patches
from disagg_prefill_lmcache_v1.kv.ending import process_ends_on_error
from disagg_prefill_lmcache_v1.kv.load_scheduler import LoadScheduler
from disagg_prefill_lmcache_v1.kv.meter import LoadMetrics, LoadStats
from disagg_prefill_lmcache_v1.kv.policy import LoadPolicy
from disagg_prefill_lmcache_v1.kv.scheduler import DisaggScheduler
from disagg_prefill_lmcache_v1.kv.settings import from_environment
from disagg_prefill_lmcache_v1.kv.support import choose_async_load, choose_copy, refuse_model
from disagg_prefill_lmcache_v1.kv.visibility import Announcer
from disagg_prefill_lmcache_v1.kv.worker import DisaggWorker

logger = init_logger(__name__)


class LMCacheDisaggConnectorV1(LMCacheConnectorV1Dynamic):
    """See the module's text. The name must contain "LMCache": the Gaudi plugin looks for it.

    Raises (at server start, and the process ends):
        UnsupportedKVLayout, StoreUnavailable, ValueError: with what to change.
    """

    _scheduler: DisaggScheduler | None = None
    _worker: DisaggWorker | None = None

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: Any = None) -> None:
        with process_ends_on_error():
            settings = from_environment()
            announcer = Announcer()
            refuse_model(vllm_config)
            async_load = choose_async_load(vllm_config, settings.async_load)
            if role == KVConnectorRole.WORKER:
                self._worker = DisaggWorker(vllm_config, settings, announcer)
                if vllm_config.device_config.device.type == "hpu":
                    patches.report_everything(self)
            else:
                choose_copy(vllm_config, settings.copy)  # refuses what cannot be copied
            super().__init__(vllm_config, role, kv_cache_config)
            saves_answers = patches.save_answers(self._lmcache_engine)
            if role == KVConnectorRole.WORKER:
                self._worker.saves_answers = saves_answers
            else:
                policy = LoadPolicy(settings.load, beside=async_load)
                loads = LoadScheduler(policy, vllm_config.parallel_config.world_size)
                kv_role = vllm_config.kv_transfer_config.kv_role
                self._scheduler = DisaggScheduler(self._lmcache_engine, kv_role, loads, announcer, async_load)
                self._scheduler.saves_answers = saves_answers
                how = "beside the engine's steps" if async_load else "in the engine's steps"
                logger.info("KV of the store is loaded: %s, %s", settings.load, how)

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: Any) -> str | None:
        """None: any. vLLM asks before it lays out the KV cache, where it fails itself, less clearly, on some models."""
        with process_ends_on_error():
            refuse_model(vllm_config)
        return super().get_required_kvcache_layout(vllm_config)

    # worker side

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        with process_ends_on_error():
            self._worker.register_kv_caches(kv_caches)
            super().register_kv_caches(kv_caches)
            self._worker.start(self._lmcache_engine)

    def bind_connector_metadata(self, connector_metadata: Any) -> None:
        super().bind_connector_metadata(connector_metadata)
        self._worker.step_begin(getattr(connector_metadata, "step", None))

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        requests = self._get_connector_metadata().requests
        impl = self._lmcache_engine
        if not (impl.use_layerwise or impl.enable_blending):
            self._worker.start_load(requests)
        elif forward_context.attn_metadata is None:  # where LMCache's own loads nothing and says nothing
            self._worker.report_unloaded(requests)
        else:
            super().start_load_kv(forward_context, **kwargs)

    def wait_for_save(self) -> None:
        requests = self._get_connector_metadata().requests
        self._worker.forward_end()
        if not self._worker.save(requests):
            super().wait_for_save()
        self._worker.step_end(requests)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        return None, self._worker.take_finished() or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._worker.take_failed_blocks() | super().get_block_ids_with_load_errors()

    def shutdown(self) -> Any:
        if self._worker is not None:
            self._worker.close()
        return super().shutdown()

    # both sides: measurements go from the workers to the scheduler, totals from there to the API server

    def get_kv_connector_stats(self) -> LoadStats | None:
        if self._worker is not None:
            return self._worker.meter.take()
        totals = self._scheduler.loads.take()
        return LoadStats(data=totals) if totals else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> LoadStats:
        return LoadStats(data=data or {})

    @classmethod
    def build_prom_metrics(cls, *args: Any) -> LoadMetrics:
        return LoadMetrics(*args)

    # scheduler side

    def on_new_request(self, request: Any) -> None:
        self._scheduler.identities.give(request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        self.on_new_request(request)  # a vLLM that does not call it, a session that goes on
        found, _ = super().get_num_new_matched_tokens(request, num_computed_tokens)
        return self._scheduler.matched(request, num_computed_tokens, found)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        super().update_state_after_alloc(request, blocks, num_external_tokens)
        self._scheduler.allocated(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> Any:
        self._scheduler.before_step(scheduler_output)
        meta = super().build_connector_meta(scheduler_output)
        self._scheduler.after_step(meta, scheduler_output)
        return meta

    def update_connector_output(self, connector_output: Any) -> None:
        self._scheduler.reported(connector_output)
        super().update_connector_output(connector_output)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        self.on_new_request(request)
        self._scheduler.finished(request.request_id)
        return super().request_finished(request, block_ids)
