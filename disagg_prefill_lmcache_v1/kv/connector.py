"""The KV connector of both servers: LMCache's ``LMCacheConnectorV1`` with what disaggregated prefill needs.

vLLM loads the class through its documented seam, ``kv_connector_module_path`` in ``--kv-transfer-config``. On every
device the engine, the YAML and the store are LMCache's own; added here are

- on the CPU, where LMCache has none, and on CUDA where its kernels do not load, the copy between vLLM's KV cache and
  chunks (kv_layout.py). On HPU, and on CUDA otherwise, it is LMCache's own, on streams that wait for vLLM's;
- the last, part-filled chunk of every prompt is stored. LMCache leaves it out when prefill ran in several steps or
  started from a cached prefix;
- word of when a request's KV is visible in the store (kv_visibility.py);
- store clients with acknowledgements, deadlines and reconnection (kv_store.py);
- chunks that could not be loaded are always reported, so vLLM recomputes them. LMCache compares counts and misses
  some when part of the prompt was cached in vLLM;
- loading is a choice for each request, made from measured times (kv_policy.py, kv_meter.py);
- a clear error at start for what would corrupt: MLA, quantised KV, unknown layouts, an unreachable store.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from lmcache.integration.vllm.lmcache_connector_v1 import LMCacheConnectorV1Dynamic
from lmcache.integration.vllm.utils import ENGINE_NAME, lmcache_get_or_create_config
from lmcache.integration.vllm.vllm_service_factory import VllmServiceFactory
from lmcache.integration.vllm.vllm_v1_adapter import ReqMeta
from lmcache.logging import init_logger
from lmcache.utils import EngineType
from lmcache.v1.cache_engine import LMCacheEngineBuilder
from lmcache.v1.gpu_connector import CreateGPUConnector
from lmcache.v1.gpu_connector.gpu_connectors import GPUConnectorInterface
from lmcache.v1.memory_management import MemoryObj
from lmcache.v1.storage_backend.connector.instrumented_connector import InstrumentedRemoteConnector
from lmcache.v1.storage_backend.local_cpu_backend import LocalCPUBackend
from lmcache.v1.storage_backend.remote_backend import RemoteBackend
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

from disagg_prefill_lmcache_v1.kv import transfer as kv_transfer
from disagg_prefill_lmcache_v1.kv.fingerprint import draft_layers, model_fingerprint
from disagg_prefill_lmcache_v1.kv.identity import IdentifiedTokens, Identities, model_key
from disagg_prefill_lmcache_v1.kv.layout import BlockLayout, KVMover, UnsupportedKVLayout
from disagg_prefill_lmcache_v1.kv.meter import LoadMetrics, LoadStats, Meter
from disagg_prefill_lmcache_v1.kv.policy import LoadBook, LoadPolicy, mode_from_environment
from disagg_prefill_lmcache_v1.kv.stores import registry
from disagg_prefill_lmcache_v1.kv.stores.base import Store, StoreUnavailable
from disagg_prefill_lmcache_v1.kv.stores.client import StoreClient
from disagg_prefill_lmcache_v1.kv.stores.shm import ShmStoreConnector
from disagg_prefill_lmcache_v1.kv.visibility import Announcer, wait_timeout_s

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput

logger = init_logger(__name__)

COPY_VARIABLE = "DISAGG_KV_COPY"


class PagedKVConnector(GPUConnectorInterface):
    """LMCache's device seam over a KV cache layout that was learned; "gpu" is LMCache's word for the device.

    Args:
        heads, head_size: KV heads of this tensor parallel rank.
    """

    def __init__(self, vllm_config: VllmConfig, heads: int, head_size: int) -> None:
        self._vllm_config = vllm_config
        self._heads, self._head_size = heads, head_size
        self._mover: KVMover | None = None

    def register(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Learn the layout of the registered caches.

        Args:
            kv_caches: layer name to ``[num_blocks, ...]``, any order of heads, tokens and K/V within a block.

        Raises:
            UnsupportedKVLayout: it cannot be moved exactly.
        """
        layers = self._vllm_config.compilation_config.static_forward_context
        layouts: dict[tuple[Any, ...], BlockLayout] = {}
        learned = []
        for name, cache in kv_caches.items():
            layer = layers.get(name)
            impl = getattr(layer, "impl", None)
            if not isinstance(cache, torch.Tensor) or not hasattr(impl, "do_kv_cache_update"):
                raise UnsupportedKVLayout(f"layer {name}: {type(impl).__name__} has no KV cache update to learn from")
            isa = getattr(layer, "isa", getattr(impl, "isa", None))
            kind = (isa, type(impl), cache.shape[1:], cache.stride()[1:], cache.dtype)
            if kind not in layouts:
                layouts[kind] = self._learn(name, cache, layer, impl)
                logger.info("KV layout learned: %s, isa %s, %s", type(impl).__name__, isa, layouts[kind].summary)
            learned.append(layouts[kind])
        if any(layout is not learned[0] for layout in learned):
            raise UnsupportedKVLayout("layers with different KV cache layouts cannot be moved (hybrid model)")
        self._mover = KVMover(list(kv_caches.values()), learned[0])

    def _learn(self, name: str, cache: torch.Tensor, layer: Any, impl: Any) -> BlockLayout:
        def write(key: torch.Tensor, value: torch.Tensor, scratch: torch.Tensor, slots: torch.Tensor) -> None:
            impl.do_kv_cache_update(layer, key, value, scratch, slots)

        # The attention kernel's block may be a part of the scheduler's: what counts is how many tokens a block holds.
        block_size = cache[0].numel() // (2 * self._heads * self._head_size)
        shape = (self._heads, block_size, self._head_size)
        try:
            return BlockLayout.learn(write, cache.shape[1:], *shape, cache.dtype, cache.device, cache.stride()[1:])
        except UnsupportedKVLayout as error:
            raise UnsupportedKVLayout(f"layer {name}: {error}") from None
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
            shown = f"KV cache of shape {tuple(cache.shape)}: {type(impl).__name__} cannot fill one block of it"
            raise UnsupportedKVLayout(f"layer {name}: {shown} ({error})") from error

    @property
    def mover(self) -> KVMover:
        if self._mover is None:
            raise RuntimeError("KV caches are not registered yet")
        return self._mover

    def from_gpu(self, memory_obj: MemoryObj, start: int, end: int, **kwargs: Any) -> None:
        self.mover.gather(memory_obj.tensor, kwargs["slot_mapping"][start:end])

    def to_gpu(self, memory_obj: MemoryObj, start: int, end: int, **kwargs: Any) -> None:
        # Blocks that vLLM had cached may be shared with running requests: only the tokens after them are written.
        first = max(start, int(kwargs.get("vllm_cached_tokens", 0)))
        if first < end:
            self.mover.scatter(memory_obj.tensor[:, :, first - start :], kwargs["slot_mapping"][first:end])

    def batched_from_gpu(self, memory_objs: Any, starts: list[int], ends: list[int], **kwargs: Any) -> None:
        for memory_obj, start, end in zip(memory_objs, starts, ends, strict=True):
            self.from_gpu(memory_obj, start, end, **kwargs)

    def batched_to_gpu(self, memory_objs: Any = None, starts: Any = None, ends: Any = None, **kwargs: Any) -> None:
        for memory_obj, start, end in zip(memory_objs, starts, ends, strict=True):
            self.to_gpu(memory_obj, start, end, **kwargs)

    def get_shape(self, num_tokens: int) -> torch.Size:
        return self.mover.shape(num_tokens)


