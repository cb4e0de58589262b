"""The load generator and the correctness probe, against mock servers: what is counted, and what makes a run fail."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mock_vllm import MAX_MODEL_LEN, MockVllm

from disagg_prefill_lmcache_v1.measure import load_and_verify, target
from disagg_prefill_lmcache_v1.measure.load import arrival_times
from disagg_prefill_lmcache_v1.measure.parts import percentile, summarise_parts
from disagg_prefill_lmcache_v1.measure.priority import go_first
from disagg_prefill_lmcache_v1.measure.probe import PROBE_MAX_ERRORS, compare_answers
from disagg_prefill_lmcache_v1.measure.settings import Settings
from disagg_prefill_lmcache_v1.measure.summary import format_table, write_summary
from disagg_prefill_lmcache_v1.measure.types import Answer, LoadError, UsageError

ROOT = Path(__file__).resolve().parents[2]


def run(mocks: tuple[MockVllm, MockVllm], **changes: Any) -> dict[str, Any]:
    base = {
        "decoder_url": ("http://127.0.0.1:9",),
        "warm_up": 0,
        "num_prompts": 5,
        "input_len": 50,
        "output_len": 4,
        "request_rate": 0,
        "request_timeout": 10,
    }
    urls = {"proxy_url": mocks[0].url, "prefiller_url": mocks[1].url}
    return load_and_verify.run(Settings(**{**base, **urls, **changes}))


def test_a_good_run_counts_everything(mocks: tuple[MockVllm, MockVllm]) -> None:
    mocks[0].kv_headers = {"x-kv-state": "stored", "x-kv-wait-ms": "3.5"}
    summary = run(mocks, decoder_url=(mocks[0].url,))
    assert summary["failures"] == []
    assert (summary["requests"], summary["errors"]) == (5, 0)
    assert summary["external_reused_tokens"] == 5 * 49
    assert (summary["prompt_tokens"], summary["reused_tokens"], summary["reuse_ratio"]) == (250, 245, 1.0)
    assert (summary["full_reuse_requests"], summary["output_tokens"]) == (5, 20)
    assert summary["outputs_match"] is True
    assert summary["probe_prompts"] == summary["probe_compared"] > 20
    assert summary["probe_reuse_ratio"] == 1.0
    assert summary["kv_wait_ms_p50"] == summary["kv_wait_ms_p99"] == 3.5
    assert (summary["kv_wait_timeouts"], summary["kv_states"].keys()) == (0, {"stored"})
    assert 0 < summary["ttft_ms_p50"] <= summary["ttft_ms_p99"]
    assert summary["itl_ms_p50"] is not None
    assert summary["model"] == "mock-model"
    assert summary["versions"]["vllm"] == "0.0.mock"
    assert json.loads(json.dumps(summary)) == summary


def test_what_the_two_servers_are_asked(mocks: tuple[MockVllm, MockVllm]) -> None:
    run(mocks, num_prompts=2)
    load = [body for body in mocks[0].bodies if "logprobs" not in body]
    assert len(load) == 2
    for body in load:
        assert body["stream_options"] == {"include_usage": True}
        assert len(body["prompt"]) == 50
        assert set(body["prompt"]) <= set(range(10, 500))
    disaggregated = [body for body in mocks[0].bodies if "logprobs" in body]
    references = mocks[1].bodies
    salts = [body.pop("cache_salt") for body in references]
    assert len(set(salts)) == len(salts), "a shared salt would share cached blocks"
    transfers = [body.pop("kv_transfer_params") for body in references]
    assert all(transfer["lmcache.skip_save"] is True for transfer in transfers)
    key = lambda body: json.dumps(body, sort_keys=True)  # noqa: E731
    assert sorted(map(key, disaggregated)) == sorted(map(key, references))
    sizes = {len(body["prompt"]) for body in references if "prompt" in body}
    assert {2, 15, 16, 17, 255, 256, 257, 512} <= sizes
    assert max(sizes) <= MAX_MODEL_LEN - 16
    assert any("messages" in body for body in references)
    assert {bool(body.get("stream")) for body in references} == {True, False}
    prompts = [key(body.get("prompt")) for body in references if "prompt" in body]
    assert len(set(prompts)) < len(prompts), "no repeated prompt"


def test_prompts_are_new_in_every_run_unless_seeded(mocks: tuple[MockVllm, MockVllm]) -> None:
    def prompts(**changes: Any) -> list[str]:
        mocks[0].bodies.clear()
        run(mocks, num_prompts=1, **changes)
        return sorted(json.dumps(body.get("prompt", body.get("messages"))) for body in mocks[0].bodies)

    assert not set(prompts()) & set(prompts())
    assert prompts(seed=5) == prompts(seed=5)


@pytest.mark.parametrize(
    ("cached", "ratio", "full", "passes"),
    [
        (lambda n: n - 1, 1.0, 5, True),
        (lambda n: n, 1.0, 5, True),  # never counted as more than all
        (lambda n: n - 1 if n != 50 else 48, 0.9795, 0, False),
        (lambda n: n - 1 if n != 50 else 0, 0.0, 0, False),
    ],
)
def test_reuse_below_the_threshold_fails(mocks, cached, ratio, full, passes) -> None:
    mocks[0].cached = cached
    summary = run(mocks)
    assert (summary["reuse_ratio"], summary["full_reuse_requests"]) == (ratio, full)
    assert bool(summary["failures"]) is not passes
    if not passes:
        assert summary["failures"] == [f"load: reuse ratio {ratio:g} is below --min-reuse-ratio 0.99"]
        assert summary["outputs_match"] is True
    assert run(mocks, min_reuse_ratio=0)["failures"] == []


@pytest.mark.parametrize(
    ("block", "reused", "ratio", "full"), [(32, 32, 1.0, 5), (25, 49, 1.0, 5), (32, 0, 0.0, 0), (64, 0, None, 5)]
)
def test_of_a_server_of_whole_blocks_no_more_is_wanted(mocks, block, reused, ratio, full) -> None:
    mocks[0].cached = lambda n: reused if n == 50 else n
    summary = run(mocks, reuse_block=block)
    assert (summary["reuse_ratio"], summary["full_reuse_requests"]) == (ratio, full)
    assert (summary["failures"] == []) is (ratio != 0)


def mock_choices(mocks: tuple[MockVllm, MockVllm], computes: Callable[[int], bool]) -> dict[str, Any]:
    """The proxy's mock plays the decoder too; what it computes, it does not reuse."""
    mocks[0].computes = computes
    mocks[0].cached = lambda tokens: 0 if computes(tokens) else tokens - 1
    return {"decoder_url": (mocks[0].url,)}


