"""patches.py: for everything that is replaced or reached into, what upstream does by itself.

A test here that fails says: upstream has mended or moved it, and the patch can go or must follow.
"""

from __future__ import annotations

import asyncio
import inspect
import re
import struct
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed: what is patched is its own")
pytest.importorskip("lmcache", reason="LMCache is not installed: what is patched is its own")

from kv_sides import Scheduler
from kv_stores import CHUNK, HEAD_SIZE, HEADS, LAYERS, Server, Staging, chunk, key
from launch_harness import wait_until
from lmcache.integration.vllm import vllm_service_factory
from lmcache.integration.vllm.vllm_service_factory import VllmServiceFactory
from lmcache.integration.vllm.vllm_v1_adapter import LMCacheConnectorV1Impl
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.event_manager import EventManager
from lmcache.v1.manager import LMCacheManager
from lmcache.v1.memory_management import MemoryFormat
from lmcache.v1.offload_server.zmq_server import ZMQOffloadServer
from lmcache.v1.storage_backend.connector.lm_connector import LMCServerConnector
from lmcache.v1.storage_backend.connector.redis_connector import RedisConnector
from lmcache.v1.storage_backend.storage_manager import StorageManager
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from disagg_prefill_lmcache_v1.kv import patches
from disagg_prefill_lmcache_v1.kv.stores.lm import LMStoreConnector

SHAPE = torch.Size((2, LAYERS, CHUNK, HEADS * HEAD_SIZE))


def manager_of(url: str) -> StorageManager:
    """LMCache's storage manager with one store."""
    config = LMCacheEngineConfig.from_defaults(
        chunk_size=CHUNK, remote_url=url, local_cpu=False, max_local_cpu_size=0.01, remote_serde="naive"
    )
    return StorageManager(config, Staging().metadata, EventManager())


@pytest.fixture(scope="module")
def lm_server():
    server = Server("lm")
    yield server
    server.stop()


@pytest.fixture
def manager(lm_server):
    manager = manager_of(lm_server.url)
    yield manager
    manager.close()


def test_our_client_takes_the_place_of_lmcaches_and_lmcache_uses_it(manager):
    backend = patches.remote_backend(SimpleNamespace(storage_manager=manager))
    assert isinstance(backend.connection.getWrappedConnector(), LMCServerConnector)
    ours = patches.use_own_client(backend)
    assert isinstance(ours, LMStoreConnector)
    assert backend.connection.getWrappedConnector() is ours
    assert patches.use_own_client(backend) is ours, "asked again, it stays"
    obj = manager.allocate(SHAPE, torch.float32, MemoryFormat.KV_2LTD)
    obj.tensor.fill_(3.0)
    manager.batched_put([key("patched")], [obj])
    wait_until(lambda: ours.count_present([key("patched")]) == 1, "LMCache stores through it")
    (got,) = manager.batched_get([key("patched")], type(backend).__name__)
    assert got.tensor.unique().tolist() == [3.0]


def test_lmcaches_lm_client_still_does_not_reconnect(loop):
    """Why there is a client of ours. "remote_storage_plugins" makes plugin:// stores only; lm:// is none."""
    server = Server("lm")
    try:
        stock = LMCServerConnector("127.0.0.1", server.port, loop, Staging())
        name = key("lost")
        run = lambda work: asyncio.run_coroutine_threadsafe(work, loop).result(60)  # noqa: E731
        run(stock.put(name, chunk(stock.local_cpu_backend)))
        assert run(stock.exists(name))
        server.stop()
        server.start()
        for _ in range(2):
            with pytest.raises((OSError, struct.error)):
                run(stock.exists(name))
    finally:
        server.stop()


def test_lmcache_lists_the_keys_of_a_batched_put_nowhere(manager, monkeypatch):
    """Why batched_submit_put_task is watched: put_tasks has only those that are put one by one."""
    backend = patches.remote_backend(SimpleNamespace(storage_manager=manager))
    patches.use_own_client(backend)
    submitted, done, listed = [], [], []
    patches.watch_puts(backend, submitted.extend, done.append)
    client = backend.connection.getWrappedConnector()
    put = client.batched_put

    async def observed(keys, objs):
        listed.append(set(backend.put_tasks))
        await put(keys, objs)

    monkeypatch.setattr(client, "batched_put", observed)
    obj = manager.allocate(SHAPE, torch.float32, MemoryFormat.KV_2LTD)
    manager.batched_put([key("watched")], [obj])
    wait_until(lambda: done == [key("watched")], "the end of the put is told")
    assert submitted == [key("watched")]
    assert listed == [set()], "LMCache lists them now: watch put_tasks instead"
    assert RedisConnector.support_batched_put(object.__new__(RedisConnector)), "and so does its Redis client"


def test_an_error_at_start_leaves_lmcache_running_without_a_store():
    """Why start_failure looks into the manager: nothing public says so at this point."""
    manager = object.__new__(LMCacheManager)
    source = inspect.getsource(LMCacheManager.start_services) + inspect.getsource(LMCacheManager.post_init)
    assert re.search(r"except[^\n]*:\s", source), "LMCache passes its error on now"
    manager._init_failed, manager._init_failed_reason = True, "Traceback\nValueError: no such store\n"
    impl = SimpleNamespace(_manager=manager, lmcache_engine=object())
    assert patches.start_failure(impl) == "ValueError: no such store"
    manager._init_failed = False
    assert patches.start_failure(impl) is None
    assert patches.start_failure(SimpleNamespace(_manager=manager, lmcache_engine=None)) is not None


