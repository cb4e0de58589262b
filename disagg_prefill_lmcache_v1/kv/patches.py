"""Everything of LMCache's and vLLM's that is replaced or reached into, for vLLM 0.26 to 0.32 and LMCache 0.5.6.

They offer no seam for these. Each function says what and why; tests/kv/test_kv_patches.py has a test for each that
turns red when upstream has mended or moved it. Nothing else in kv/ replaces an attribute of theirs. What is only
called or read (``ReqMeta``, ``LoadSpec``, the engine's token database, statistics and health) is LMCache's code that
its own connector calls; it is typed and tested in use.

| what | why | upstream |
| --- | --- | --- |
| ``RemoteBackend.connection`` | our store clients; ``remote_storage_plugins`` covers shm only: a plugin cannot take the schemes lm and redis | |
| ``RemoteBackend.batched_submit_put_task`` | which chunks are on their way: Redis's way past ``put_tasks`` is not listed | |
| ``ReqMeta.from_request_tracker`` gets a doctored tracker | the tail of a prompt after a saved chunk is not stored | LMCache#2540 |
| ``LMCacheConnectorV1Impl._manager._init_failed`` read | LMCache serves without reuse when it could not start | |
| ``VllmServiceFactory.maybe_create_offload_server`` | its end blocks for 5 s | |
| ``LMCacheEngine.token_database`` wrapped | keys hold no adapter, salt or content of images in full width | LMCache#2961 |
| copy methods of LMCache's device connectors | they do not wait for vLLM's stream | |
| ``CPUModelRunner._bookkeeping_sync`` | a request with a seed ends the CPU engine | vllm#10097 made the assumption |
| ``KVConnectorOutput.__init__`` (hpu) | the runner passes on finished transfers alone | |
| ``LMCacheConnectorV1Impl.kv_role`` of a decode server | ``save_decode_cache`` does nothing on a kv_consumer | |
| ``nixlAgentConfig.pthrDelay`` (cpu) | NIXL's thread asks for events in a loop: a core for each server, and reads wait for it | |
| ``NixlConnectorWorker._engine_clock_offset`` read | until when the prefill server holds KV is told by its clock | |
| ``LMCacheConnectorV1Impl.start_load_kv`` not called | it returns in silence without attention metadata | LMCache#749 |
"""  # noqa: E501

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

import torch
from lmcache.integration.vllm.vllm_service_factory import VllmServiceFactory
from lmcache.integration.vllm.vllm_v1_adapter import ReqMeta
from lmcache.v1.storage_backend.connector.instrumented_connector import InstrumentedRemoteConnector
from lmcache.v1.storage_backend.remote_backend import RemoteBackend

from disagg_prefill_lmcache_v1.kv.identity import not_to_be_stored
from disagg_prefill_lmcache_v1.kv.stores import registry
from disagg_prefill_lmcache_v1.kv.stores.base import Store, StoreUnavailable
from disagg_prefill_lmcache_v1.kv.stores.client import StoreClient
from disagg_prefill_lmcache_v1.kv.stores.shm import ShmStoreConnector

NIXL_WAIT_US = 1000


def start_failure(impl: Any) -> str | None:
    """Why LMCache did not start, though it goes on; None if it did."""
    manager = impl._manager
    if impl.lmcache_engine is not None and not manager._init_failed:
        return None
    return "; ".join(manager._init_failed_reason.strip().splitlines()[-1:])


def remote_backend(engine: Any) -> RemoteBackend | None:
    """LMCache's backend of the KV store."""
    backends = engine.storage_manager.storage_backends.values()
    return next((backend for backend in backends if isinstance(backend, RemoteBackend)), None)


def use_own_client(backend: RemoteBackend) -> Store | None:
    """Put our client in the place of LMCache's; None where only LMCache's own will do.

    Raises:
        StoreUnavailable: the store does not answer.
    """
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


def wrap_token_database(engine: Any, wrap: Callable[[Any], Any]) -> None:
    """Let the engine's keys be made by ``wrap`` of LMCache's token database (identity.py)."""
    engine.token_database = wrap(engine.token_database)


def watch_puts(backend: RemoteBackend, submitted: Callable[[Iterable[Any]], None], done: Callable[[Any], None]) -> None:
    """Tell which chunks LMCache has on their way to the store, and when each way has ended, well or not."""
    submit = backend.batched_submit_put_task

    def batched_submit_put_task(keys: Any, memory_objs: Any, *args: Any, **kwargs: Any) -> None:
        if backend.connection is not None:
            submitted(keys)
            kwargs["on_complete_callback"] = done
        submit(keys, memory_objs, *args, **kwargs)

    backend.batched_submit_put_task = batched_submit_put_task  # type: ignore[method-assign]


def tail_to_store(impl: Any, tracker: Any, said: ReqMeta | None) -> ReqMeta | None:
    """The part of a completed prompt that LMCache leaves out: from the last saved chunk to the prompt's end.

    LMCache leaves it out when prefill ran in several steps or started from a cached prefix: ``ReqMeta`` refuses a tail
    that starts after a saved chunk, and takes a last step of one token for decoding.

    Args:
        tracker: LMCache's ``RequestTracker`` of the request, which has all of its prompt.
        said: what LMCache itself says of the request in this step; what is returned takes its place.
    """
    saved, decoding, tokens = tracker.num_saved_tokens, tracker.is_decode_phase, tracker.token_ids
    skipped = tracker.skip_save or not_to_be_stored(tracker.request_configs)
    if skipped or impl._discard_partial_chunks or len(tokens) < tracker.prompt_len or saved >= tracker.prompt_len:
        return None
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
        return None
    request.save_spec.skip_leading_tokens = saved
    return request


def save_answers(impl: Any) -> bool:
    """Whether a decode server stores the KV of what it computes: LMCache's ``save_decode_cache`` is on.

    LMCache lets a kv_consumer store nothing, whatever that says. To vLLM and to all else here it stays one: nobody
    waits for what it stores.
    """
    if impl.kv_role != "kv_consumer" or not impl.config.save_decode_cache:
        return False
    impl.kv_role = "kv_both"
    return True


def leave_out_offload_server() -> None:
    """Nothing here uses LMCache's offload server, and its end blocks for 5 s: as long as vLLM waits for a worker, which
    is then killed and leaks semaphores and shared memory."""
    VllmServiceFactory.maybe_create_offload_server = lambda self: None  # type: ignore[method-assign]


def order_streams(connector: Any) -> None:
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


def survive_seeded_requests() -> None:
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


def let_nixl_sleep(bindings: Any) -> None:
    """Let NIXL's progress thread wait for events, for at most ``NIXL_WAIT_US``, rather than ask for them in a loop.

    NIXL's Python interface says 0. Where servers share cores with it that takes one for each of them, and the thread
    that others' reads need waits for its turn: 8 MiB took 25 to 65 ms on 2 busy cores, 1 ms with this.
    ``bindings``: NIXL's module ``_bindings``; what is made by it from now on.
    """
    stock = bindings.nixlAgentConfig
    if hasattr(stock, "sleeps"):
        return

    class AgentConfig(stock):
        sleeps = True

        @property
        def pthrDelay(self) -> int:
            return stock.pthrDelay.__get__(self)

        @pthrDelay.setter
        def pthrDelay(self, delay_us: int) -> None:
            stock.pthrDelay.__set__(self, delay_us or NIXL_WAIT_US)

    bindings.nixlAgentConfig = AgentConfig


def report_everything(connector: Any) -> None:
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
