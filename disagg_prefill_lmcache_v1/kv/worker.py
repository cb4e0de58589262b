"""The connector in a worker: loads and stores the KV of a step's requests, and reports what could not be loaded."""

from __future__ import annotations

import time
from typing import Any

import torch
from lmcache.logging import init_logger
from vllm.config import VllmConfig

from disagg_prefill_lmcache_v1.kv import patches
from disagg_prefill_lmcache_v1.kv.device_copy import CudaCopy, HostCopy
from disagg_prefill_lmcache_v1.kv.engine import make_engine
from disagg_prefill_lmcache_v1.kv.identity import not_to_be_stored
from disagg_prefill_lmcache_v1.kv.layout import UnsupportedKVLayout
from disagg_prefill_lmcache_v1.kv.load_scheduler import LoadRequest, StepMetadata
from disagg_prefill_lmcache_v1.kv.loader import BackgroundLoader
from disagg_prefill_lmcache_v1.kv.meter import Meter
from disagg_prefill_lmcache_v1.kv.put_tracker import PutTracker
from disagg_prefill_lmcache_v1.kv.reuse import used_tokens
from disagg_prefill_lmcache_v1.kv.settings import KVSettings
from disagg_prefill_lmcache_v1.kv.stores.base import Store
from disagg_prefill_lmcache_v1.kv.support import choose_copy, one_store_only
from disagg_prefill_lmcache_v1.kv.transfer import KVTransfer
from disagg_prefill_lmcache_v1.kv.visibility import Announcer

logger = init_logger(__name__)