class PutTracker:
    """Knows which chunks are on their way to the store, and tells when a request's chunks have arrived.

    ``submitted`` and ``confirm`` are called by the engine's thread; everything else runs on LMCache's storage loop.
    """

    def __init__(self, engine: Any, announcer: Announcer, rank: int, ranks: int) -> None:
        self._engine = engine
        self._loop: asyncio.AbstractEventLoop = engine.storage_manager.loop
        self._announcer = announcer
        self._rank, self._ranks = rank, ranks
        self._on_the_way: dict[Any, int] = {}
        self._arrived = asyncio.Event()
        self._timeout_s = wait_timeout_s()
        self._last_reason = ""

    def submitted(self, keys: Iterable[Any]) -> None:
        keys = list(keys)
        self._loop.call_soon_threadsafe(self._add, keys)

    def _add(self, keys: list[Any]) -> None:
        for key in keys:
            self._on_the_way[key] = self._on_the_way.get(key, 0) + 1

    def done(self, key: Any) -> None:
        """A put has ended, well or not (LMCache's completion callback, on the storage loop)."""
        self._loop.call_soon_threadsafe(self._remove, key)

    def _remove(self, key: Any) -> None:
        left = self._on_the_way.get(key, 0) - 1
        if left > 0:
            self._on_the_way[key] = left
        else:
            self._on_the_way.pop(key, None)
        arrived, self._arrived = self._arrived, asyncio.Event()
        arrived.set()

    def confirm(self, request_id: str, token_ids: list[int], request_configs: dict[str, Any] | None) -> None:
        """Announce, in the background, when all chunks of the prompt are visible in the store."""
        begin = time.perf_counter()
        asyncio.run_coroutine_threadsafe(self._confirm(request_id, token_ids, request_configs, begin), self._loop)

    async def _confirm(
        self, request_id: str, token_ids: list[int], request_configs: dict[str, Any] | None, begin: float
    ) -> None:
        state, reason = "failed", ""
        try:
            keys = [
                key
                for _, _, key in self._engine.token_database.process_tokens(
                    tokens=token_ids, request_configs=request_configs
                )
            ]
            reason = await asyncio.wait_for(self._find(keys), self._timeout_s)
            state = "failed" if reason else "stored"
        except asyncio.TimeoutError:
            reason = f"KV not in the store within {self._timeout_s:g} s"
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
        if reason != self._last_reason:
            if reason:
                logger.warning("KV of request %s is not visible: %s", request_id, reason)
            else:
                logger.info("KV is visible in the store again")
            self._last_reason = reason
        transfer_ms = (time.perf_counter() - begin) * 1000
        self._announcer.end(request_id, self._rank, self._ranks, state, reason, transfer_ms)

    async def _find(self, keys: list[Any]) -> str:
        """Wait for the puts of ``keys``, look them up; returns why they are not all there, or ""."""
        waiting_for = set(keys)
        while not waiting_for.isdisjoint(self._on_the_way):
            await self._arrived.wait()
        if not self._engine.is_healthy():
            return "LMCache is unhealthy (its KV store does not answer)"
        backend = _remote_backend(self._engine)
        if backend is None or backend.connection is None:
            return "no connection to the KV store"
        present = await backend.connection.batched_async_contains("", keys)
        return "" if present == len(keys) else f"{len(keys) - present} of {len(keys)} chunks are not in the KV store"


