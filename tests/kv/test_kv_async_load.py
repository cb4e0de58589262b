"""Loads in and beside the engine's steps with vLLM's real schedulers: what was not loaded is computed, never used."""

from __future__ import annotations

import random
import threading
from types import SimpleNamespace

import pytest
import torch
from kv_sides import BLOCK, CHUNK, make_worker, to_load
from launch_harness import wait_until
from simulated_engine import SimulatedEngine, expected_answer

from disagg_prefill_lmcache_v1.kv import support
from disagg_prefill_lmcache_v1.kv.load_scheduler import LoadRequest, StepMetadata
from disagg_prefill_lmcache_v1.kv.loader import BackgroundLoader

ANSWER = 6
WAYS = [
    (False, False),
    (False, True),
    (True, True),
]  # (asynchronous scheduling, asynchronous loads): those that are right


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("model")


def prompts(seed, count=16):
    chosen = random.Random(seed)
    borders = [BLOCK, BLOCK + 1, CHUNK, CHUNK + 1, 2 * CHUNK, 5 * CHUNK + 1]
    lengths = [*borders, *(chosen.randrange(40, 400) for _ in range(count - len(borders)))]
    return {f"r{i}": [chosen.randrange(1000) for _ in range(length)] for i, length in enumerate(lengths)}


