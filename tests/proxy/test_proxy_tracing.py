"""Traces: one for each request, continued from the client's and by both servers; off, nothing of it is there.

The collector is a stand-in (standin_collector.py); spans are OpenTelemetry's.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from proxy_harness import DEADLINE_S, PROXY, REPOSITORY, Stack, dead_port, stack, wait_until

pytest.importorskip("opentelemetry.sdk", reason="OpenTelemetry's library is not installed: it makes the traces")

from standin_collector import StandinCollector

TIMES = "prefill.timing=queue=1.00,prefill=2.00,hold=0.50;decode.timing=queue=1.00,first-step=2.00,load=3.00"
PARENT_TRACE, PARENT_SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SOON = {"OTEL_BSP_SCHEDULE_DELAY": "50"}  # milliseconds until a batch is sent
SERVER, CLIENT = 2, 3  # kinds of spans


@pytest.fixture
def collector() -> Iterator[StandinCollector]:
    made = StandinCollector()
    yield made
    made.close()


def ask(made: Stack, name: str, body: dict[str, Any] | None = None, **headers: str) -> httpx.Response:
    return httpx.post(
        f"{made.url}/v1/completions", json={"model": "m", "prompt": "x", **(body or {})}, timeout=DEADLINE_S,
        headers={"x-request-id": name, **{key.replace("_", "-"): value for key, value in headers.items()}},
    )  # fmt: skip


def sent(state: Any, name: str) -> dict[str, str]:
    """Header fields that a mock server got under a request id."""
    return next(each["headers"] for each in state.requests if each["headers"].get("x-request-id") == name)


def test_one_trace_goes_from_the_client_through_prefill_to_decode(collector: StandinCollector) -> None:
    with stack("--otlp-traces-endpoint", collector.url, env=SOON) as made:
        parent = f"00-{PARENT_TRACE}-{PARENT_SPAN}-01"
        answer = ask(made, "traced", {"stream": True}, x_mock=TIMES, traceparent=parent, tracestate="a=1")
        assert answer.status_code == 200
        spans = wait_until(lambda: collector.of("traced"), "the spans arrive")
        line = made.proxy.access_line("traced")
        root, prefill, decode = spans["POST /v1/completions"], spans["prefill"], spans["decode"]
        assert (root["trace"], root["parent"]) == (PARENT_TRACE, PARENT_SPAN)
        assert prefill["parent"] == decode["parent"] == root["id"]
        assert [root["kind"], prefill["kind"], decode["kind"]] == [SERVER, CLIENT, CLIENT]
        for state, span in ((made.prefill, prefill), (made.decode, decode)):
            got = sent(state, "traced")
            assert got["traceparent"] == f"00-{PARENT_TRACE}-{span['id']}-01"
            assert got["tracestate"] == "a=1"
        assert root["begin"] <= prefill["begin"] <= prefill["end"] <= decode["begin"] <= decode["end"] <= root["end"]
        told = root["attributes"]
        assert told["http.route"] == told["url.path"] == "/v1/completions"
        assert (told["http.request.method"], told["http.response.status_code"]) == ("POST", 200)
        assert (told["gen_ai.operation.name"], told["gen_ai.request.model"]) == ("text_completion", "m")
        parts = {key.removeprefix("disagg.ttft."): each for key, each in told.items() if key.startswith("disagg.ttft.")}
        assert {name: round(each * 1000, 2) for name, each in parts.items()} == line["ttft_parts_ms"]
        assert sum(parts.values()) == pytest.approx(told["gen_ai.latency.time_to_first_token"])
        assert prefill["attributes"]["server.port"] == made.prefill_port
        assert decode["attributes"]["http.response.status_code"] == 200
        assert {each["service"] for each in spans.values()} == {"disagg-proxy"}
        assert not any(each["error"] for each in spans.values())


def test_without_a_parent_a_trace_begins_and_one_that_is_not_sampled_is_not_recorded(
    collector: StandinCollector,
) -> None:
    with stack("--otlp-traces-endpoint", collector.url, env=SOON) as made:
        ask(made, "unwanted", traceparent=f"00-{PARENT_TRACE}-{PARENT_SPAN}-00")
        ask(made, "malformed", traceparent="00-x")
        ask(made, "own")
        own = wait_until(lambda: collector.of("own"), "the spans arrive")
        assert own["POST /v1/completions"]["parent"] == ""
        assert sent(made.decode, "own")["traceparent"].split("-")[1] == own["decode"]["trace"]
        malformed = collector.of("malformed")["decode"]
        assert sent(made.decode, "malformed")["traceparent"] == f"00-{malformed['trace']}-{malformed['id']}-01"
        assert not collector.of("unwanted")
        assert sent(made.prefill, "unwanted")["traceparent"].startswith(f"00-{PARENT_TRACE}-")
        assert sent(made.prefill, "unwanted")["traceparent"].endswith("-00")


def test_failures_are_told(collector: StandinCollector) -> None:
    flags = ("--otlp-traces-endpoint", collector.url, "--prefill-failure", "fail")
    with stack(*flags, env=SOON) as made:
        ask(made, "refused", {"prompt": "x", "kv_transfer_params": {}})
        assert ask(made, "failed", x_mock="prefill.status=500").status_code == 503
        failed = wait_until(lambda: collector.of("failed"), "the spans arrive")
        assert failed["POST /v1/completions"]["error"]
        assert failed["POST /v1/completions"]["attributes"]["http.response.status_code"] == 503
        assert failed["prefill"]["attributes"]["error.type"] == "server_error"
        assert "decode" not in failed
        refused = collector.of("refused")
        assert list(refused) == ["POST /v1/completions"]
        assert not refused["POST /v1/completions"]["error"], "what a client did wrong is no error of the proxy"


def test_a_collector_that_is_gone_costs_no_request_and_no_end(collector: StandinCollector) -> None:
    nobody = f"http://127.0.0.1:{dead_port()}/v1/traces"
    with stack("--otlp-traces-endpoint", nobody, env=SOON) as made:
        for number in range(20):
            assert ask(made, f"r{number}").status_code == 200
        lost = wait_until(lambda: [m for m in made.proxy.messages if "traces are lost" in m], "it is told")
        assert len(lost) == 1
        assert not any("Traceback" in message or "Transient" in message for message in made.proxy.messages)
        begin = time.monotonic()
        made.proxy.stop()
        assert time.monotonic() - begin < DEADLINE_S


def test_spans_that_wait_are_sent_when_the_proxy_ends(collector: StandinCollector) -> None:
    with stack("--otlp-traces-endpoint", collector.url, env={"OTEL_BSP_SCHEDULE_DELAY": "600000"}) as made:
        ask(made, "last")
        made.proxy.stop()
        assert collector.of("last").keys() == {"POST /v1/completions", "prefill", "decode"}


def test_off_the_clients_context_passes_as_it_is_and_nothing_is_imported() -> None:
    with stack() as made:
        parent = f"00-{PARENT_TRACE}-{PARENT_SPAN}-01"
        ask(made, "plain", traceparent=parent)
        assert sent(made.prefill, "plain")["traceparent"] == sent(made.decode, "plain")["traceparent"] == parent
    code = "import sys; import disagg_prefill_lmcache_v1.disagg_proxy_server; print('opentelemetry' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.stdout == "False\n", done.stderr


@pytest.mark.parametrize(
    ("flags", "blocked", "said"),
    [
        (["--otlp-traces-endpoint", "collector:4318"], "", "allowed: a URL like http://HOST:4318/v1/traces"),
        (
            ["--otlp-traces-endpoint", "http://127.0.0.1:1/v1/traces"], "opentelemetry",
            "--otlp-traces-endpoint: opentelemetry is not installed; allowed with opentelemetry-sdk and",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line(flags: list[str], blocked: str, said: str, tmp_path) -> None:
    if blocked:
        (tmp_path / "sitecustomize.py").write_text(
            "import sys\n"
            "class Missing:\n"
            "    def find_spec(self, name, path=None, target=None):\n"
            f"        if name.split('.')[0] == {blocked!r}:\n"
            "            raise ModuleNotFoundError(f'No module named {name!r}', name=name.split('.')[0])\n"
            "sys.meta_path.insert(0, Missing())\n"
        )
    done = subprocess.run(
        [sys.executable, str(PROXY), "--port", "0", *flags], capture_output=True, text=True, timeout=120,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
