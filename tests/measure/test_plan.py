"""How many cards: the model against known results, a simulation and recorded runs; what the program says."""

from __future__ import annotations

import heapq
import json
import random
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from disagg_prefill_lmcache_v1.measure import plan
from disagg_prefill_lmcache_v1.measure.queueing import Arm, Load, Queue, Rates, Steps, Targets, best_split, erlang_c
from disagg_prefill_lmcache_v1.measure.recorded import read_run, steps_of
from disagg_prefill_lmcache_v1.settings import SettingsError

ROOT = Path(__file__).resolve().parents[2]
RECORDED = ROOT / "tests" / "measure" / "recorded"
RATES = Rates(prefill_s=0.2, step_s=0.006, slope_s=0.0005, handover_s=0.05)
LOAD = Load(rate=2.0, output_tokens=200)
TARGETS = Targets(ttft_s=0.5, tpot_s=0.015)


def simulated_waits(servers: int, service_s: float, rate: float, count: int = 60_000) -> list[float]:
    """Waits of a real queue: Poisson arrivals, equal prompts, first come first served."""
    random_ = random.Random(7)
    free = [0.0] * servers
    now, waits = 0.0, []
    for _ in range(count):
        now += random_.expovariate(rate)
        start = max(now, heapq.heappop(free))
        waits.append(start - now)
        heapq.heappush(free, start + service_s)
    return sorted(waits)


def test_erlangs_formula() -> None:
    assert erlang_c(1, 0.5) == pytest.approx(0.5)  # one server: it is busy half of the time
    assert erlang_c(2, 1.0) == pytest.approx(1 / 3)
    assert erlang_c(5, 4.0) == pytest.approx(0.5541, abs=1e-4)
    assert erlang_c(3, 3.0) == 1.0


@pytest.mark.parametrize(("servers", "busy"), [(1, 0.4), (1, 0.8), (4, 0.7), (16, 0.9)])
def test_waits_are_those_of_a_simulation(servers: int, busy: float) -> None:
    """Within a fifth of the mean, a quarter of the tail: what is stated of the model in its documentation is more."""
    queue = Queue(servers, 0.2, Load(busy * servers / 0.2, 200))
    waits = simulated_waits(servers, 0.2, queue.load.rate)
    assert queue.busy == pytest.approx(busy)
    assert queue.mean_wait_s == pytest.approx(statistics.fmean(waits), rel=0.2)
    assert queue.wait_quantile_s(0.99) == pytest.approx(waits[int(0.99 * len(waits))], rel=0.25)
    late = waits[int(0.9 * len(waits))]
    assert queue.share_within(late) == pytest.approx(0.9, abs=0.05)


def test_even_arrivals_wait_less_and_uneven_prompts_more() -> None:
    waits = {
        name: Queue(1, 0.2, Load(4.0, 200, arrival, prompts)).mean_wait_s
        for name, arrival, prompts in (("even", 0.01, 0.0), ("plain", 1.0, 0.0), ("uneven", 1.0, 1.0))
    }
    assert waits["even"] < waits["plain"] / 50
    assert waits["uneven"] == pytest.approx(2 * waits["plain"])


def test_steps_hold_as_many_requests_as_little_says() -> None:
    steps = Steps(1, RATES, LOAD)
    mean = steps.requests
    assert mean == pytest.approx(LOAD.rate * LOAD.output_tokens * steps.tpot_s(mean))
    assert Steps(1, RATES, LOAD.at(10.1)).requests == float("inf")  # 2,020 tokens a second, 0.5 ms each
    assert steps.share_within(0.0064) == 0.0
    assert 0.3 < steps.share_within(steps.tpot_s(mean + 1)) < 0.8
    assert steps.share_within(1.0) == pytest.approx(1.0)


def test_prompts_take_time_from_the_steps_of_whole_servers() -> None:
    pair, plain = Arm(1, 1, RATES, LOAD), Arm(0, 2, RATES, LOAD)
    assert plain.tpot_s > Steps(2, RATES, LOAD).tpot_s(plain.decode.requests)
    assert pair.ttft_quantile_s(0.5) > plain.ttft_quantile_s(0.5)
    assert pair.unloaded_ttft_s == pytest.approx(plain.unloaded_ttft_s + RATES.handover_s)