def every_third(how):
    """A third of all loads fails: wholly, in part, or after their first chunk."""
    count = iter(range(1, 10**6))

    def failing(request_id, tokens):
        if next(count) % 3:
            return tokens
        return {"whole": 0, "half": tokens // 2, "one chunk": CHUNK}[how]

    return failing


def wrong_answers(engine, wanted, keep=lambda i: True):
    for i, (name, prompt) in enumerate(wanted.items()):
        if keep(i):
            engine.store.put(prompt)
        engine.add(name, prompt, ANSWER)
    engine.run()
    return [name for name, prompt in wanted.items() if engine.answers[name] != expected_answer(prompt, ANSWER)]


@pytest.mark.parametrize(("overlapped", "async_load"), WAYS)
def test_whole_loads_are_used(folder, monkeypatch, overlapped, async_load):
    engine = SimulatedEngine(folder, monkeypatch, overlapped, async_load)
    wanted = prompts(1)
    assert wrong_answers(engine, wanted) == []
    assert sorted(engine.loader.ended) == (sorted(wanted) if async_load else [])
    assert engine.computed == len(wanted) * ANSWER, "nothing but the last token of a prompt and the answers"


@pytest.mark.parametrize("how", ["whole", "half", "one chunk"])
@pytest.mark.parametrize(("overlapped", "async_load"), WAYS)
def test_failed_loads_are_computed(folder, monkeypatch, overlapped, async_load, how):
    for seed in range(3):
        engine = SimulatedEngine(folder, monkeypatch, overlapped, async_load, every_third(how), seed=seed)
        assert wrong_answers(engine, prompts(seed, 24), keep=lambda i: i % 4) == []


@pytest.mark.parametrize("how", ["whole", "half"])
@pytest.mark.parametrize(("overlapped", "async_load"), WAYS)
def test_what_one_rank_could_not_load_is_computed_on_all(folder, monkeypatch, overlapped, async_load, how):
    for seed in range(3):
        engine = SimulatedEngine(folder, monkeypatch, overlapped, async_load, every_third(how), seed=seed, ranks=2)
        assert wrong_answers(engine, prompts(seed, 24)) == []


def test_a_store_of_which_every_load_fails_is_asked_once_for_a_request(folder, monkeypatch):
    asked = []

    def failing(request_id, tokens):
        asked.append(request_id)
        return 0

    engine = SimulatedEngine(folder, monkeypatch, True, True, failing)
    wanted = prompts(5)
    assert wrong_answers(engine, wanted) == []
    assert sorted(asked) == sorted(wanted)
    assert engine.connector._scheduler._failed == set(), "nothing is kept of requests that are done"
    assert engine.connector._scheduler._loading == {}
    assert engine.connector._lmcache_engine.load_specs == {}


def test_synchronous_loads_are_still_wrong_with_asynchronous_scheduling(folder, monkeypatch):
    """Why choose_async_load refuses it (vllm#49250). When this fails vLLM has mended it."""
    found = []
    for seed in range(3):
        engine = SimulatedEngine(folder, monkeypatch, True, False, every_third("whole"), seed=seed)
        found += wrong_answers(engine, prompts(seed, 24))
    assert found


@pytest.mark.parametrize(("overlapped", "async_load"), WAYS)
def test_preempted_requests_load_again(folder, monkeypatch, overlapped, async_load):
    """Few blocks: requests lose theirs and come back, some of their loads fail."""
    preempted = 0
    for seed in range(4):
        engine = SimulatedEngine(folder, monkeypatch, overlapped, async_load, every_third("half"), blocks=28, seed=seed)
        wanted = {name: prompt[:200] for name, prompt in prompts(seed, 20).items()}
        for prompt in wanted.values():
            engine.store.put(prompt)
        for name, prompt in wanted.items():
            engine.add(name, prompt, 40)
        engine.run()
        assert engine.answers == {name: expected_answer(prompt, 40) for name, prompt in wanted.items()}
        preempted += engine.preempted
    assert preempted, "the test is about preemption"


@pytest.mark.parametrize("overlapped", [False, True])
def test_an_abort_while_loading_frees_the_blocks_when_the_load_has_ended(folder, monkeypatch, overlapped):
    from vllm.v1.request import RequestStatus

    engine = SimulatedEngine(folder, monkeypatch, overlapped, True, every_third("half"), blocks=60)
    wanted = prompts(3, 12)
    for name, prompt in wanted.items():
        engine.store.put(prompt)
        engine.add(name, prompt, ANSWER)
    engine.step()
    aborted = {request.request_id for request in engine.loader.pending[:3]}
    assert aborted
    engine.scheduler.finish_requests(aborted, RequestStatus.FINISHED_ABORTED)
    held = len(engine.scheduler.requests)
    engine.run()
    for _ in range(40):  # until the loads of the aborted ones have ended
        engine.step()
    assert len(engine.scheduler.requests) == 0 < held
    pool = engine.scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1, "all but vLLM's null block"
    kept = {name: prompt for name, prompt in wanted.items() if name not in aborted}
    assert {name: engine.answers[name] for name in kept} == {n: expected_answer(p, ANSWER) for n, p in kept.items()}
    assert engine.connector._scheduler._loading == {}


# the worker alone


def test_a_load_needs_no_forward_context():
    """vLLM's V2 runner starts it outside one with full CUDA graphs; every request is loaded or reported."""
    from disagg_prefill_lmcache_v1.kv.connector import LMCacheDisaggConnectorV1

    asked = []

    def retrieve(tokens, mask, **kwargs):
        asked.append(kwargs["req_id"])
        if kwargs["req_id"] == "raises":
            raise OSError("the store is gone")
        return torch.full((len(tokens),), kwargs["req_id"] == "there")

    connector = object.__new__(LMCacheDisaggConnectorV1)
    connector._worker = make_worker(SimpleNamespace(retrieve=retrieve))
    connector._lmcache_engine = SimpleNamespace(
        use_layerwise=False, enable_blending=False, get_block_ids_with_load_errors=set
    )
    slots = [torch.arange(2 * BLOCK) + i * 10 * BLOCK for i in range(3)]
    requests = [to_load(2 * BLOCK, name=name, slots=slots[i]) for i, name in enumerate(("there", "lost", "raises"))]
    metadata = SimpleNamespace(requests=requests, step=StepMetadata(1))
    connector.bind_connector_metadata(metadata)
    connector.start_load_kv(None)
    assert asked == ["there", "lost", "raises"]
    assert connector.get_block_ids_with_load_errors() == {10, 11, 20, 21}


def test_layerwise_loads_without_attention_metadata_are_reported():
    """LMCache's own, which are left to LMCache, would return in silence."""
    from disagg_prefill_lmcache_v1.kv.connector import LMCacheDisaggConnectorV1

    connector = object.__new__(LMCacheDisaggConnectorV1)
    connector._worker = make_worker(SimpleNamespace())
    connector._lmcache_engine = SimpleNamespace(use_layerwise=True, get_block_ids_with_load_errors=set)
    connector._connector_metadata = SimpleNamespace(requests=[to_load(3 * BLOCK, cached=BLOCK)])
    connector.start_load_kv(SimpleNamespace(attn_metadata=None))
    assert connector.get_block_ids_with_load_errors() == {1, 2}


def load_request(name, blocks=(4, 5), end=2 * BLOCK, cached_blocks=0):
    return LoadRequest(name, [0] * end, list(blocks), cached_blocks * BLOCK, cached_blocks, end, step=3)


def test_the_engine_goes_on_while_a_load_runs():
    go = threading.Event()

    def retrieve(tokens, mask, **kwargs):
        assert go.wait(60)
        return torch.ones(len(tokens), dtype=torch.bool)

    worker = make_worker(SimpleNamespace(retrieve=retrieve))
    worker.step_begin(StepMetadata(3, loads=[load_request("slow")]))
    worker.start_load([])
    assert worker.take_finished() == set()
    go.set()
    worker.step_begin(StepMetadata(4))
    wait_until(lambda: worker.take_finished() == {"slow"}, "the load is told, without a forward pass")
    assert worker.take_failed_blocks() == set()
    assert list(worker.meter.take().data["load_times"]) == ["3:slow"]
    worker.close()


def test_what_a_load_lacks_is_told_no_later_than_its_end():
    def load(request):
        if request.request_id == "raises":
            raise RuntimeError("no")
        return {5}

    loader = BackgroundLoader(load, torch.device("cpu"))
    loader.start([load_request("part"), load_request("raises", blocks=(7, 8), cached_blocks=1)])
    ended = {}

    def all_ended():
        ended.update((request.request_id, failed) for request, failed in loader.take())
        return len(ended) == 2

    wait_until(all_ended, "both have ended")
    assert ended == {"part": {5}, "raises": {8}}, "block 7 is vLLM's own, perhaps of a request that is running"
    loader.close()


def test_a_device_without_threads_of_ours_loads_at_once():
    threads = []
    loader = BackgroundLoader(lambda request: threads.append(threading.current_thread()) or set(), torch.device("meta"))
    loader.start([load_request("r")])
    assert threads == [threading.current_thread()]
    assert [request.request_id for request, _ in loader.take()] == ["r"]


# the choice


@pytest.mark.parametrize(
    ("device", "overlapped", "asked", "chosen"),
    [
        ("cpu", False, "auto", False),
        ("cpu", False, "always", True),
        ("cuda", True, "auto", True),
        ("cuda", False, "auto", True),
        ("cuda", False, "never", False),
        ("hpu", False, "auto", False),
        ("hpu", True, "auto", True),
    ],
)
def test_how_loads_run(device, overlapped, asked, chosen):
    config = SimpleNamespace(
        device_config=SimpleNamespace(device=SimpleNamespace(type=device)),
        scheduler_config=SimpleNamespace(async_scheduling=overlapped),
    )
    assert support.choose_async_load(config, asked) is chosen


def test_the_wrong_pair_is_refused():
    config = SimpleNamespace(scheduler_config=SimpleNamespace(async_scheduling=True))
    with pytest.raises(ValueError, match="DISAGG_KV_ASYNC_LOAD=never needs --no-async-scheduling"):
        support.choose_async_load(config, "never")
