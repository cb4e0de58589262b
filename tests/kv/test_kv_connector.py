"""The connector: what it adds to LMCache's connector, each against LMCache's own classes."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace

import pytest
import torch
from kv_sides import BLOCK, CHUNK, Heard, Scheduler, make_worker, to_load
from launch_harness import wait_until

pytest.importorskip("vllm", reason="vLLM is not installed: its connector interface is what is tested")
pytest.importorskip("lmcache", reason="LMCache is not installed: its connector is what is tested")

from lmcache.integration.vllm.vllm_v1_adapter import (
    LMCacheConnectorMetadata,
    LMCacheConnectorV1Impl,
    LoadSpec,
    ReqMeta,
    RequestTracker,
    SaveSpec,
)
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorRole

from disagg_prefill_lmcache_v1.kv import meter as kv_meter
from disagg_prefill_lmcache_v1.kv import patches, support
from disagg_prefill_lmcache_v1.kv.connector import LMCacheDisaggConnectorV1
from disagg_prefill_lmcache_v1.kv.layout import UnsupportedKVLayout
from disagg_prefill_lmcache_v1.kv.load_scheduler import LoadRequest, LoadScheduler, StepMetadata
from disagg_prefill_lmcache_v1.kv.mp import LMCacheDisaggMPConnector
from disagg_prefill_lmcache_v1.kv.paged import PagedKVConnector
from disagg_prefill_lmcache_v1.kv.policy import LOADS_TRUSTED, LoadPolicy
from disagg_prefill_lmcache_v1.kv.put_tracker import PutTracker
from disagg_prefill_lmcache_v1.kv.scheduler import DisaggScheduler
from disagg_prefill_lmcache_v1.kv.settings import from_environment


class Prefill:
    """Drives a request through LMCache's real bookkeeping, step by step, as the scheduler does.

    ``step(n)`` schedules n more prompt tokens and returns what is to be stored of the request: (from, to) or None.
    """

    def __init__(self, prompt_len, cached=0, configs=None):
        self.prompt_len, self.done = prompt_len, cached
        self.tracker = RequestTracker(
            req_id="r", prompt_len=prompt_len, token_ids=list(range(cached)), allocated_block_ids=list(range(100)),
            num_saved_tokens=cached, request_configs=configs,
        )  # fmt: skip
        self.impl = SimpleNamespace(
            _request_trackers={"r": self.tracker}, _discard_partial_chunks=False, _block_size=BLOCK,
            _lmcache_chunk_size=CHUNK,
        )  # fmt: skip
        self.connector = object.__new__(LMCacheDisaggConnectorV1)
        self.connector._lmcache_engine = self.impl
        self.heard = Heard()
        loads = LoadScheduler(LoadPolicy("always"))
        self.connector._scheduler = DisaggScheduler(self.impl, "kv_producer", loads, self.heard)
        self.first = True

    def step(self, tokens, patched=True):
        if self.first:
            self.tracker.token_ids = list(range(self.done + tokens))
        else:
            self.tracker.update(list(range(self.done, self.done + tokens)), None)
        self.done += tokens
        meta = LMCacheConnectorMetadata()
        request = ReqMeta.from_request_tracker(self.tracker, BLOCK, CHUNK, None, False)
        if request is not None:
            meta.add_request(request)
        if patched:
            new = [SimpleNamespace(req_id="r", prompt_token_ids=[0] * self.prompt_len, num_computed_tokens=0)]
            output = SimpleNamespace(
                scheduled_new_reqs=new if self.first else [], num_scheduled_tokens={"r": tokens},
                scheduled_cached_reqs=SimpleNamespace(req_ids=[], resumed_req_ids=set(), num_computed_tokens=[]),
            )  # fmt: skip
            self.impl.build_connector_meta = lambda _: meta
            meta = self.connector.build_connector_meta(output)
        self.first = False
        assert len(meta.requests) <= 1
        if not meta.requests or not meta.requests[0].save_spec.can_save:
            return None
        request = meta.requests[0]
        return request.save_spec.skip_leading_tokens, len(request.token_ids)


def covered(prefill, steps, patched=True):
    """Prompt tokens that are stored in the end; each step must go on where the last one stopped."""
    upto = prefill.tracker.num_saved_tokens
    for tokens in steps:
        stored = prefill.step(tokens, patched)
        if stored is not None:
            assert stored[0] <= upto
            upto = max(upto, stored[1])
    return upto


@pytest.mark.parametrize(
    ("prompt", "steps"),
    [
        (5, [5]),
        (CHUNK, [CHUNK]),
        (100, [100]),
        (100, [70, 30]),
        (100, [99, 1]),
        (65, [64, 1]),
        (300, [100, 100, 100]),
        (129, [128, 1]),
        (190, [130, 60]),
    ],
)
def test_the_whole_prompt_is_stored_however_it_is_prefilled(prompt, steps):
    assert covered(Prefill(prompt), steps) == prompt


def test_stock_lmcache_leaves_the_tail_out():
    """Why build_connector_meta is extended; when this fails, LMCache has mended it and the extension can go."""
    assert covered(Prefill(100), [70, 30], patched=False) == 64
    assert covered(Prefill(100), [99, 1], patched=False) == 64


@pytest.mark.parametrize(("cached", "prompt"), [(CHUNK, 100), (2 * CHUNK, 129), (CHUNK, 65)])
def test_the_tail_after_a_cached_prefix_is_stored(cached, prompt):
    prefill = Prefill(prompt, cached=cached)
    assert prefill.step(prompt - cached) == (cached, prompt)


def test_decoding_stores_nothing_more():
    prefill = Prefill(100)
    prefill.step(100)
    assert [prefill.step(1) for _ in range(3)] == [None] * 3
    assert prefill.tracker.num_saved_tokens == 100


def test_every_request_is_announced_once_and_unstored_ones_end():
    prefill = Prefill(100)
    prefill.step(70)
    prefill.step(30)
    assert prefill.heard.said == [("begin", "r")]
    unstored = Prefill(100, configs={"lmcache.skip_save": True})
    assert unstored.step(70) is None
    assert unstored.step(30) is None
    assert unstored.heard.said == [("begin", "r"), ("end", "r", "none", "")]


def test_an_unstored_request_whose_beginning_the_store_has_is_looked_up_by_no_worker():
    """LMCache speaks of such a request, for its load; a lookup of what was never to be stored would fail."""
    worker = make_worker(SimpleNamespace())
    asked = []
    worker._tracker = SimpleNamespace(confirm=lambda request_id, *_: asked.append(request_id))
    stored, unstored = (
        ReqMeta(name, [0] * 70, torch.arange(70), is_last_prefill=True, save_spec=SaveSpec(64, name == "stored"),
                load_spec=LoadSpec(0, 64, True), request_configs={"lmcache.skip_save": name == "unstored"})
        for name in ("stored", "unstored")
    )  # fmt: skip
    worker.step_end([stored, unstored])
    assert asked == ["stored"]


# loads


def checked(loaded, cached=0, tokens=200):
    """Block numbers reported for a load of ``tokens`` of which ``loaded`` arrived and vLLM had ``cached``."""

    def retrieve(token_ids, mask, **kwargs):
        arrived = torch.zeros(tokens, dtype=torch.bool)
        arrived[:loaded] = True
        assert int((~mask).sum()) == cached // CHUNK * CHUNK
        assert kwargs["vllm_cached_tokens"] == cached
        return arrived & mask

    worker = make_worker(SimpleNamespace(retrieve=retrieve))
    worker.start_load([to_load(tokens, cached, slots=torch.arange(tokens) + 10 * BLOCK)])
    return worker.take_failed_blocks()


def test_complete_loads_report_nothing():
    assert checked(200) == set()
    assert checked(200, cached=96) == set()


def test_missing_tokens_are_reported():
    assert checked(0) == {10, 11, 12, 13, 14, 15, 16}
    assert checked(128) == {14, 15, 16}


def test_missing_tokens_are_reported_when_counts_would_hide_them():
    # 96 tokens cached in vLLM: LMCache loads from 64, gets 64 of 136 and needs 104; with 32 more it would be content
    assert checked(192, cached=96) == {16}


def test_blocks_that_vllm_had_are_never_reported():
    assert checked(64, cached=96) == {13, 14, 15, 16}


# the choice to load


def test_a_request_that_loads_is_as_without_a_policy():
    scheduler = Scheduler(True, found=300)
    meta, tokens = scheduler.schedule()
    assert tokens == 299
    assert meta.requests[0].load_spec.can_load
    assert (meta.step.compute_tokens, meta.step.released) == (0, [])
    assert scheduler.connector.get_kv_connector_stats().data == {"loads": 1}


@pytest.mark.parametrize("role", ["kv_consumer", "kv_producer"])
def test_a_request_that_computes_loads_nothing_and_leaves_nothing_behind(role):
    scheduler = Scheduler(False, found=256, role=role)
    meta, tokens = scheduler.schedule(cached=64)
    assert tokens == 0
    assert all(not request.load_spec or not request.load_spec.can_load for request in meta.requests)
    assert (meta.step.compute_tokens, meta.step.released) == (236, ["r"])
    assert scheduler.connector.get_kv_connector_stats().data == {"recomputes": 1, "recomputed_tokens": 192}
    assert scheduler.impl.load_specs == {}
    if role == "kv_producer":
        saved = [request.save_spec for request in meta.requests if request.save_spec.can_save]
        assert [spec.skip_leading_tokens for spec in saved] == [0], "stored whole, as if the store had nothing"
    scheduler.connector.request_finished(scheduler.request, [])
    assert scheduler.loads._choices == {}


@pytest.mark.parametrize("loads", [True, False])
def test_a_preempted_request_comes_back(loads):
    scheduler = Scheduler(loads, found=256)
    scheduler.schedule()
    meta, tokens = scheduler.schedule(cached=64, resumed=True)  # LMCache checks the count of tokens itself
    assert tokens == (192 if loads else 0)
    assert meta.step.compute_tokens == (0 if loads else 236)  # the 44 left are too few to be measured
    assert len(scheduler.connector.get_kv_connector_stats().data) == (1 if loads else 2)


def test_what_the_store_lacks_is_no_choice():
    scheduler = Scheduler(False, found=0)
    meta, tokens = scheduler.schedule()
    assert (tokens, meta.step.released, meta.step.compute_tokens) == (0, [], 300)
    assert scheduler.connector.get_kv_connector_stats() is None


def worker_output(worker):
    return SimpleNamespace(
        kv_connector_stats=worker.meter.take(), invalid_block_ids=worker.take_failed_blocks(),
        finished_recving=worker.take_finished(),
    )  # fmt: skip


def test_measurements_go_from_the_worker_through_the_scheduler_to_the_totals():
    scheduler = Scheduler(True, found=300)
    meta, _ = scheduler.schedule()
    unpinned = []
    engine = SimpleNamespace(
        retrieve=lambda tokens, mask=None, **kwargs: torch.ones(len(tokens), dtype=torch.bool),
        lookup_unpin=unpinned.append,
    )
    worker = make_worker(engine)
    meta.step.compute_tokens, meta.step.released = 300, ["q"]
    scheduler.loads._steps[meta.step.number] = [(300, 300)]
    worker.step_begin(meta.step)
    worker.start_load([to_load(300, cached=44)])
    worker.forward_end()
    worker.step_end([])
    assert unpinned == ["q", "r"]
    output = worker_output(worker)
    scheduler.connector.update_connector_output(output)
    assert output.kv_connector_stats is None, "what the workers measured is for the scheduler alone"
    totals = scheduler.connector.get_kv_connector_stats().data
    assert (totals["loads"], totals["loaded_tokens"], totals["compute_tokens"]) == (1, 256, 300)
    assert totals["load_seconds"] > 0
    assert scheduler.connector.get_kv_connector_stats() is None
    assert worker.meter.take() is None


def test_a_load_that_ended_is_told_without_a_forward_pass():
    """While the only request waits for its load there is no forward pass, and vLLM calls no ``wait_for_save``."""
    unpinned = []
    engine = SimpleNamespace(
        retrieve=lambda tokens, mask=None, **kwargs: torch.zeros(len(tokens), dtype=torch.bool),
        lookup_unpin=unpinned.append,
    )
    connector = object.__new__(LMCacheDisaggConnectorV1)
    connector._lmcache_engine = SimpleNamespace(get_block_ids_with_load_errors=set)
    worker = connector._worker = make_worker(engine)
    load = LoadRequest("r", list(range(100)), [7, 3, 9, 4], 0, 0, 99)
    worker.step_begin(StepMetadata(1, 0, ["q"], [load]))
    worker.start_load([])
    finished = set()

    def is_told() -> bool:
        finished.update(connector.get_finished(set())[1] or ())
        worker.step_begin(StepMetadata(2))
        return bool(finished)

    wait_until(is_told, "the load is told")
    assert finished == {"r"}
    assert connector.get_block_ids_with_load_errors() == {3, 4, 7, 9}
    assert unpinned == ["q", "r"]
    worker.close()


def test_a_runner_that_reports_only_transfers_is_helped(monkeypatch):
    from vllm.v1.outputs import KVConnectorOutput

    monkeypatch.setattr(KVConnectorOutput, "__init__", KVConnectorOutput.__init__)
    connector = object.__new__(LMCacheDisaggConnectorV1)
    connector._lmcache_engine = SimpleNamespace(get_block_ids_with_load_errors=lambda: {3})
    connector._worker = make_worker(SimpleNamespace())
    connector._worker.failed_blocks = {4}
    connector._worker.step_begin(StepMetadata(1, 300))
    connector._worker.forward_end()
    patches.report_everything(connector)
    output = KVConnectorOutput(finished_sending=None, finished_recving={"r"})
    assert (output.finished_recving, output.invalid_block_ids) == ({"r"}, {3, 4})
    assert list(output.kv_connector_stats.data) == ["step_times"]
    own = KVConnectorOutput(invalid_block_ids={5})
    assert (own.invalid_block_ids, own.kv_connector_stats) == ({5}, None)


def test_slow_loads_make_auto_compute(monkeypatch):
    """Requests one after the other, each measured by a worker: loads take 2 ms a token, computing takes 1 ms."""
    clock = SimpleNamespace(now=0.0)
    clock.mark, clock.seconds = lambda: clock.now, lambda begin, end: end - begin
    monkeypatch.setattr(kv_meter, "make_clock", lambda device: clock)

    def retrieve(tokens, mask=None, **kwargs):
        clock.now += 0.002 * len(tokens)
        return torch.ones(len(tokens), dtype=torch.bool)

    worker = make_worker(SimpleNamespace(retrieve=retrieve), "any")
    loads = LoadScheduler(LoadPolicy("auto"))
    loads.policy.record_compute(256, 0.256)  # the calibration
    loaded = []
    for _ in range(10):
        scheduler = Scheduler(True, found=300)
        scheduler.connector._scheduler.loads = loads
        meta, tokens = scheduler.schedule()
        worker.step_begin(meta.step)
        if tokens:
            worker.start_load([to_load(300)])
        clock.now += 0.001 * (300 - tokens)
        worker.forward_end()
        worker.step_end([])
        output = worker_output(worker)
        scheduler.connector.update_connector_output(output)
        scheduler.connector.request_finished(scheduler.request, [])
        loaded.append(tokens)
    assert loaded == [299] * LOADS_TRUSTED + [0] * (10 - LOADS_TRUSTED)
    totals = scheduler.connector.get_kv_connector_stats().data
    assert totals == {
        "loads": 3,
        "loaded_tokens": 900,
        "load_seconds": pytest.approx(1.8),
        "recomputes": 7,
        "recomputed_tokens": 7 * 299,
        "compute_tokens": 2100,
        "compute_seconds": pytest.approx(2.1),
    }


def test_an_incomplete_load_is_no_measurement():
    engine = SimpleNamespace(retrieve=lambda tokens, mask=None, **kwargs: torch.zeros(len(tokens), dtype=torch.bool))
    worker = make_worker(engine)
    worker.step_begin(StepMetadata(1, 0))
    worker.start_load([to_load(64)])
    (load,) = worker.meter.take().data["load_times"].values()
    assert load[2] == 0


# visibility


class Store:
    def __init__(self, present=10**6):
        self.present = present

    async def batched_async_contains(self, lookup_id, keys):
        return min(self.present, len(keys))


@pytest.fixture
def tracker(monkeypatch):
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    engine = SimpleNamespace(
        storage_manager=SimpleNamespace(loop=loop),
        is_healthy=lambda: engine.healthy,
        healthy=True,
        token_database=SimpleNamespace(process_tokens=lambda tokens, request_configs: [(0, 0, t) for t in tokens]),
        store=Store(),
    )
    monkeypatch.setattr(patches, "remote_backend", lambda e: SimpleNamespace(connection=e.store))
    yield PutTracker(engine, Heard(), 0, 1, wait_timeout_s=60)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def ends(tracker, count=1):
    said = tracker._announcer.said
    wait_until(lambda: len(said) >= count, "the end is announced")
    return said


def test_end_comes_after_the_last_put(tracker):
    tracker.submitted(["a", "b", "b"])
    tracker.confirm("r1", ["a", "b"], None)
    tracker.done("a")
    tracker.done("b")
    tracker.confirm("r2", ["c"], None)
    assert ends(tracker) == [("end", "r2", "stored", "")]
    tracker.done("b")
    assert ends(tracker, 2)[1] == ("end", "r1", "stored", "")


def test_put_that_never_ends(tracker):
    tracker._timeout_s = 0.5
    tracker.submitted(["a"])
    tracker.confirm("r", ["a"], None)
    assert ends(tracker)[0][:3] == ("end", "r", "failed")
    assert "0.5 s" in ends(tracker)[0][3]


def test_lost_chunks_and_dead_stores_are_told(tracker):
    tracker._engine.store.present = 2
    tracker.confirm("r", ["a", "b", "c"], None)
    assert ends(tracker)[0] == ("end", "r", "failed", "1 of 3 chunks are not in the KV store")
    tracker._engine.healthy = False
    tracker.confirm("r", ["a"], None)
    assert "unhealthy" in ends(tracker, 2)[1][3]


# refusals and names


def vllm_config(device="cpu", mla=False, cache_dtype="auto"):
    return SimpleNamespace(
        device_config=SimpleNamespace(device=torch.device(device)),
        model_config=SimpleNamespace(use_mla=mla),
        cache_config=SimpleNamespace(cache_dtype=cache_dtype),
        parallel_config=SimpleNamespace(
            pipeline_parallel_size=1, data_parallel_size=1, data_parallel_rank_local=None, world_size=1
        ),
    )


@pytest.fixture
def choose(monkeypatch):
    """choose(asked, compiled, **config): who copies."""

    def one(asked="", compiled=False, **config):
        monkeypatch.setenv("DISAGG_KV_COPY", asked)
        monkeypatch.setattr(support, "lmcache_is_compiled", lambda: compiled)
        return support.choose_copy(vllm_config(**config), from_environment().copy)

    return one


def test_refuses_what_it_cannot_move(choose):
    assert choose() == "own"
    for device in ("cpu", "cuda"):
        with pytest.raises(UnsupportedKVLayout, match=f"MLA models are not supported on {device}"):
            choose(device=device, mla=True)
        for dtype in ("fp8", "fp8_e5m2", "int8"):
            with pytest.raises(UnsupportedKVLayout, match=f"--kv-cache-dtype {dtype}"):
                choose(device=device, cache_dtype=dtype)
    with pytest.raises(UnsupportedKVLayout, match="MLA"):
        choose("own", compiled=True, device="cuda", mla=True)


def test_lmcaches_copy_where_it_can_do_more(choose):
    assert choose(device="meta", mla=True, cache_dtype="fp8") == "stock"
    assert choose(device="meta") == "stock"
    assert choose("own", device="meta") == "own"
    assert choose(compiled=True, device="cuda") == "auto"
    assert choose(compiled=True, device="cuda", mla=True) == "stock"
    assert choose("stock", compiled=True, device="cuda") == "stock"


def test_prompts_without_token_ids_are_refused():
    config = vllm_config()
    support.refuse_model(config)
    config.model_config.enable_prompt_embeds = True
    config.kv_transfer_config = SimpleNamespace(kv_role="kv_producer")
    with pytest.raises(ValueError, match="--enable-prompt-embeds is not supported"):
        LMCacheDisaggConnectorV1(config, KVConnectorRole.SCHEDULER)


def test_a_choice_that_cannot_be_is_refused(choose):
    with pytest.raises(ValueError, match="DISAGG_KV_COPY 'fast': allowed: auto, own, stock"):
        choose("fast")
    for device in ("cpu", "cuda"):
        with pytest.raises(ValueError, match=f"DISAGG_KV_COPY=stock: LMCache cannot copy the KV cache on {device}"):
            choose("stock", device=device)


def test_copies_wait_for_vllms_stream(monkeypatch):
    done = []

    class Stream:
        def wait_stream(self, stream):
            done.append(("waits for", stream))

    copies = SimpleNamespace(
        store_stream=Stream(),
        batched_from_gpu=lambda *a, **k: done.append(("copies", a, k)),
        batched_to_gpu=None,
    )
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "vllm's")
    patches.order_streams(copies)
    copies.batched_from_gpu(1, x=2)
    assert done == [("waits for", "vllm's"), ("copies", (1,), {"x": 2})]


def connector_for(layers):
    config = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=layers))
    return PagedKVConnector(config, 2, 32)


def test_refuses_unknown_layers_and_layouts():
    with pytest.raises(UnsupportedKVLayout, match="no KV cache update"):
        connector_for({}).register({"layer": torch.zeros(4, 2, 32, 64)})
    layer = SimpleNamespace(impl=SimpleNamespace(do_kv_cache_update=lambda *a: None))
    with pytest.raises(UnsupportedKVLayout, match="elements"):
        connector_for({"layer": layer}).register({"layer": torch.zeros(4, 576)})

    def picky(*args):
        raise RuntimeError("another shape please")

    layer_of_picky = SimpleNamespace(impl=SimpleNamespace(do_kv_cache_update=picky))
    with pytest.raises(UnsupportedKVLayout, match=r"cannot fill one block.*another shape"):
        connector_for({"layer": layer_of_picky}).register({"layer": torch.zeros(4, 2, 32, 64)})
    with pytest.raises(UnsupportedKVLayout, match="as they are"):
        connector_for({"layer": layer}).register({"layer": torch.zeros(4, 2, 32, 64)})


def test_refuses_layers_of_another_shape_than_the_models():
    """vLLM's cache update runs past a block that has fewer heads than the layer: it hung here."""
    written = []
    impl = SimpleNamespace(num_kv_heads=4, head_size=32, do_kv_cache_update=lambda *a: written.append(a))
    with pytest.raises(UnsupportedKVLayout, match="has 4 KV heads of 32, the model's configuration says 2 of 32"):
        connector_for({"layer": SimpleNamespace(impl=impl)}).register({"layer": torch.zeros(4, 4, 32, 64)})
    assert written == []