def test_what_was_chosen_and_what_it_took_is_told(mocks: tuple[MockVllm, MockVllm]) -> None:
    summary = run(mocks, kv_load="always", **mock_choices(mocks, lambda tokens: False))
    assert summary["failures"] == []
    told = {name: summary[name] for name in summary if name.startswith(("kv_lo", "kv_re", "kv_co", "kv_ca"))}
    assert told == {
        "kv_load": "always",
        "kv_load_requests": 5,
        "kv_recompute_requests": 0,
        "kv_loaded_tokens": 250,
        "kv_recomputed_tokens": 0,
        "kv_load_s": 0.0125,
        "kv_load_tokens_per_s": 20000,
        "kv_compute_tokens": 0,
        "kv_compute_s": 0,
        "kv_compute_tokens_per_s": None,
        "kv_calibration_tokens_per_s": None,
    }
    assert summary["probe_kv_load_requests"] == summary["probe_prompts"]
    table = format_table(summary)
    assert re.search(r"KV load always +5 requests loaded, 0 recomputed by choice", table)
    assert re.search(r"loaded +250 tokens in 0.0125 s, 20,000.0 tokens/s", table)


def test_the_parts_of_ttft_are_summed_up_and_the_slowest_is_named(mocks: tuple[MockVllm, MockVllm], tmp_path) -> None:
    mocks[0].kv_headers = {"x-request-id": "r", "server-timing": "prefill;dur=0.30, network;dur=0.01, load;dur=0.2"}
    summary = run(mocks)
    parts = summary["ttft_parts_ms"]
    assert parts["prefill"] == {"p50": 0.3, "p90": 0.3, "p99": 0.3, "mean": 0.3}
    assert list(parts) == ["prefill", "network", "load", "client"]
    assert summary["ttft_slowest_part"] in ("prefill", "client")
    assert parts["client"]["mean"] >= 0
    assert 0 <= summary["ttft_parts_close"] <= 1
    assert re.search(r"TTFT goes to .*prefill 0.3 ms \(\d+%\), .*load 0.2 ms \(", format_table(summary))
    each = summary["each_request"]
    assert [request["start_s"] for request in each] == sorted(request["start_s"] for request in each)
    for request in each:
        rest = max(request["ttft_ms"] - 0.51, 0)
        assert request["parts"] == pytest.approx(
            {"prefill": 0.3, "network": 0.01, "load": 0.2, "client": rest}, abs=0.011
        )
        assert (request["id"], request["input_tokens"], request["output_tokens"], request["error"]) == ("r", 50, 4, "")
        assert request["reused_tokens"] == 49
        assert 0 < request["ttft_ms"] <= request["e2el_ms"]
    text = write_summary(tmp_path, summary).read_text()
    assert json.loads(text) == summary
    assert len([line for line in text.splitlines() if '"start_s"' in line]) == 5, "a line each"