def test_the_offload_server_is_still_made_for_every_worker_and_ends_late(monkeypatch):
    assert "ZMQOffloadServer(" in inspect.getsource(VllmServiceFactory.maybe_create_offload_server)
    assert re.search(r"join\(timeout=[1-9]", inspect.getsource(ZMQOffloadServer.close))
    original = VllmServiceFactory.maybe_create_offload_server
    monkeypatch.setattr(VllmServiceFactory, "maybe_create_offload_server", original)
    made = []
    monkeypatch.setattr(vllm_service_factory, "ZMQOffloadServer", lambda *args: made.append(args))
    patches.leave_out_offload_server()
    factory = object.__new__(VllmServiceFactory)
    factory.role = "worker"
    assert factory.maybe_create_offload_server() is None
    assert made == []


def test_lmcaches_cuda_copies_still_do_not_wait_for_vllms_stream():
    from lmcache.v1.gpu_connector import gpu_connectors

    source = inspect.getsource(gpu_connectors.VLLMPagedMemGPUConnectorV2)
    assert "self.store_stream = torch.cuda.Stream()" in source
    assert "self.load_stream = torch.cuda.Stream()" in source
    for method in ("batched_from_gpu", "batched_to_gpu"):
        assert "wait_stream" not in inspect.getsource(getattr(gpu_connectors.VLLMPagedMemGPUConnectorV2, method))


def books_of(generator):
    """What CPUModelRunner._bookkeeping_sync needs to come to a partly prefilled request with a generator."""
    return SimpleNamespace(
        input_batch=SimpleNamespace(num_reqs=1, generators={0: generator}),
        discard_request_mask=SimpleNamespace(np=torch.tensor([True]).numpy()),
    )


def test_a_seeded_request_that_is_partly_prefilled_still_ends_vllms_cpu_engine(monkeypatch):
    generator = torch.Generator().manual_seed(7)
    with pytest.raises(RuntimeError, match="offset"):
        generator.set_offset(generator.get_offset() - 4)
    assert "set_offset(gen.get_offset()" in inspect.getsource(GPUModelRunner._bookkeeping_sync)
    seen = []

    def original(self):
        seen.append(dict(self.input_batch.generators))

    monkeypatch.setattr(CPUModelRunner, "_bookkeeping_sync", original)
    patches.survive_seeded_requests()
    patched = CPUModelRunner._bookkeeping_sync
    patches.survive_seeded_requests()
    assert CPUModelRunner._bookkeeping_sync is patched, "once"
    torch.rand(3, generator=generator)  # what the discarded sample has drawn
    runner = books_of(generator)
    runner.discard_request_mask.np[:] = True
    patched(runner)
    assert seen == [{}], "vLLM does not meet it"
    assert runner.input_batch.generators == {0: generator}
    assert torch.equal(torch.rand(3, generator=generator), torch.rand(3, generator=torch.Generator().manual_seed(7)))


def test_nixls_thread_still_asks_for_events_in_a_loop():
    api = pytest.importorskip("nixl_cu12._api", reason="NIXL is not installed")
    assert "agent_config.pthrDelay = 0\n" in inspect.getsource(api.nixl_agent.__init__), "NIXL waits by itself"
    stock, made = api.nixlBind.nixlAgentConfig, SimpleNamespace(nixlAgentConfig=api.nixlBind.nixlAgentConfig)
    patches.let_nixl_sleep(made)
    patched = made.nixlAgentConfig
    patches.let_nixl_sleep(made)
    assert made.nixlAgentConfig is patched, "once"
    config = patched()
    config.pthrDelay = 0
    assert isinstance(config, stock)
    assert stock.pthrDelay.__get__(config) == config.pthrDelay == patches.NIXL_WAIT_US


def test_lmcaches_own_load_still_returns_in_silence_without_attention_metadata():
    """Why start_load_kv is ours. When this fails LMCache loads, or says that it does not."""
    impl = object.__new__(LMCacheConnectorV1Impl)
    from lmcache.integration.vllm.vllm_v1_adapter import LMCacheConnectorMetadata, LoadSpec, ReqMeta

    meta = LMCacheConnectorMetadata()
    meta.add_request(ReqMeta("r", [0] * 64, torch.arange(64), load_spec=LoadSpec(0, 64, True)))
    asked = []
    engine = SimpleNamespace(retrieve=lambda *args, **kwargs: asked.append(args))
    vars(impl).update(
        _parent=SimpleNamespace(_get_connector_metadata=lambda: meta), kv_caches={"layer": torch.zeros(1)},
        _manager=SimpleNamespace(lmcache_engine=engine), _invalid_block_ids=set(), use_layerwise=False,
        enable_blending=False,
    )  # fmt: skip
    impl.start_load_kv(SimpleNamespace(attn_metadata=None))
    assert asked == []
    assert impl.get_block_ids_with_load_errors() == set()


def test_lmcache_still_stores_nothing_on_a_decode_server_whatever_it_is_told():
    made = Scheduler(True, 0)
    made.impl.config.save_decode_cache = True
    meta, _ = made.schedule()
    assert not any(request.save_spec.can_save for request in meta.requests)
    assert patches.save_answers(made.impl)
    made = Scheduler(True, 0, role="kv_producer")
    made.impl.config.save_decode_cache = True
    assert not patches.save_answers(made.impl)
    assert made.impl.kv_role == "kv_producer"