def test_the_best_rate_meets_the_targets_and_a_higher_one_does_not() -> None:
    for arm in (Arm(1, 1, RATES, LOAD), Arm(3, 1, RATES, LOAD), Arm(0, 4, RATES, LOAD)):
        rate = arm.best_rate(TARGETS)
        assert Arm(arm.prefillers, arm.decoders, RATES, LOAD.at(rate * 0.999)).attained(TARGETS) >= TARGETS.share
        assert Arm(arm.prefillers, arm.decoders, RATES, LOAD.at(rate * 1.01)).attained(TARGETS) < TARGETS.share
    assert Arm(1, 1, RATES, LOAD).best_rate(Targets(ttft_s=0.1)) == pytest.approx(0, abs=1e-6)
    assert Arm(1, 1, RATES, LOAD).best_rate(Targets(e2el_s=1.0)) == pytest.approx(0, abs=1e-6)
    assert Arm(1, 1, RATES, LOAD).best_rate(Targets(e2el_s=10.0)) > 1


def test_the_split_follows_the_load() -> None:
    long_answers, long_prompts = Load(1, 2000), Load(1, 20)
    decoders = best_split(16, RATES, long_answers, TARGETS).decoders
    prefillers = best_split(16, RATES, long_prompts, TARGETS).prefillers
    assert decoders > 11
    assert prefillers > 11
    small, large = (best_split(count, RATES, LOAD, TARGETS).load.rate / count for count in (2, 32))
    assert large > small


def test_steps_are_found_again() -> None:
    points = []
    for rate in (1.0, 2.0, 4.0):
        steps = Steps(1, RATES, LOAD.at(rate))
        points.append({"request_rate": rate, "tpot_ms": {"mean": 1000 * steps.tpot_s(steps.requests)}})
    step, slope = steps_of(points, 1, 200)
    assert step == pytest.approx(RATES.step_s)
    assert slope == pytest.approx(RATES.slope_s)
    assert steps_of(points[:1], 1, 200)[1] == 0.0


# --- the program


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "disagg_prefill_lmcache_v1.measure.plan", *argv]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_a_recorded_comparison_is_planned_from_and_checked_against() -> None:
    done = run("--run-dir", str(RECORDED), "--goodput", "ttft:500 tpot:15", "--request-rate", "10")
    assert done.returncode == 0, done.stderr
    page = (ROOT / "docs" / "performance.md").read_text()
    kept = [line for line in done.stdout.splitlines() if line and "requests/s: p" not in line]
    assert len(kept) > 12
    assert [line for line in kept if line not in page] == [], "docs/performance.md shows another output"
    assert "10 requests/s: pair: 8 cards" in done.stdout


def test_the_error_on_two_cards_is_what_the_documentation_says() -> None:
    settings = plan.PlanSettings(goodput="ttft:500 tpot:15", json=True)
    found = plan.plan(settings, read_run(RECORDED))
    ratios = [abs(told / seen - 1) for row in found["errors"] for told, seen in row["figures"].values()]
    assert len(ratios) == 14
    assert max(ratios) < 0.33
    assert sorted(ratios)[7] < 0.1


def test_single_requests_of_a_comparison_count(tmp_path: Path) -> None:
    content = json.loads((RECORDED / "compare.json").read_text())
    for arm in content["arms"].values():
        for point in arm["points"]:
            point["tpot_ms"] = {"mean": point["itl_ms"]["p50"]}
            point["requests"] = [
                {
                    "ttft_ms": 200.0 + number,
                    "input_tokens": 4000 + 4000 * (number % 2),
                    "output_tokens": 100,
                    "error": "",
                }
                for number in range(20)
            ]
    content["workload"] = {}
    (tmp_path / "compare.json").write_text(json.dumps(content))
    recorded = read_run(tmp_path)
    assert recorded.input_tokens == 6000
    assert recorded.output_tokens == 100
    assert recorded.input_cv == pytest.approx(1 / 3)
    assert recorded.prefill_s == pytest.approx(0.2019 - (recorded.step_s or 0))
    assert recorded.handover_s == 0
    rates, _ = plan.inputs(plan.PlanSettings(input_len=12000.0), recorded)
    assert rates.prefill_s == pytest.approx(2 * recorded.prefill_s), "a prompt twice as long takes twice the time"