def test_a_token_without_text_is_a_token(mocks: tuple[MockVllm, MockVllm]) -> None:
    mocks[0].no_text = True
    for request in run(mocks, probe="off")["each_request"]:
        assert request["ttft_ms"] > 0
        assert len(request["itls_ms"]) == 3


def test_the_load_has_the_cpu_before_the_servers_where_that_is_allowed() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        begin = expected = os.getpriority(os.PRIO_PROCESS, other.pid)
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, other.pid, begin - 1)
            expected = -10
        go_first(other.pid)
        assert os.getpriority(os.PRIO_PROCESS, other.pid) == expected
        other.communicate(b"\n")


@pytest.mark.parametrize(("share", "close"), [(1.0, 1.0), (0.9, 0.0)])
def test_parts_that_do_not_sum_to_ttft_are_told(share: float, close: float) -> None:
    answers = [Answer(ttft_ms=200.0, parts={"prefill": 150.0 * share, "load": 50.0 * share}) for _ in range(4)]
    assert summarise_parts(answers)["ttft_parts_close"] == close


def test_every_key_of_the_summary_is_documented(mocks: tuple[MockVllm, MockVllm]) -> None:
    page = (ROOT / "docs" / "operations.md").read_text().partition("## summary.json")[2]
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    assert {key for row in rows for key in re.findall(r"`(\w+)`", row)} == set(run(mocks, num_prompts=1))


@pytest.mark.parametrize(("every", "reused", "ratio", "full"), [(1, 0, 0.0, 0), (3, 294 + 6, 0.6802, 6)])
def test_what_was_not_loaded_is_not_reused(
    mocks, monkeypatch, every: int, reused: int, ratio: float, full: int
) -> None:
    """A load that fails is computed, and vLLM goes on to count its tokens as cached."""
    monkeypatch.setattr(target, "WORKERS_REPORT_S", 0.3)
    mocks[0].load_fails = lambda index: index % every == 0
    changes = {"decoder_url": (mocks[0].url,), "num_prompts": 9, "probe": "off"}
    summary = run(mocks, **changes)
    missing = 441 - reused
    assert (summary["cached_tokens"], summary["reused_tokens"], summary["reuse_ratio"]) == (441, reused, ratio)
    assert (summary["full_reuse_requests"], summary["not_loaded_tokens"]) == (full, missing)
    cause = f"{missing} tokens that vLLM counts as cached were not loaded"
    assert summary["failures"] == [f"load: reuse ratio {ratio:g} is below --min-reuse-ratio 0.99: {cause}"]
    assert re.search(rf"reused tokens +{reused} \(.*% of those reusable\); vLLM counts 441", format_table(summary))
    assert run(mocks, **changes, min_reuse_ratio=ratio)["failures"] == []


def test_what_each_answer_tells_goes_before_all_counts(mocks: tuple[MockVllm, MockVllm]) -> None:
    mocks[0].tells_reuse = lambda index: 20 if index == 2 else 50  # a chunk was not there; 49 can be reused
    summary = run(mocks, decoder_url=(mocks[0].url,), probe="off")
    assert (summary["cached_tokens"], summary["reused_tokens"], summary["not_loaded_tokens"]) == (245, 216, 29)
    assert (summary["reuse_ratio"], summary["full_reuse_requests"]) == (0.8816, 4)
    assert len(summary["failures"]) == 1
    mocks[0].cached = lambda tokens: None
    assert run(mocks, decoder_url=(mocks[0].url,), probe="off")["reused_tokens"] == 49 * 5  # no index 2 any more