def _remote_backend(engine: Any) -> RemoteBackend | None:
    for backend in engine.storage_manager.storage_backends.values():
        if isinstance(backend, RemoteBackend):
            return backend
    return None


class LMCacheDisaggConnectorV1(LMCacheConnectorV1Dynamic):
    """See the module's text. The name must contain "LMCache": the Gaudi plugin looks for it.

    Raises (at server start):
        UnsupportedKVLayout, StoreUnavailable, ValueError: with what to change.
    """

    _meter: Meter | None = None  # the worker's
    _book: LoadBook | None = None  # the scheduler's
    _identities: Identities | None = None  # the scheduler's

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: Any = None) -> None:
        self._announcer = Announcer()
        self._tracker: PutTracker | None = None
        self._paged: PagedKVConnector | None = None
        self._role_name = vllm_config.kv_transfer_config.kv_role
        _refuse_prompt_embeds(vllm_config)
        self._copy = _choose_copy(vllm_config)
        if role == KVConnectorRole.WORKER:
            self._meter = Meter(vllm_config.device_config.device.type)
            if vllm_config.device_config.device.type == "hpu":
                _report_everything(self)
            self._make_engine(vllm_config)
        else:
            self._identities = Identities()
            policy = LoadPolicy(mode_from_environment())
            self._book = LoadBook(policy, vllm_config.parallel_config.world_size)
            logger.info("KV of the store is loaded: %s", policy.mode)
        super().__init__(vllm_config, role, kv_cache_config)

    def _make_engine(self, vllm_config: VllmConfig) -> None:
        """Create LMCache's engine before LMCache does: with our CPU copy, and with errors that end the start.

        LMCache takes an engine that is already there, and turns an error of its own into a server without reuse.
        """
        from lmcache.integration.vllm.utils import vllm_layout_hints
        from vllm.distributed.parallel_state import get_tp_group

        config = lmcache_get_or_create_config()
        metadata = VllmServiceFactory(config, vllm_config, "worker").get_or_create_metadata()
        metadata.model_name = model_key(metadata.model_name, model_fingerprint(vllm_config))
        layers, *others = metadata.kv_shape
        metadata.kv_shape = (layers + draft_layers(vllm_config.speculative_config), *others)
        device = vllm_config.device_config.device.type
        if device == "cpu":
            _survive_seeded_requests()
        if self._copy != "stock":
            self._paged = PagedKVConnector(vllm_config, *metadata.kv_shape[3:5])
        if self._copy == "own":
            device_connector: GPUConnectorInterface = self._paged
        else:
            device_connector = CreateGPUConnector(
                config, metadata, EngineType.VLLM, layout_hints=vllm_layout_hints(vllm_config)
            )
            _order_streams(device_connector)
        group = get_tp_group()
        # Nothing here uses LMCache's offload server, and its end blocks for 5 s: as long as vLLM waits for a worker,
        # which is then killed and leaks semaphores and shared memory.
        VllmServiceFactory.maybe_create_offload_server = lambda self: None  # type: ignore[method-assign]
        engine = LMCacheEngineBuilder.get_or_create(
            ENGINE_NAME, config, metadata, device_connector, group.broadcast, group.broadcast_object
        )
        engine.token_database = IdentifiedTokens(engine.token_database)

    # worker side

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        if self._paged is not None:
            try:
                self._paged.register(kv_caches)
            except UnsupportedKVLayout as error:
                if self._copy == "own":
                    raise
                logger.warning("LMCache's own copy is used: %s", error)
                self._paged = None
        super().register_kv_caches(kv_caches)
        impl = self._lmcache_engine
        manager, engine = impl._manager, impl.lmcache_engine
        if engine is None or manager._init_failed:
            raise RuntimeError(f"LMCache did not start: {manager._init_failed_reason.strip().splitlines()[-1:]}")
        backend = _remote_backend(engine)
        client = self._replace_store_client(backend) if backend is not None else None
        if self._announcer and backend is not None and self._role_name != "kv_consumer":
            metadata = engine.metadata
            self._tracker = PutTracker(engine, self._announcer, metadata.worker_id, metadata.world_size)
            self._watch_puts(backend, self._tracker)
        if client is not None and _one_store_only(engine):
            self._take_over(engine, client)
        self._watch_loads(engine)

    def _take_over(self, engine: Any, client: Store) -> None:
        """Let kv_transfer.py store and load in place of LMCache's engine, if the KV cache can be moved by us."""
        if self._paged is None:
            return
        mover = self._paged.mover
        cuda = mover.device.type == "cuda"
        copy = kv_transfer.CudaCopy(mover, engine.config.chunk_size) if cuda else kv_transfer.HostCopy(mover)
        tracker = self._tracker
        transfer = kv_transfer.KVTransfer(
            engine,
            mover,
            copy,
            client,
            tracker.submitted if tracker is not None else lambda keys: None,
            tracker.done if tracker is not None else lambda key: None,
        )
        engine.store, engine.retrieve = transfer.store, transfer.retrieve
        logger.info("KV is stored and loaded by %s", type(copy).__name__)

    @staticmethod
    def _replace_store_client(backend: RemoteBackend) -> Store | None:
        ours = backend.connection.getWrappedConnector() if backend.connection is not None else None
        if isinstance(ours, ShmStoreConnector | StoreClient):
            return ours  # LMCache has made it, through its plugin seam
        client = registry.connect(backend.remote_url, backend.loop, backend.local_cpu_backend)
        if client is None:
            if backend.connection is None:
                raise StoreUnavailable("the KV store of remote_url does not answer")
            return None
        stock, backend.connection = backend.connection, InstrumentedRemoteConnector(client)
        if stock is None:
            return client
        inner = stock.getWrappedConnector()
        if hasattr(inner, "pq_executor"):  # its close() would wait for the loop that runs it
            asyncio.run_coroutine_threadsafe(inner.pq_executor.shutdown_async(wait=False), backend.loop)
        else:
            asyncio.run_coroutine_threadsafe(inner.close(), backend.loop)
        return client

    @staticmethod
    def _watch_puts(backend: RemoteBackend, tracker: PutTracker) -> None:
        submit = backend.batched_submit_put_task

        def batched_submit_put_task(keys: Any, memory_objs: Any, *args: Any, **kwargs: Any) -> None:
            if backend.connection is not None:
                tracker.submitted(keys)
                kwargs["on_complete_callback"] = tracker.done
            submit(keys, memory_objs, *args, **kwargs)

        backend.batched_submit_put_task = batched_submit_put_task  # type: ignore[method-assign]

    def _watch_loads(self, engine: Any) -> None:
        """Report every token that should have been loaded and was not (see the module's text)."""
        retrieve, impl = engine.retrieve, self._lmcache_engine

        def checked_retrieve(tokens: Any, mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
            begin = self._meter.load_begin() if self._meter else None
            loaded = retrieve(tokens, mask, **kwargs)
            cached = int(kwargs.get("vllm_cached_tokens", 0))
            missing = ~loaded if mask is None else mask & ~loaded
            missing[:cached] = False
            incomplete = bool(missing.any())
            if self._meter:
                self._meter.load_end(begin, kwargs.get("req_id", ""), 0 if incomplete else len(loaded) - cached)
            if incomplete:
                slots = kwargs["slot_mapping"].to("cpu")[: missing.numel()][missing]
                impl._invalid_block_ids.update((slots // impl._block_size).unique().tolist())
            return loaded

        engine.retrieve = checked_retrieve

    def bind_connector_metadata(self, connector_metadata: Any) -> None:
        super().bind_connector_metadata(connector_metadata)
        if self._meter:
            self._meter.step_begin(getattr(connector_metadata, "load_note", None))

    def _end_step(self) -> None:
        """The forward pass is over: take its time, and release what was looked up for requests that compute."""
        if self._meter:
            self._meter.step_end()
        engine, note = self._lmcache_engine.lmcache_engine, getattr(self._connector_metadata, "load_note", None)
        if engine is not None and note is not None:
            for request_id in note.released:
                engine.lookup_unpin(request_id)

    def wait_for_save(self) -> None:
        self._end_step()
        super().wait_for_save()
        if self._tracker is None:
            return
        for request in self._get_connector_metadata().requests:
            # is_last_prefill stays true while decoding; only the step that had something to say about storing counts
            if request.is_last_prefill and request.save_spec is not None:
                self._tracker.confirm(request.req_id, list(request.token_ids), request.request_configs)

    # both sides: measurements go from the workers to the scheduler, totals from there to the API server

    def get_kv_connector_stats(self) -> LoadStats | None:
        if self._meter is not None:
            return self._meter.take()
        totals = self._book.take() if self._book else {}
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
        if self._book and isinstance(stats, LoadStats):
            self._book.observe(stats.data)
            connector_output.kv_connector_stats = None  # the totals follow by get_kv_connector_stats
        super().update_connector_output(connector_output)

    def on_new_request(self, request: Any) -> None:
        if self._identities:
            self._identities.give(request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        self.on_new_request(request)  # a vLLM that does not call it, a session that goes on
        found, asynchronous = super().get_num_new_matched_tokens(request, num_computed_tokens)
        if not found or self._book is None or self._book.choose(request.request_id, found):
            return found, asynchronous
        # As if the store had nothing. LMCache wants the entry itself when the request comes back after a preemption.
        spec = self._lmcache_engine.load_specs[request.request_id]
        spec.lmcache_cached_tokens, spec.can_load = 0, False
        return 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        super().update_state_after_alloc(request, blocks, num_external_tokens)
        if self._book:
            self._book.scheduled(request.request_id, num_external_tokens)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        self.on_new_request(request)
        if self._book:
            self._book.finished(request.request_id)
        return super().request_finished(request, block_ids)

    def _note_step(self, meta: Any, scheduler_output: SchedulerOutput) -> None:
        """Tell the workers with the step's metadata what it computes."""
        begun = [
            (request.req_id, len(request.prompt_token_ids or ()), request.num_computed_tokens)
            for request in scheduler_output.scheduled_new_reqs
        ]
        cached = scheduler_output.scheduled_cached_reqs
        for request_id in cached.resumed_req_ids:
            request = self._lmcache_engine._unfinished_requests[request_id]
            computed = cached.num_computed_tokens[cached.req_ids.index(request_id)]
            begun.append((request_id, request.num_prompt_tokens, computed))
        meta.load_note = self._book.step(begun, scheduler_output.num_scheduled_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> Any:
        meta = super().build_connector_meta(scheduler_output)
        if self._book:
            self._note_step(meta, scheduler_output)
        if self._role_name == "kv_consumer":
            return meta
        impl = self._lmcache_engine
        said = {request.req_id: request for request in meta.requests}
        for request in scheduler_output.scheduled_new_reqs:
            self._announcer.begin(request.req_id)
            tracker = impl._request_trackers.get(request.req_id)
            if tracker is not None and (tracker.request_configs or {}).get("lmcache.skip_save", False):
                self._announcer.end(request.req_id, 0, 1, "none")
        for req_id in scheduler_output.num_scheduled_tokens:
            tracker = impl._request_trackers.get(req_id)
            if tracker is None or tracker.skip_save or len(tracker.token_ids) < tracker.prompt_len:
                continue
            unsaved_tail = tracker.num_saved_tokens < tracker.prompt_len and not impl._discard_partial_chunks
            if unsaved_tail and not (tracker.request_configs or {}).get("lmcache.skip_save", False):
                self._store_tail(meta, tracker, said.get(req_id))
        return meta

    def _store_tail(self, meta: Any, tracker: Any, said: ReqMeta | None) -> None:
        """Store from the last saved chunk to the prompt's end, in the step that completes prefill."""
        impl = self._lmcache_engine
        saved, decoding, tokens = tracker.num_saved_tokens, tracker.is_decode_phase, tracker.token_ids
        # ReqMeta refuses a tail that starts after a saved chunk, and takes a last step of one token for decoding
        tracker.num_saved_tokens, tracker.is_decode_phase = 0, False
        tracker.token_ids = tokens[: tracker.prompt_len]
        request = ReqMeta.from_request_tracker(
            tracker,
            impl._block_size,
            impl._lmcache_chunk_size,
            load_spec=said.load_spec if said is not None else None,
            discard_partial_chunks=False,
        )
        tracker.token_ids, tracker.is_decode_phase = tokens, decoding
        if request is None:
            tracker.num_saved_tokens = saved
            return
        request.save_spec.skip_leading_tokens = saved
        if said is not None:
            meta.requests.remove(said)
        meta.add_request(request)


def _order_streams(connector: GPUConnectorInterface) -> None:
    """Let LMCache's copy streams wait for vLLM's own stream.

    LMCache copies on streams of its own (CUDA) and does not wait for the forward pass that writes the KV cache: it
    stores what was there before, and loads into blocks that an earlier step may still be writing.
    """
    for method, name in (("batched_from_gpu", "store_stream"), ("batched_to_gpu", "load_stream")):
        stream, original = getattr(connector, name, None), getattr(connector, method)
        if stream is None:
            continue

        def ordered(*args: Any, copy: Any = original, stream: Any = stream, **kwargs: Any) -> Any:
            stream.wait_stream(torch.cuda.current_stream())
            return copy(*args, **kwargs)

        setattr(connector, method, ordered)


def _survive_seeded_requests() -> None:
    """Keep one request with a ``seed`` from ending vLLM's CPU engine.

    When a step prefills only part of a prompt, vLLM takes the sampled token back by moving the offset of the request's
    random generator; a CPU generator has none and raises, which ends the engine (vLLM 0.27 to 0.32). Starting the
    generator again is the same thing: nothing that counts has been drawn before prefill is complete.
    """
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    keep_books = CPUModelRunner._bookkeeping_sync
    if hasattr(keep_books, "seeded"):
        return

    def keep_books_of_seeded(self: Any, *args: Any, **kwargs: Any) -> Any:
        generators = self.input_batch.generators
        partial = self.discard_request_mask.np[: self.input_batch.num_reqs].nonzero()[0].tolist()
        taken = {i: generators.pop(i) for i in partial if i in generators}
        try:
            return keep_books(self, *args, **kwargs)
        finally:
            for i, generator in taken.items():
                generators[i] = generator.manual_seed(generator.initial_seed())

    keep_books_of_seeded.seeded = True  # type: ignore[attr-defined]
    CPUModelRunner._bookkeeping_sync = keep_books_of_seeded


def _refuse_prompt_embeds(vllm_config: VllmConfig) -> None:
    """Raise ValueError if prompts may be embeddings: LMCache would end the engine at the first one."""
    if getattr(vllm_config.model_config, "enable_prompt_embeds", False):
        raise ValueError("--enable-prompt-embeds is not supported: KV is stored by token ids, embeddings have none")


def _report_everything(connector: LMCacheDisaggConnectorV1) -> None:
    """Let a step's output carry what the connector has to say.

    The Gaudi plugin's model runner fills in finished transfers alone: blocks that could not be loaded would be used as
    they are, and measurements would be lost. What a runner fills in itself stays.
    """
    from vllm.v1.outputs import KVConnectorOutput

    fill_in = KVConnectorOutput.__init__

    def fill_in_all(self: Any, *args: Any, **kwargs: Any) -> None:
        fill_in(self, *args, **kwargs)
        self.kv_connector_stats = self.kv_connector_stats or connector.get_kv_connector_stats()
        self.invalid_block_ids = self.invalid_block_ids or connector.get_block_ids_with_load_errors()

    KVConnectorOutput.__init__ = fill_in_all  # type: ignore[method-assign]


def _choose_copy(vllm_config: VllmConfig) -> str:
    """Who copies between the KV cache and chunks: "own", "stock" (LMCache) or "auto": own if the layout is learned.

    ``DISAGG_KV_COPY`` asks for one. By default it is our own on CPU and CUDA and LMCache's on every other device;
    LMCache has none for CPU, and on CUDA without its kernels a wrong one.

    Raises:
        ValueError: DISAGG_KV_COPY is none of these, or "stock" where that cannot be.
        UnsupportedKVLayout: our own is the only one, and would move this KV cache wrongly.
    """
    device = vllm_config.device_config.device.type
    asked = os.environ.get(COPY_VARIABLE, "") or "auto"
    if asked not in ("auto", "own", "stock"):
        raise ValueError(f"{COPY_VARIABLE}={asked!r}: allowed: auto, own, stock")
    no_stock = device == "cpu" or (device == "cuda" and not _lmcache_is_compiled())
    if asked == "stock" and no_stock:
        raise ValueError(f"{COPY_VARIABLE}=stock: LMCache cannot copy the KV cache on {device} here; use auto")
    if asked == "stock" or (asked == "auto" and device not in ("cpu", "cuda")):
        return "stock"
    problem = ""
    dtype = str(vllm_config.cache_config.cache_dtype)
    if vllm_config.model_config.use_mla:
        problem = f"MLA models are not supported on {device}: their KV cache holds no K and V per head"
    elif dtype not in ("auto", "float32", "float16", "bfloat16"):
        problem = f"--kv-cache-dtype {dtype} is not supported on {device}: use auto"
    if asked == "own" or no_stock:
        if problem:
            raise UnsupportedKVLayout(problem)
        return "own"
    return "stock" if problem else "auto"


def _one_store_only(engine: Any) -> bool:
    """Whether LMCache is set up for what kv_transfer.py does: whole requests, one store, no other place."""
    config = engine.config
    other_ways = (
        config.use_layerwise,
        config.enable_blending,
        config.local_cpu,
        config.enable_async_loading,
        config.enable_pd,
        config.enable_p2p,
        engine.save_only_first_rank,
        engine.kv_events_enabled,
        config.remote_serde != "naive",
    )
    stores = [b for b in engine.storage_manager.storage_backends.values() if not isinstance(b, LocalCPUBackend)]
    return not any(other_ways) and len(stores) == 1


def _lmcache_is_compiled() -> bool:
    """Whether LMCache's CUDA kernels load.

    Without them it copies with torch operations that take the packed KV cache of vLLM's FlashAttention (since 0.26) for
    another layout, and stores other tokens' memory without an error.
    """
    try:
        importlib.import_module("lmcache.cuda_ops")
    except ImportError:
        return False
    return True