@pytest.mark.parametrize("connector", [LMCacheDisaggConnectorV1, LMCacheDisaggMPConnector])
@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("pipeline_parallel_size", 2, "--pipeline-parallel-size 2 is not supported"),
        ("data_parallel_size", 2, "--data-parallel-size is not supported"),
        ("data_parallel_rank_local", 1, "--data-parallel-size is not supported"),
    ],
)
def test_ways_of_several_cards_that_are_refused(connector, name, value, said):
    config = vllm_config()
    setattr(config.parallel_config, name, value)
    config.kv_transfer_config = SimpleNamespace(kv_role="kv_producer")
    with pytest.raises(ValueError, match=said):
        connector.get_required_kvcache_layout(config)
    with pytest.raises(ValueError, match=said):
        connector(config, KVConnectorRole.SCHEDULER)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("is_attention_free", "Mamba or linear attention layers are not supported"),
        ("has_inner_state", "Mamba or linear attention layers are not supported"),
        ("is_encoder_decoder", "encoder-decoder models are not supported"),
    ],
)
@pytest.mark.parametrize("connector", [LMCacheDisaggConnectorV1, LMCacheDisaggMPConnector])
def test_models_whose_requests_need_more_than_kv_by_tokens_are_refused(connector, name, said):
    config = vllm_config()
    assert connector.get_required_kvcache_layout(config) is None
    setattr(config.model_config, name, True)
    config.kv_transfer_config = SimpleNamespace(kv_role="kv_producer")
    with pytest.raises(UnsupportedKVLayout, match=said):
        connector(config, KVConnectorRole.SCHEDULER)
    with pytest.raises(UnsupportedKVLayout, match=said):  # vLLM asks this before it lays out the KV cache
        connector.get_required_kvcache_layout(config)


def test_is_lmcaches_connector_to_vllm_and_to_the_gaudi_plugin():
    assert "LMCache" in LMCacheDisaggConnectorV1.__name__
    assert issubclass(LMCacheDisaggConnectorV1, KVConnectorBase_V1)
    assert hasattr(LMCacheConnectorV1Impl, "build_connector_meta")
