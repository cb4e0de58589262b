"""The metrics table: shared by the workers, bounded, and rid of what is gone."""

from __future__ import annotations

import os
from collections.abc import Iterator

import proxy_harness  # noqa: F401 (makes the package importable)
import pytest

from disagg_prefill_lmcache_v1.proxy import metrics as proxy_metrics
from disagg_prefill_lmcache_v1.proxy.metrics import Metrics, new_slots


@pytest.fixture
def slots() -> Iterator[list[int]]:
    descriptors = new_slots(2)
    yield descriptors
    for descriptor in descriptors:
        os.close(descriptor)


def shown(metrics: Metrics) -> dict[str, float]:
    lines = [line for line in metrics.render().decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def up(number: int) -> tuple[str, str, str]:
    return "disagg_upstream_up", "decode", f"http://10.0.0.1:{number}"


def test_workers_are_added_up_and_a_state_is_the_largest(slots: list[int]) -> None:
    first, second = Metrics(slots, 0), Metrics(slots, 1)
    for metrics, number in ((first, 1), (second, 2)):
        metrics.add("disagg_retries", "decode", by=number)
        metrics.set("disagg_in_flight", "decode", to=number)
        metrics.set("disagg_kv_degraded", to=1.0)
        metrics.observe(metrics.index("disagg_ttft_seconds"), number)
    for metrics in (first, second):
        found = shown(metrics)
        assert found['disagg_retries_total{role="decode"}'] == 3
        assert found['disagg_in_flight{stage="decode"}'] == 3
        assert found["disagg_kv_degraded"] == 1
        assert (found["disagg_ttft_seconds_count"], found["disagg_ttft_seconds_sum"]) == (2, 3)
        assert found['disagg_ttft_seconds_bucket{le="1.0"}'] == 1


def test_who_takes_the_place_of_a_crashed_worker_counts_on_but_has_nothing_in_progress(slots: list[int]) -> None:
    crashed = Metrics(slots, 0)
    crashed.add("disagg_retries", "decode")
    crashed.set("disagg_in_flight", "decode", to=7)
    crashed.observe(crashed.index("disagg_ttft_seconds"), 0.5)
    new = Metrics(slots, 0)
    new.add("disagg_retries", "decode")
    new.observe(new.index("disagg_ttft_seconds"), 0.5)
    new.set(*up(1), to=1.0)
    found = shown(Metrics(slots, 1))
    assert found['disagg_retries_total{role="decode"}'] == 2
    assert found["disagg_ttft_seconds_count"] == 2
    assert found.get('disagg_in_flight{stage="decode"}', 0) == 0
    assert found['disagg_upstream_up{role="decode",upstream="http://10.0.0.1:1"}'] == 1


def test_series_of_servers_that_are_gone_are_left_out_and_their_room_is_used_again(slots: list[int]) -> None:
    metrics = Metrics(slots, 0)
    metrics.add("disagg_retries", "decode")
    for number in range(20_000):  # far more than the table holds
        metrics.set(*up(number), to=1.0)
        metrics.remove([up(number - 1), up(-1)])
    found = shown(Metrics(slots, 1))
    assert [name for name in found if name.startswith("disagg_upstream_up")] == [
        'disagg_upstream_up{role="decode",upstream="http://10.0.0.1:19999"}'
    ]
    assert found['disagg_retries_total{role="decode"}'] == 1
    assert found["disagg_metric_updates_dropped_total"] == 0


def test_a_full_table_drops_what_it_has_no_room_for_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    metrics = Metrics()
    for number in range(proxy_metrics._VALUES):
        metrics.set(*up(number), to=1.0)
    late = "disagg_retries", "role" * 20
    metrics.add(*late)
    metrics.observe(metrics.index("disagg_e2e_seconds"), 1.0)
    found = shown(metrics)
    assert f'disagg_retries_total{{role="{late[1]}"}}' not in found
    assert found["disagg_metric_updates_dropped_total"] > 2
    assert sum(found[name] for name in found if name.startswith("disagg_upstream_up")) == sum(
        name.startswith("disagg_upstream_up") for name in found
    )
    assert "too many metric series" in caplog.text
    assert len(caplog.records) == 1
    metrics.remove([up(0), up(1)])
    metrics.add(*late, by=5.0)
    assert shown(metrics)[f'disagg_retries_total{{role="{late[1]}"}}'] == 5


def test_a_reader_never_sees_half_of_a_change(slots: list[int]) -> None:
    """A fork changes names all the time while this process reads them."""
    metrics = Metrics(slots, 0)
    metrics.add("disagg_retries", "decode")
    pid = os.fork()
    if pid == 0:
        number = 0
        while os.getppid() != 1:
            number += 1
            metrics.set(*up(number), to=1.0)
            metrics.remove([up(number - 1)])
        os._exit(0)
    try:
        reader = Metrics(slots, 1)
        for _ in range(200):
            found = shown(reader)
            assert found['disagg_retries_total{role="decode"}'] == 1
            assert sum(name.startswith("disagg_upstream_up") for name in found) in (0, 1, 2)
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