class DisaggWorker:
    """What LMCache's worker side is extended by; called by the worker's thread.

    ``register_kv_caches`` and ``start`` at start; then, a step at a time, ``step_begin``, ``start_load``, ``save`` and
    ``step_end`` (if there is a forward pass), ``take_finished``, ``take_failed_blocks``.
    """

    def __init__(self, vllm_config: VllmConfig, settings: KVSettings, announcer: Announcer) -> None:
        self._settings = settings
        self._announcer = announcer
        self.role = vllm_config.kv_transfer_config.kv_role
        self.saves_answers = False  # a kv_consumer stores what it computes, and nobody waits for that
        self._device = torch.device(vllm_config.device_config.device)
        self._block_size = vllm_config.cache_config.block_size
        self._copy = choose_copy(vllm_config, settings.copy)
        self.meter = Meter(self._device.type)
        self.paged = make_engine(vllm_config, self._copy)
        self.engine: Any = None
        self._kv_caches: list[torch.Tensor] = []
        self._tracker: PutTracker | None = None
        self._transfer: KVTransfer | None = None
        self._loader: BackgroundLoader | None = None
        self._step: StepMetadata | None = None
        self.failed_blocks: set[int] = set()

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Learn the layout, before LMCache sees the caches.

        Raises:
            UnsupportedKVLayout: it cannot be moved, and there is no other copy.
        """
        self._kv_caches = list(kv_caches.values())
        self._device = self._kv_caches[0].device
        if self.paged is None:
            return
        try:
            self.paged.register(kv_caches)
        except UnsupportedKVLayout as error:
            if self._copy == "own":
                raise
            logger.warning("LMCache's own copy is used: %s", error)
            self.paged = None

    def start(self, impl: Any) -> None:
        """LMCache's worker side has started: take over what is ours.

        Raises:
            RuntimeError: it has not. StoreUnavailable: the KV store does not answer.
        """
        failure = patches.start_failure(impl)
        if failure is not None:
            raise RuntimeError(f"LMCache did not start: {failure}")
        engine = self.engine = impl.lmcache_engine
        backend = patches.remote_backend(engine)
        client = patches.use_own_client(backend) if backend is not None else None
        if self._announcer and backend is not None and self.role != "kv_consumer":
            rank, ranks = engine.metadata.worker_id, engine.metadata.world_size
            self._tracker = PutTracker(engine, self._announcer, rank, ranks, self._settings.wait_timeout)
            patches.watch_puts(backend, self._tracker.submitted, self._tracker.done)
        if client is not None and self.paged is not None and one_store_only(engine):
            self._transfer = self._make_transfer(client)

    def _make_transfer(self, client: Store) -> KVTransfer:
        mover, chunk = self.paged.mover, self.engine.config.chunk_size
        if mover.device.type == "cuda":
            copies: list[Any] = [CudaCopy(mover, chunk), CudaCopy(mover, chunk)]
        else:
            copies = [HostCopy(mover, self._settings.copy_threads) for _ in range(2)]
        submitted = self._tracker.submitted if self._tracker is not None else lambda keys: None
        done = self._tracker.done if self._tracker is not None else lambda key: None
        logger.info("KV is stored and loaded by %s", type(copies[0]).__name__)
        return KVTransfer(self.engine, mover, copies[0], client, submitted, done, load_copy=copies[1])

    # a step

    def step_begin(self, step: StepMetadata | None) -> None:
        self._step = step
        for request_id in step.released if step is not None else ():
            self.engine.lookup_unpin(request_id)
        self.meter.step_begin(step)

    def start_load(self, requests: list[Any]) -> None:
        """Load every request that the step's metadata says, or report its blocks as failed.

        Nothing here asks for a forward context: with full CUDA graphs there is none, and LMCache's own
        ``start_load_kv`` would return without a word.

        Args:
            requests: LMCache's ``ReqMeta``; those to be loaded now, before the forward pass, have ``can_load``.
        """
        for request in requests:
            spec = request.load_spec
            if spec is None:
                continue
            self.engine.stats_monitor.update_interval_vllm_hit_tokens(spec.vllm_cached_tokens)
            self.engine.stats_monitor.update_interval_prompt_tokens(len(request.token_ids))
            if spec.can_load:
                begin, began = self.meter.load_begin(), time.perf_counter()
                tokens, slots = request.token_ids[: spec.lmcache_cached_tokens], request.slot_mapping
                cached, configs = spec.vllm_cached_tokens, request.request_configs
                slots = slots[: spec.lmcache_cached_tokens]
                missing = self.load(request.req_id, tokens, slots, cached, configs)
                if len(tokens) < spec.lmcache_cached_tokens:  # the rest has no slots here: all of it is computed
                    missing[cached:] = True
                failed = slots[missing] // self._block_size
                seconds = time.perf_counter() - began
                self.meter.used(request.req_id, used_tokens(missing, cached, self._block_size), seconds)
                self.failed_blocks.update(failed.unique().tolist())
                self.meter.load_end(begin, request.req_id, 0 if len(failed) else len(tokens) - cached)
        if self._step is not None and self._step.loads:
            if self._loader is None:
                self._loader = BackgroundLoader(self._load_beside, self._device)
            self._loader.start(self._step.loads)

    def report_unloaded(self, requests: list[Any]) -> None:
        """Report all that was to be loaded as failed."""
        for request in requests:
            spec = request.load_spec
            if spec is not None and spec.can_load:
                slots = request.slot_mapping[spec.vllm_cached_tokens : spec.lmcache_cached_tokens]
                self.failed_blocks.update((slots // self._block_size).unique().tolist())

    def _load_beside(self, load: LoadRequest) -> set[int]:
        """A load of the loader's threads: the blocks that could not be loaded."""
        begin = time.perf_counter()
        slots = torch.tensor(load.block_ids).unsqueeze(1) * self._block_size + torch.arange(self._block_size)
        missing = self.load(
            load.request_id, load.token_ids, slots.view(-1)[: load.end], load.cached, load.request_configs
        )
        self.meter.used(load.request_id, used_tokens(missing, load.cached, self._block_size))
        tokens = 0 if bool(missing.any()) else load.end - load.cached
        self.meter.loaded(load.request_id, load.step, tokens, time.perf_counter() - begin)
        return {load.block_ids[position // self._block_size] for position in missing.nonzero().view(-1).tolist()}

    def load(
        self, request_id: str, tokens: list[int], slots: torch.Tensor, cached: int, configs: dict[str, Any] | None
    ) -> torch.Tensor:
        """Load ``tokens`` from the first that vLLM has not; never raises.

        Args:
            slots: ``[at most len(tokens)]`` int64: where they go.
            cached: tokens that vLLM has.

        Returns:
            ``[len(slots)]`` bool: should have been loaded, and was not.
        """
        chunk = self.engine.config.chunk_size
        if self._transfer is None and len(slots) < len(tokens):
            tokens = tokens[: len(slots) // chunk * chunk]  # LMCache's copies need a slot for every token of a chunk
        mask = torch.ones(len(tokens), dtype=torch.bool)
        mask[: cached // chunk * chunk] = False
        missing = torch.ones(len(slots), dtype=torch.bool)
        try:
            retrieve = self._transfer.retrieve if self._transfer is not None else self.engine.retrieve
            loaded = retrieve(
                tokens,
                mask,
                kvcaches=self._kv_caches,
                slot_mapping=slots if self._transfer is not None else slots.to(self._device),
                vllm_cached_tokens=cached,
                request_configs=configs,
                req_id=request_id,
            )
            missing[: len(tokens)] = ~loaded.cpu()[: len(slots)]
        except Exception as error:
            logger.error("KV of request %s is not loaded: %s: %s", request_id, type(error).__name__, error)
        finally:
            self.engine.lookup_unpin(request_id)
        missing[:cached] = False
        return missing

    def save(self, requests: list[Any]) -> bool:
        """Store what the step's metadata says; False: LMCache is to do it."""
        if self._transfer is None or (self.role == "kv_consumer" and not self.saves_answers):
            return False
        chunk = self.engine.config.chunk_size
        for request in requests:
            self.engine.lookup_unpin(request.req_id)
            spec, tokens, slots = request.save_spec, request.token_ids, request.slot_mapping
            if spec is None or not spec.can_save or spec.skip_leading_tokens >= len(tokens):
                continue
            if len(slots) != len(tokens):
                logger.warning(
                    "KV of request %s is not stored: %d tokens, %d slots", request.req_id, len(tokens), len(slots)
                )
                continue
            count = len(tokens) if request.is_last_prefill else len(tokens) // chunk * chunk
            mask = torch.ones(count, dtype=torch.bool)
            mask[: spec.skip_leading_tokens // chunk * chunk] = False
            self._transfer.store(
                tokens[:count],
                mask,
                slot_mapping=slots[:count],
                request_configs=request.request_configs,
                req_id=request.req_id,
            )
        return True

    def forward_end(self) -> None:
        """The forward pass is over (on a card: handed over)."""
        self.meter.step_end()

    def step_end(self, requests: list[Any]) -> None:
        """All that the step stores is on its way: announce it."""
        for request in requests if self._tracker is not None else ():
            if not_to_be_stored(request.request_configs):
                continue  # the scheduler has said so: looked up here, it would be told as failed
            # is_last_prefill stays true while decoding; only the step that had something to say about storing counts
            if request.is_last_prefill and request.save_spec is not None:
                self._tracker.confirm(request.req_id, list(request.token_ids), request.request_configs)

    def take_finished(self) -> set[str]:
        """Requests whose loads have ended; their failed blocks are then in :meth:`take_failed_blocks`.

        vLLM asks in every step. What happens in ``step_end`` would be late: a step without a forward pass has none,
        and while the only request waits for its load there is no other.
        """
        finished = set()
        for load, failed in self._loader.take() if self._loader is not None else ():
            finished.add(load.request_id)
            self.failed_blocks |= failed
        return finished

    def take_failed_blocks(self) -> set[int]:
        failed, self.failed_blocks = self.failed_blocks, set()
        return failed

    def close(self) -> None:
        if self._loader is not None:
            self._loader.close()