def test_points_without_a_rate_do_not_count(tmp_path: Path) -> None:
    content = json.loads((RECORDED / "compare.json").read_text())
    expected = read_run(RECORDED)
    for arm in content["arms"].values():
        first = arm["points"][0]
        arm["points"] = [{**first, "request_rate": rate} for rate in ("inf", None, 0)] + arm["points"][::-1]
    (tmp_path / "compare.json").write_text(json.dumps(content))
    assert read_run(tmp_path) == expected


def test_what_a_full_server_serves_counts_not_what_arrives() -> None:
    steps = Steps(1, RATES, LOAD)
    point = {"request_rate": 50.0, "request_throughput": 2.0, "tpot_ms": {"mean": 1000 * steps.tpot_s(steps.requests)}}
    other = Steps(1, RATES, LOAD.at(1.0))
    low = {"request_rate": 1.0, "tpot_ms": {"mean": 1000 * other.tpot_s(other.requests)}}
    assert steps_of([low, point], 1, 200)[1] == pytest.approx(RATES.slope_s)


def test_a_summary_is_planned_from(tmp_path: Path) -> None:
    parts = {"prefill_queue": 80, "prefill": 200, "kv_wait": 30, "load": 20, "first_step": 9}
    summary = {"ttft_parts_ms": {name: {"p50": value} for name, value in parts.items()}, "itl_ms_p50": 8.0}
    (tmp_path / "summary.json").write_text(json.dumps({**summary, "input_len": 512, "output_len": 16}))
    recorded = read_run(tmp_path)
    assert recorded.prefill_s == pytest.approx(0.2)
    assert recorded.handover_s == pytest.approx(0.05)
    done = run("--run-dir", str(tmp_path), "--goodput", "ttft:1000", "--cards", "4", "--json")
    found = json.loads(done.stdout)
    assert [row["cards"] for row in found["rows"]] == [4]
    assert found["errors"] == []


def test_given_rates_need_no_run_and_win_over_one() -> None:
    flags = ["--input-len", "8000", "--output-len", "200", "--prefill-rate", "40000", "--step", "6"]
    done = run(*flags, "--goodput", "tpot:20,ttft:800", "--cards", "1,2", "--tensor-parallel-size", "1", "--json")
    found = json.loads(done.stdout)
    assert found["rates"]["prefill_s"] == 0.2
    assert found["rows"][0]["pair_rate"] is None, "one card is no pair"
    assert found["rows"][1]["split"] == [1, 1]
    settings = plan.PlanSettings(goodput="ttft:800", prefill_rate=80000.0)
    assert plan.inputs(settings, read_run(RECORDED))[0].prefill_s == pytest.approx(0.1)
    assert "not checked" in run(*flags, "--goodput", "ttft:800").stdout


def test_what_neither_way_can_do_is_said() -> None:
    done = run("--run-dir", str(RECORDED), "--goodput", "ttft:20", "--cards", "2", "--request-rate", "5")
    assert "neither meets the targets" in done.stdout
    assert "5 requests/s: pair: more cards than these" in done.stdout
    assert plan.better({"pair_rate": 10.0, "plain_rate": 9.5}) == "alike"


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        ((), "--goodput is needed"),
        (("--goodput", "fast"), "--goodput 'fast': allowed: ttft:MS, tpot:MS, e2el:MS"),
        (("--goodput", "ttft:500"), "--input-len is needed: the run does not tell it"),
        (("--goodput", "ttft:500", "--input-len", "9", "--output-len", "9"), "--prefill-rate is needed"),
        (("--goodput", "ttft:500", "--run-dir", "docs"), "allowed: a folder with compare.json or summary.json"),
        (("--goodput", "ttft:500", "--cards", "0"), "--cards '0': allowed: whole numbers"),
    ],
)
def test_what_cannot_be_planned_is_told_in_one_line(argv: tuple[str, ...], told: str) -> None:
    done = run(*argv)
    assert done.returncode == 2
    assert told in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not done.stdout


def test_a_file_that_is_none_is_told(tmp_path: Path) -> None:
    for text in ("{", "[]", '{"arms": {}}', '{"arms": {"plain": {"points": []}, "pair": {"points": []}}}'):
        (tmp_path / "compare.json").write_text(text)
        with pytest.raises(SettingsError, match="cannot be understood"):
            read_run(tmp_path)