def test_the_probe_does_not_reuse_what_was_not_loaded(mocks, monkeypatch) -> None:
    monkeypatch.setattr(target, "WORKERS_REPORT_S", 0.3)
    mocks[0].load_fails = lambda index: True
    summary = run(mocks, decoder_url=(mocks[0].url,), num_prompts=0)
    assert (summary["probe_reused_tokens"], summary["probe_reuse_ratio"]) == (0, 0.0)
    assert summary["probe_not_loaded_tokens"] == summary["probe_cached_tokens"] > 1000
    assert len(summary["failures"]) == 1
    assert "probe: reuse ratio 0 is below" in summary["failures"][0]


def test_a_report_that_comes_late_counts(mocks: tuple[MockVllm, MockVllm]) -> None:
    """Workers report a load with a later step, maybe after the answer is there."""
    asked = itertools.count()
    mocks[0].load_fails = lambda index: next(asked) < 20  # the first four times that its counters are asked for
    summary = run(mocks, decoder_url=(mocks[0].url,), probe="off")
    assert (summary["reused_tokens"], summary["not_loaded_tokens"], summary["failures"]) == (245, 0, [])


def test_workers_that_measure_nothing_are_not_held_against_vllm(mocks: tuple[MockVllm, MockVllm]) -> None:
    """On some devices the model runner hands on no statistics of a connector."""
    mocks[0].tells_loads = False
    summary = run(mocks, decoder_url=(mocks[0].url,))
    assert (summary["reused_tokens"], summary["not_loaded_tokens"], summary["failures"]) == (245, None, [])


def test_never_to_load_is_no_missing_reuse(mocks: tuple[MockVllm, MockVllm]) -> None:
    summary = run(mocks, kv_load="never", **mock_choices(mocks, lambda tokens: True))
    assert summary["failures"] == []
    assert (summary["reused_tokens"], summary["reuse_ratio"], summary["full_reuse_requests"]) == (0, None, 0)
    assert (summary["kv_load_requests"], summary["kv_recompute_requests"]) == (0, 5)
    assert (summary["kv_recomputed_tokens"], summary["kv_compute_tokens_per_s"]) == (245, 1000)
    assert "5 recomputed by choice" in format_table(summary)
    # without its counters the mode alone excuses it
    assert run(mocks, kv_load="never")["failures"] == []
    assert len(run(mocks, kv_load="always")["failures"]) == 2


def test_auto_is_held_to_what_it_chose_to_load(mocks: tuple[MockVllm, MockVllm]) -> None:
    changes = mock_choices(mocks, lambda tokens: tokens < 200)  # all of the load, a part of the probe
    summary = run(mocks, kv_load="auto", calibrate="off", **changes)
    assert summary["failures"] == []
    assert (summary["reuse_ratio"], summary["probe_reuse_ratio"]) == (None, 1.0)
    assert 0 < summary["probe_kv_recompute_requests"] < summary["probe_prompts"]
    assert 0 < summary["probe_kv_load_requests"] < summary["probe_prompts"]
    mocks[0].cached = lambda tokens: 0 if tokens < 200 or tokens == 300 else tokens - 1  # 300: wanted, and not there
    summary = run(mocks, kv_load="auto", calibrate="off", **changes)
    assert len(summary["failures"]) == 1
    assert summary["failures"][0].startswith("probe: reuse ratio 0.")


def test_auto_is_calibrated_and_that_does_not_count(mocks: tuple[MockVllm, MockVllm]) -> None:
    summary = run(mocks, kv_load="auto", input_len=400, probe="off", **mock_choices(mocks, lambda tokens: False))
    first = mocks[0].bodies[:3]
    assert [len(body["prompt"]) for body in first] == [256, 256, 400]
    assert all(body["max_tokens"] == 1 and body["kv_transfer_params"]["lmcache.skip_save"] for body in first)
    assert len({body["cache_salt"] for body in first}) == 3
    assert len(mocks[0].bodies) == 3 + 5
    assert (summary["requests"], summary["prompt_tokens"], summary["kv_compute_tokens"]) == (5, 2000, 0)
    assert summary["kv_calibration_tokens_per_s"] == 1000
    assert "1,000.0 tokens/s in the calibration" in format_table(summary)
    for changes in ({"kv_load": "always"}, {"kv_load": "auto", "calibrate": "off"}):
        mocks[0].bodies.clear()
        run(mocks, probe="off", decoder_url=(mocks[0].url,), **changes)
        assert len(mocks[0].bodies) == 5


