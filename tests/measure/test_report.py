"""report.html: made of a comparison or of one run, and looked at in a browser. The numbers are made up."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from browser import WIDTH, brightness, chromium, colours_in, page_of

from disagg_prefill_lmcache_v1.measure import report
from disagg_prefill_lmcache_v1.measure.report import ReportError, comparison_of_one, write_report

PARTS = ("proxy_queue", "prefill_queue", "prefill", "kv_visible", "hand_over", "decode_queue", "load", "first_step",
         "network", "client")  # fmt: skip
HOSTILE = "</script><script>console.error('hostile')</script>@plotly@<b>"


def made_up_requests(rng: random.Random, arm: str, count: int) -> list[dict[str, Any]]:
    requests = []
    for number in range(count):
        parts = (
            {name: rng.uniform(1, 60) for name in PARTS}
            if arm == "pair"
            else {"decode": rng.uniform(80, 200), HOSTILE: 1.0}
        )
        ttft = sum(parts.values()) + 1
        gaps = [rng.uniform(5, 9) if rng.random() < 0.95 else rng.uniform(20, 200) for _ in range(15)]
        requests.append({
            "id": f"r{number}", "start_s": number * 0.25, "input_tokens": 512, "output_tokens": 16, "ttft_ms": ttft,
            "itls_ms": gaps, "e2el_ms": ttft + sum(gaps), "error": "", "parts": parts,
            "reused_tokens": rng.choice((511, 511, 256)) if arm == "pair" else None,
        })  # fmt: skip
    failed = {**requests[0], "ttft_ms": None, "itls_ms": [], "error": HOSTILE, "parts": None}
    return [*requests, failed, {**requests[1], "parts": None}]


def made_up_comparison() -> dict[str, Any]:
    rng, arms = random.Random(7), {}
    for arm in ("plain", "pair"):
        points = []
        for rate in (1.0, 2.0, 4.0, 0.0, 0.0):  # a sweep's: the last are all at once and one at a time
            of = {f"p{percent}": 100 + 50 * rate + percent for percent in (50, 90, 99)}
            long = {key: 123.4 * value for key, value in of.items()}
            points.append({
                "request_rate": rate, "duration_s": 10.0, "completed": 20, "failed": 1, "request_throughput": rate,
                "output_throughput": 40 * rate, "total_token_throughput": 900 * rate, "goodput": rate * 0.9,
                "ttft_ms": of, "tpot_ms": {"p50": (12 if arm == "plain" else 7) + rate}, "itl_ms": of, "e2el_ms": long,
                "requests": made_up_requests(rng, arm, 20),
            })  # fmt: skip
        arms[arm] = {"points": points[:-1], "serial": points[-1] | {"serial": True}}
    return {
        "arms": arms, "cards": 2, "sentence": "at 4 requests/s: pair, if ITL p99 under 30 ms matters more. " + HOSTILE,
        "targets": {"ttft": 300, "itl": 30}, "versions": {"vllm": "0.0.mock"}, "workload": {"name": HOSTILE},
        "flags": {"plain": ["--enforce-eager"], "pair": ["--enforce-eager"]}, "machine": {"processor": "mock"},
    }  # fmt: skip


def made_up_summary() -> dict[str, Any]:
    requests = made_up_requests(random.Random(8), "pair", 12)
    return {
        "each_request": requests, "duration_s": 4.0, "request_rate": 0, "output_tokens": 192, "prompt_tokens": 6144,
        "probe_prompts": 40, "probe_compared": 40, "outputs_match": True, "backend": "lm", "kv_load": "auto",
        "tensor_parallel_size": 1, "input_len": 512, "output_len": 16, "seed": 7, "model": "mock", "device": "cpu",
        "ttft_parts_ms": {"prefill": {"mean": 30.0}, "load": {"mean": 10.0}}, "versions": {"vllm": "0.0.mock"},
        "machine": {"processor": "mock", "cores": 2},
    }  # fmt: skip


@pytest.fixture(scope="module")
def browser():
    with chromium() as made:
        yield made


def write(folder: Path, name: str, content: dict[str, Any]) -> Path:
    (folder / name).write_text(json.dumps(content))
    return write_report(folder)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_comparison_in_a_browser(browser, scheme, tmp_path) -> None:
    path = write(tmp_path, "compare.json", made_up_comparison())
    with page_of(browser, scheme) as (page, complaints, asked):
        page.goto(path.as_uri())
        page.wait_for_selector("#timeline-plain .barlayer path")
        assert page.locator(".js-plotly-plot:visible").count() == 7
        lines = {name: page.locator(f"#{name} .scatterlayer .trace").count() for name in ("ttft", "itl", "pareto")}
        assert lines == {"ttft": 2, "itl": 2, "pareto": 2}
        assert page.locator("#pareto .textpoint").count() == 10
        assert page.locator("#parts .yaxislayer-above .ytick, #parts .ytick").count() == 8
        assert page.locator("#timeline-pair .legendtext").all_text_contents() == [
            *PARTS[:-2],
            "decode",
            *PARTS[-2:],
            "decoding",
        ]
        assert page.locator("#reuse .barlayer .trace").count() == 2
        assert page.locator("tbody tr").count() == 10
        assert page.locator("#rate option").all_text_contents() == ["4", "2", "1", "one at a time", "all at once"]
        for text in ("at 4 requests/s: pair", "0.0.mock", "--enforce-eager", "hostile"):
            assert page.get_by_text(text).first.is_visible()
        before = page.locator("#ttft .lines path").first.get_attribute("d")
        page.select_option("#rate", "1")
        page.wait_for_function("d => document.querySelector('#ttft .lines path').getAttribute('d') !== d", arg=before)
        check_looks(page, scheme, tmp_path)
    assert complaints == []
    assert asked == [path.as_uri()], "nothing else is asked for"


def check_looks(page: Any, scheme: str, folder: Path) -> None:
    background, text = brightness(page, "body")
    assert (background > 200 and text < 80) if scheme == "light" else (background < 60 and text > 180)
    chart_text = page.eval_on_selector(".xtick text", "element => getComputedStyle(element).fill")
    assert chart_text == page.eval_on_selector("body", "element => getComputedStyle(element).color")
    assert page.evaluate("document.documentElement.scrollWidth") == WIDTH
    overflow = "found => found.filter(e => e.scrollWidth > e.clientWidth).map(e => e.innerText)"
    assert page.eval_on_selector_all("section, .table, dl", overflow) == []
    assert colours_in(page, str(folder / f"{scheme}.png")) > 50_000


def test_one_run_in_a_browser(browser, tmp_path) -> None:
    path = write(tmp_path, "summary.json", made_up_summary())
    with page_of(browser, "light") as (page, complaints, asked):
        page.goto(path.as_uri())
        page.wait_for_selector("#timeline-pair .barlayer path")
        assert page.locator(".js-plotly-plot:visible").count() == 6
        assert page.get_by_text("TTFT goes to prefill 30.0 ms (75%), load 10.0 ms (25%).").is_visible()
        assert page.get_by_text("equal (40 prompts compared)").is_visible()
        assert not page.locator("#rate").is_visible(), "there is one rate"
        # the colours follow a change of the scheme
        page.emulate_media(color_scheme="dark")
        bright = "() => getComputedStyle(document.querySelector('.xtick text')).fill === 'rgb(230, 234, 240)'"
        page.wait_for_function(bright)
    assert complaints == []
    assert asked == [path.as_uri()]


def test_a_run_without_requests_has_a_report(tmp_path) -> None:
    empty = {**made_up_summary(), "each_request": [], "duration_s": 0.0, "output_tokens": 0, "ttft_parts_ms": {}}
    assert write(tmp_path, "summary.json", empty).is_file()


def test_the_rows_of_where_ttft_goes_are_real_requests() -> None:
    requests = [r for r in made_up_requests(random.Random(9), "pair", 99) if r["parts"]]
    figure = report.report_charts.where_ttft_goes({"pair": requests})
    totals = [sum(trace["x"][row] for trace in figure["data"]) for row in range(4)]
    ordered = sorted(sum(r["parts"].values()) for r in requests)
    expected = [ordered[97], ordered[88], ordered[49], sum(ordered) / len(ordered)]
    assert totals == pytest.approx(expected, abs=0.1)


def test_the_figures_of_one_run_are_those_of_its_requests() -> None:
    (point,) = comparison_of_one(made_up_summary())["arms"]["pair"]["points"]
    assert (point["completed"], point["failed"], point["output_throughput"]) == (13, 1, 48)
    assert point["ttft_ms"]["p50"] == sorted(r["ttft_ms"] for r in point["requests"] if r["ttft_ms"])[6]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("", "", "has neither compare.json nor summary.json"),
        ("summary.json", "{", "summary.json cannot be read"),
        ("compare.json", "[]", "compare.json cannot be read"),
        ("summary.json", '{"requests": 3}', "summary.json cannot be read: KeyError: 'each_request'"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_line(name, content, words, tmp_path) -> None:
    if name:
        (tmp_path / name).write_text(content)
    with pytest.raises(ReportError, match=r"^[^\n]+$") as caught:
        write_report(tmp_path)
    assert words in str(caught.value)
    command = [sys.executable, "-m", "disagg_prefill_lmcache_v1.measure.report", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)


def test_without_plotly_it_says_what_to_install(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(ReportError, match="pip install plotly"):
        write(tmp_path, "summary.json", made_up_summary())
