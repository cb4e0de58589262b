"""kv_meter: what a worker measures, how it gets to the scheduler and to /metrics, with vLLM's own classes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: its statistics are what is tested")

import msgspec
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorLogging

from disagg_prefill_lmcache_v1.kv import meter as kv_meter
from disagg_prefill_lmcache_v1.kv.load_scheduler import StepMetadata
from disagg_prefill_lmcache_v1.kv.meter import LoadMetrics, LoadStats, Meter, make_clock


class Clock:
    """Marks are times that the test sets; a mark later than ``reached`` has not been come to yet."""

    def __init__(self):
        self.now, self.reached = 0.0, 1e9

    def mark(self):
        return self.now

    def seconds(self, begin, end):
        return end - begin if end <= self.reached else None


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(kv_meter, "make_clock", lambda device: clock)
    return clock


def step(meter, clock, number=1, compute_tokens=300, compute_s=2.0, loads=(), after=False):
    """One step of a worker; vLLM begins loads before the forward pass or after it."""

    def load():
        for request_id, tokens, seconds in loads:
            begin = meter.load_begin()
            clock.now += seconds
            meter.load_end(begin, request_id, tokens)

    meter.step_begin(StepMetadata(number, compute_tokens))
    if not after:
        load()
    clock.now += compute_s
    if after:
        load()
    meter.step_end()


@pytest.mark.parametrize("after", [False, True])
def test_loads_are_no_part_of_computing(clock, after):
    meter = Meter("any")
    step(meter, clock, 7, loads=[("a", 300, 0.5), ("b", 20, 0.25)], after=after)
    stats = meter.take()
    assert stats.data == {
        "load_times": {"7:a": [0.5, 1, 300], "7:b": [0.25, 1, 20]},
        "step_times": {7: [2.0, 1]},
    }
    assert meter.take() is None


def test_steps_that_are_not_to_be_measured_are_not(clock):
    meter = Meter("any")
    step(meter, clock, compute_tokens=0)
    meter.step_begin(None)
    meter.load_end(meter.load_begin(), "a", 300)
    meter.step_end()
    meter.step_end()
    assert meter.take() is None


def test_a_card_is_not_waited_for(clock):
    meter = Meter("any")
    step(meter, clock, 1, loads=[("a", 300, 0.5)])
    step(meter, clock, 2)
    clock.reached = 0.1
    assert meter.take() is None
    clock.reached = 2.6
    assert meter.take().data == {"load_times": {"1:a": [0.5, 1, 300]}, "step_times": {1: [2.0, 1]}}
    clock.reached = 9.0
    assert meter.take().data == {"step_times": {2: [2.0, 1]}}


def test_clocks_of_devices(monkeypatch):
    class Event:
        done = False

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            pass

        def query(self):
            return self.done

        def elapsed_time(self, end):
            return 1500.0  # ms

    monkeypatch.setattr(kv_meter, "torch", SimpleNamespace(cuda=SimpleNamespace(Event=Event)))
    host, card = make_clock("cpu"), make_clock("cuda")
    assert host.seconds(host.mark(), host.mark()) >= 0
    begin, end = card.mark(), card.mark()
    assert card.seconds(begin, end) is None
    end.done = True
    assert card.seconds(begin, end) == 1.5
    assert make_clock("hpu") is None, "without events nothing can be told, and nothing is"
    meter = Meter("hpu")
    meter.step_begin(StepMetadata(1, 300))
    meter.load_end(meter.load_begin(), "a", 300)
    meter.step_end()
    assert meter.take() is None


def test_ranks_and_totals_add_up():
    ranks = [LoadStats(data={"step_times": {1: [s, 1]}, "load_times": {"1:a": [s, 1, t]}}) for s, t in ((1, 9), (2, 0))]
    both = ranks[0].aggregate(ranks[1])
    assert both.data == {"step_times": {1: [2, 2]}, "load_times": {"1:a": [2, 2, 0]}}
    assert both.reduce() == {}
    totals = LoadStats(data={"loads": 1, "load_seconds": 0.5}).aggregate(
        LoadStats(data={"loads": 2.0, "recomputes": 1})
    )
    assert totals.data == {"loads": 3, "load_seconds": 0.5, "recomputes": 1}
    assert totals.reduce() == totals.data
    totals.reset()
    assert totals.is_empty()


def test_vllms_log_takes_the_totals():
    logging = object.__new__(KVConnectorLogging)
    logging.connector_cls = SimpleNamespace(build_kv_connector_stats=lambda data: LoadStats(data=data))
    logging.reset()
    for _ in range(2):  # as they come from the engine, by message
        logging.observe(msgspec.msgpack.decode(msgspec.msgpack.encode({"loads": 1.0, "loaded_tokens": 300.0})))
    lines = []
    logging.log(lambda text, *args: lines.append(text % args))
    assert lines == ["KV Transfer metrics: loads=2.0, loaded_tokens=600.0"]


def test_totals_become_counters_of_each_engine(monkeypatch):
    registry = CollectorRegistry()
    monkeypatch.setattr(kv_meter, "REGISTRY", registry)

    def counter(**options):
        return Counter(registry=registry, **options)

    types = {Gauge: Gauge, Counter: counter, Histogram: Histogram}
    config = SimpleNamespace(kv_transfer_config=None)
    for _ in range(2):  # an engine made anew in the same process
        metrics = LoadMetrics(config, types, ["model_name", "engine"], {0: ["m", "0"], 1: ["m", "1"]})
    metrics.observe({"loads": 2, "loaded_tokens": 600, "load_seconds": 0.5, "step_times": {1: [1, 1]}})
    metrics.observe({"recomputes": 1, "recomputed_tokens": 299, "compute_tokens": 300, "compute_seconds": 1.5}, 1)
    metrics.observe({"loads": 1}, 0)
    text = generate_latest(registry).decode()
    for line in (
        'disagg_kv_load_decisions_total{choice="load",engine="0",model_name="m"} 3.0',
        'disagg_kv_load_decisions_total{choice="recompute",engine="0",model_name="m"} 0.0',
        'disagg_kv_load_decisions_total{choice="recompute",engine="1",model_name="m"} 1.0',
        'disagg_kv_loaded_tokens_total{engine="0",model_name="m"} 600.0',
        'disagg_kv_load_seconds_total{engine="0",model_name="m"} 0.5',
        'disagg_kv_recomputed_tokens_total{engine="1",model_name="m"} 299.0',
        'disagg_kv_compute_tokens_total{engine="1",model_name="m"} 300.0',
        'disagg_kv_compute_seconds_total{engine="1",model_name="m"} 1.5',
    ):
        assert line in text.splitlines()