def test_a_decoder_that_cannot_be_calibrated_is_an_error(mocks: tuple[MockVllm, MockVllm]) -> None:
    with pytest.raises(LoadError, match=r"calibration: cannot connect to http://127\.0\.0\.1:9"):
        run(mocks, kv_load="auto")


def test_a_decoder_that_does_not_tell_reuse_is_named(mocks: tuple[MockVllm, MockVllm]) -> None:
    mocks[0].cached = lambda prompt_tokens: None
    failures = run(mocks)["failures"]
    assert any("--enable-prompt-tokens-details" in line for line in failures)


def test_a_wrong_token_makes_outputs_differ(mocks: tuple[MockVllm, MockVllm]) -> None:
    mocks[0].wrong_for = lambda prompt_tokens: prompt_tokens == 257
    summary = run(mocks)
    assert summary["outputs_match"] is False
    assert summary["errors"] == 0
    assert len(summary["failures"]) == 1
    assert summary["failures"][0].startswith("outputs differ: 257 tokens: token 2 is token_id:")


def test_a_chat_that_differs_is_found(mocks: tuple[MockVllm, MockVllm]) -> None:
    mocks[0].wrong_for = lambda size: size < -200
    failures = run(mocks, num_prompts=1, seed=1)["failures"]
    assert any(line.startswith("outputs differ: chat of 40 words") for line in failures), failures


def test_equal_tokens_with_other_logprobs_fail_where_exactness_is_due(mocks: tuple[MockVllm, MockVllm]) -> None:
    mocks[0].wrong_logprob = 0.01
    summary = run(mocks, num_prompts=0)
    assert summary["outputs_match"] is False
    assert summary["max_logprob_diff"] == pytest.approx(0.01)
    assert "log-probability differs by 0.0100" in summary["failures"][0]
    assert run(mocks, num_prompts=0, device="cuda")["failures"] == []
    assert run(mocks, num_prompts=0, logprob_tolerance=0.02)["failures"] == []


@pytest.mark.parametrize(
    ("device", "runner_up", "ties", "passes"),
    [
        ("cuda", -0.3, 1, True),
        ("cuda", -0.9, 0, False),
        ("cpu", -0.3, 0, False),
        ("cpu", -0.2009, 1, True),
        ("cpu", -0.2012, 0, False),
    ],
)
def test_a_tie_is_as_wide_as_the_precision_allows(mocks, device, runner_up, ties, passes) -> None:
    mocks[0].wrong_for = lambda prompt_tokens: prompt_tokens == 64
    for mock in mocks:
        mock.runner_up = runner_up
    summary = run(mocks, num_prompts=0, device=device)
    assert (summary["near_ties"], summary["outputs_match"]) == (ties, passes)
    assert f"{-0.2 - runner_up:.4f}" in "".join(summary["failures"]) or passes


def test_a_reference_that_reused_is_no_reference(mocks: tuple[MockVllm, MockVllm]) -> None:
    mocks[1].cached = lambda prompt_tokens: 16 if prompt_tokens == 17 else 0
    summary = run(mocks)
    assert summary["outputs_match"] is False
    assert "the prefiller reused 16 tokens" in summary["failures"][0]


def test_the_probe_alone(mocks: tuple[MockVllm, MockVllm]) -> None:
    summary = run(mocks, num_prompts=0)
    assert (summary["requests"], summary["reuse_ratio"], summary["ttft_ms_p50"]) == (0, None, None)
    assert summary["external_reused_tokens"] is None  # no decoder is there to ask
    assert summary["outputs_match"] is True
    assert summary["failures"] == []
    assert "\n" in format_table(summary)
    mocks[0].cached = lambda prompt_tokens: 0
    assert run(mocks, num_prompts=0)["failures"] == ["probe: reuse ratio 0 is below --min-reuse-ratio 0.99"]


@pytest.mark.parametrize(
    ("fault", "value", "cause"),
    [
        ("status", 503, "HTTP 503: mock says 503"),
        ("cut", True, "closed the connection before the answer was complete"),
        ("no_done", True, "the stream ended without [DONE]"),
        ("no_usage", True, "the answer carries no usage"),
        ("error_event", True, "error in the stream: mock failure"),
        ("hang", True, "within 0.3 s"),
        ("answer_tokens", 3, "3 tokens answered instead of 4"),
    ],
)
def test_a_failed_request_is_an_error_with_one_line(mocks, fault, value, cause) -> None:
    setattr(mocks[0], fault, value)
    summary = run(mocks, num_prompts=3, request_timeout=0.3 if fault == "hang" else 10)
    assert (summary["requests"], summary["errors"], summary["outputs_match"]) == (3, 3, False)
    load = [line for line in summary["failures"] if line.startswith("load: ")]
    assert len(load) == 1
    assert load[0].startswith("load: 3 requests failed: ")
    assert cause in load[0]
    assert all("\n" not in line for line in summary["failures"])


def test_refused_connections_are_errors_and_the_probe_is_left_out(mocks: tuple[MockVllm, MockVllm]) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        summary = run(mocks, proxy_url=url)
    assert (summary["errors"], summary["probe_compared"]) == (5, 0)
    refused, uncompared = summary["failures"]
    assert refused.startswith(f"load: 5 requests failed: cannot connect to {url}: ")
    assert uncompared == "outputs were not compared"
    assert mocks[1].bodies == []


def test_a_probe_that_fails_stops_after_a_few_errors(mocks: tuple[MockVllm, MockVllm]) -> None:
    mocks[1].not_json = True
    summary = run(mocks, num_prompts=1, probe_concurrency=1)
    assert summary["errors"] == PROBE_MAX_ERRORS
    assert summary["outputs_match"] is False
    assert len(mocks[1].bodies) == PROBE_MAX_ERRORS
    assert all(line.startswith("probe: ") for line in summary["failures"])
    assert any("reference: " in line and "is not JSON" in line for line in summary["failures"])


def test_the_warm_up_is_not_measured(mocks: tuple[MockVllm, MockVllm]) -> None:
    summary = run(mocks, num_prompts=2, warm_up=3, probe="off")
    assert (summary["requests"], summary["prompt_tokens"]) == (2, 100)
    prompts = [body["prompt"] for body in mocks[0].bodies]
    assert len(prompts) == len({tuple(prompt) for prompt in prompts}) == 5


def test_kv_wait_timeouts_are_counted(mocks: tuple[MockVllm, MockVllm]) -> None:
    mocks[0].kv_headers = {"x-kv-state": "timeout", "x-kv-wait-ms": "10000"}
    summary = run(mocks, num_prompts=2)
    assert summary["kv_wait_timeouts"] == 2 + summary["probe_prompts"]


def test_the_rate_is_kept() -> None:
    rng = random.Random(1)
    fixed = arrival_times(5, 2.0, "fixed", rng)
    assert fixed == pytest.approx([0, 0.5, 1, 1.5, 2])
    poisson = arrival_times(2001, 4.0, "poisson", rng)
    assert poisson[-1] == pytest.approx(500, rel=0.1)
    gaps = [b - a for a, b in itertools.pairwise(poisson)]
    assert sum(gap < 0.125 for gap in gaps) / len(gaps) == pytest.approx(0.39, abs=0.05), "not exponential"
    assert arrival_times(3, 0, "poisson", rng) == [0, 0, 0]


def test_percentiles() -> None:
    assert percentile([], 50) is None
    assert percentile([7], 99) == 7
    assert percentile([4, 1, 3, 2], 50) == 2.5
    assert percentile(list(range(101)), 99) == 99


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"), [("a", "a", "equal"), ("a", "b", "different"), ("", "", "different")]
)
def test_without_token_ids_texts_are_compared(ours: str, theirs: str, verdict: str) -> None:
    comparison = compare_answers(Answer(text=ours), Answer(text=theirs), Settings())
    assert comparison.verdict == verdict


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "disagg_prefill_lmcache_v1.measure.load_and_verify", *arguments],
        env={**os.environ, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_command(mocks: tuple[MockVllm, MockVllm], tmp_path: Path) -> None:
    arguments = ["--proxy-url", mocks[0].url, "--prefiller-url", mocks[1].url + "/", "--model", "mock-model"]
    arguments += ["--num-prompts", "3", "--request-rate", "50", "--input-len", "20", "--output-len", "2"]
    arguments += ["--run-dir", str(tmp_path / "run"), "--device", "cpu", "--backend", "redis", "--seed", "1"]
    arguments += ["--tensor-parallel-size", "2", "--ready-file", str(tmp_path / "ready")]
    done = command(*arguments)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "ready").exists()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["backend"], summary["tensor_parallel_size"], summary["seed"]) == ("redis", 2, 1)
    assert "outputs match" in done.stdout
    assert "\033" not in done.stdout
    assert "seed 1" in done.stderr
    done = command(*arguments, "--decoder-url", mocks[0].url, "--calibrate", "only", "--run-dir", "/dev/null/unused")
    assert (done.returncode, done.stdout) == (0, "calibration: 1,000.0 tokens/s\n"), done.stderr
    mocks[0].wrong_for = lambda prompt_tokens: prompt_tokens == 33
    done = command(*arguments)
    assert done.returncode == 1
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["outputs_match"] is False
    assert [line for line in done.stderr.splitlines() if "outputs differ" in line]


def test_the_proxys_key_is_sent_to_the_proxy_alone(mocks: tuple[MockVllm, MockVllm], tmp_path: Path) -> None:
    mocks[0].wanted_key = "sesame"
    decoder = mocks[1]  # plays the prefiller too: both are asked directly
    arguments = ["--proxy-url", mocks[0].url, "--prefiller-url", mocks[1].url, "--decoder-url", decoder.url]
    arguments += ["--num-prompts", "2", "--request-rate", "0", "--input-len", "20", "--output-len", "2"]
    arguments += ["--kv-load", "auto", "--run-dir", str(tmp_path)]
    done = command(*arguments, DISAGG_PROXY_API_KEY="sesame")
    assert done.returncode == 0, done.stderr
    assert mocks[0].authorization == {"Bearer sesame"}
    assert decoder.authorization == {None}
    assert "sesame" not in done.stdout + done.stderr + (tmp_path / "summary.json").read_text()
    done = command(*arguments, DISAGG_PROXY_API_KEY="other")
    assert done.returncode == 1
    assert "load: 2 requests failed: HTTP 401: mock wants a key" in done.stderr


def test_a_flag_wins_over_the_environment(mocks: tuple[MockVllm, MockVllm], tmp_path: Path) -> None:
    arguments = ["--proxy-url", mocks[0].url, "--prefiller-url", mocks[1].url, "--run-dir", str(tmp_path)]
    done = command(
        *arguments, "--seed", "5", DISAGG_LOAD_SEED="4", DISAGG_LOAD_NUM_PROMPTS="1", DISAGG_LOAD_PROBE="off"
    )
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["seed"], summary["requests"], summary["probe_prompts"]) == (5, 1, 0), done.stderr
    done = command(*arguments, DISAGG_LOAD_ARRIVAL="never")
    assert (done.returncode, done.stderr) == (
        2, "load_and_verify: DISAGG_LOAD_ARRIVAL 'never': allowed: poisson, fixed\n"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["--num-prompts", "many"], 2, "--num-prompts"),
        (["--min-reuse-ratio", "1.5"], 2, "--min-reuse-ratio"),
        (["--request-rate", "-1"], 2, "--request-rate"),
        (["--proxy-url", "localhost:1"], 2, "--proxy-url"),
        (["--arrival", "never"], 2, "--arrival"),
        (["--kv-load", "sometimes"], 2, "--kv-load"),
        (["--num-prompts", "0", "--probe", "off"], 2, "--num-prompts"),
        (["--unknown"], 2, "--unknown"),
        (["--prefiller-url", "http://127.0.0.1:9"], 1, "the prefiller does not answer"),
        (["--run-dir", "/dev/null/x"], 1, "--run-dir"),
    ],
)
def test_bad_usage_is_one_line(arguments: list[str], status: int, text: str) -> None:
    done = command(*arguments)
    assert done.returncode == status
    lines = [line for line in done.stderr.splitlines() if not line.startswith("load: 24 requests of")]
    assert len(lines) == 1, done.stderr
    assert text in lines[0]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"input_len": 690, "output_len": 20}, "--input-len 690"),
        ({"max_model_len": 800}, "--max-model-len 800"),
        ({"model": "other"}, "--model 'other'"),
    ],
)
def test_settings_that_do_not_fit_the_model(mocks, changes: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        run(mocks, **changes)
