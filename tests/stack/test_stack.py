"""The example on real parts: vLLM servers on the CPU, each KV store, the proxy.

Every answer is compared with one plain vLLM server without any connector, token for token, in float32.
Takes about 10 minutes on 2 cores: python -m pytest tests/stack/test_stack.py
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import random
import signal
import socket
from pathlib import Path

import pytest
import test_proxy_openai_client as calls
from browser import chromium, page_of
from launch_harness import REPOSITORY, wait_until
from stack_harness import (
    ANSWER,
    MAX_MODEL_LEN,
    MODEL,
    Answer,
    Case,
    Load,
    Stack,
    ask_all,
    differs,
    left_running,
    matrix,
    post,
    prompt_tokens,
)

from disagg_prefill_lmcache_v1.proxy.timing import PARTS

pytest.importorskip("vllm", reason="vLLM is not installed: the real stack is what is tested")
pytest.importorskip("lmcache", reason="LMCache is not installed: the real stack is what is tested")

# whole runs


@pytest.mark.parametrize(
    ("script", "backend", "kv_load"),
    [
        ("disagg_example_gaudi_lm.sh", "lm", "always"),
        ("disagg_example_gaudi_lm_tp2.sh", "shm", "auto"),
        ("disagg_example_gaudi_lm_tp2.sh", "nixl", "always"),
        ("disagg_example_gaudi_lm.sh", "mp", "auto"),
        ("disagg_example_gaudi_lm_tp2.sh", "mp", "always"),
    ],
)
def test_the_example_passes(script, backend, kv_load, model_folder, tmp_path):
    ranks = 2 if "tp2" in script else 1
    flags = ("--num-prompts=8", "--request-rate=2", "--input-len=300", "--output-len=8", f"--backend={backend}")
    flags += (f"--kv-load={kv_load}",)
    stack = Stack(tmp_path, model_folder, *flags, script=script)
    assert stack.run() == 0, stack.text
    summary = stack.summary
    assert (summary["requests"], summary["errors"], summary["outputs_match"]) == (8, 0, True)
    loaded, computed = summary["kv_load_requests"], summary["kv_recompute_requests"]
    assert loaded + computed == 8
    assert loaded == 8 or kv_load == "auto"  # which loses nothing by it
    assert summary["full_reuse_requests"] == loaded
    assert summary["reuse_ratio"] == (1 if loaded else None)
    assert summary["kv_loaded_tokens"] == (288 if backend == "mp" else 300) * loaded  # mp: whole blocks of 32
    assert (summary["kv_load_tokens_per_s"] or 0) > 0 or loaded == 0
    assert (summary["kv_calibration_tokens_per_s"] is not None) is (kv_load == "auto")
    assert (summary["backend"], summary["tensor_parallel_size"], summary["device"]) == (backend, ranks, "cpu")
    logs = {"prefiller.log", "decoder.log", "proxy.log"} | ({"kv_server.log"} if backend != "nixl" else set())
    assert logs <= {path.name for path in tmp_path.iterdir()}
    assert left_running(tmp_path) == []
    check_parts(tmp_path / "proxy.log", summary)


def check_parts(proxy_log: Path, summary: dict) -> None:
    """The parts of TTFT sum to what the proxy has measured, and both servers have told theirs."""
    each = {request["id"]: request["parts"] for request in summary["each_request"]}
    lines = [json.loads(line) for line in proxy_log.read_text().splitlines() if '"ttft_parts_ms"' in line]
    lines = [line for line in lines if line["request_id"] in each]
    assert len(lines) == summary["requests"]
    close = [abs(sum(line["ttft_parts_ms"].values()) / line["ttft_ms"] - 1) <= 0.02 for line in lines]
    assert sum(close) >= 0.95 * len(close), lines
    for line in lines:
        assert list(line["ttft_parts_ms"]) == [part for part in PARTS if part != "decode"], line
        assert {*line["ttft_parts_ms"], "client"} == each[line["request_id"]].keys()
    for request in summary["each_request"]:
        assert abs(sum(request["parts"].values()) / request["ttft_ms"] - 1) <= 0.02, request
    assert summary["ttft_slowest_part"] in summary["ttft_parts_ms"]


def test_a_corrupted_load_is_noticed(model_folder, tmp_path):
    stack = Stack(tmp_path, model_folder, "--num-prompts=2", "--input-len=300", "--output-len=8")
    path = f"{REPOSITORY / 'tests' / 'helpers'}:{os.environ.get('PYTHONPATH', '')}"
    status = stack.run(KV_CONNECTOR_MODULE="corrupting_connector", PYTHONPATH=path)
    assert status == 1, stack.text
    assert stack.summary["outputs_match"] is False
    assert stack.summary["errors"] == 0


def test_loads_that_fail_are_no_reuse(model_folder, tmp_path):
    """A third of the loads fails: vLLM's cached_tokens count them all, the summary does not, and answers stay equal."""
    stack = Stack(tmp_path, model_folder, "--num-prompts=9", "--input-len=300", "--output-len=8", "--kv-load=always")
    path = f"{REPOSITORY / 'tests' / 'helpers'}:{os.environ.get('PYTHONPATH', '')}"
    status = stack.run(KV_CONNECTOR_MODULE="failing_connector", PYTHONPATH=path)
    assert status == 1, stack.text
    summary = stack.summary
    assert (summary["outputs_match"], summary["errors"]) == (True, 0)
    assert summary["cached_tokens"] == 9 * 299
    assert summary["reused_tokens"] == 6 * 299
    assert (summary["full_reuse_requests"], summary["reuse_ratio"]) == (6, 0.6666)
    assert "is below" in stack.text


# a stack that serves


def check_matrix(stack: Stack, reference: list[Answer], concurrency: int) -> None:
    cases = matrix()
    answers = ask_all(stack.proxy, cases, concurrency)
    rows = list(zip(cases, answers, reference, strict=True))
    assert [c.name for c, a, r in rows if differs(a, r)] == []
    assert sum(a.tokens != r.tokens for _, a, r in rows) <= 2
    assert all(len(a.tokens) == ANSWER for a in answers)
    assert [(c.name, a.reused) for c, a in zip(cases, answers, strict=True) if not a.full_reuse] == []
    assert {a.headers["x-kv-state"] for a in answers} == {"stored"}


@pytest.mark.parametrize("concurrency", [8, 1])
def test_matrix_equals_one_plain_server(stack, reference, concurrency):
    check_matrix(stack, reference, concurrency)


def test_32_at_once_reuse_everything(stack):
    rng = random.Random()
    body = {"max_tokens": 4, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    cases = [
        Case(f"{n}", "/v1/completions", {**body, "prompt": prompt_tokens(rng, n)})
        for n in [rng.choice((2, 40, 128, 256, 300, 513, 700)) for _ in range(64)]
    ]
    answers = ask_all(stack.proxy, cases, 32)
    assert [(c.name, a.reused) for c, a in zip(cases, answers, strict=True) if not a.full_reuse] == []


def test_flushed_store_costs_reuse_never_an_answer(redis_stack, redis_store, reference):
    with Load(redis_stack, reference) as load:
        for _ in range(12):
            load.wait_for(2)
            redis_store("FLUSHALL")
    assert load.wrong == []


def test_dead_store_is_told_and_a_restarted_one_used(redis_stack, redis_store, reference):
    log = redis_stack.run_dir / "prefiller.log"
    with Load(redis_stack, reference) as load:
        load.wait_for(4)
        wait_until(lambda: redis_stack.metric("disagg_kv_degraded") == 0, "what was flushed before is no news", 60)
        before = len(log.read_text())
        redis_store.kill()
        wait_until(lambda: redis_stack.metric("disagg_kv_degraded") == 1, "the gauge shows the dead store", 60)
        wait_until(lambda: "is not visible" in log.read_text()[before:], "the prefiller's log names the cause", 60)
        load.wait_for(8)
        redis_store.start()
        wait_until(lambda: redis_stack.metric("disagg_kv_degraded") == 0, "the gauge shows the recovery", 60)
        wait_until(lambda: load.fresh().full_reuse, "a request after the recovery reuses", 60)
        assert all(load.fresh().full_reuse for _ in range(8)), "requests after the recovery reuse again"
    assert load.wrong == []


def test_the_password_is_in_no_log(redis_stack):
    for log in redis_stack.run_dir.glob("*.log"):
        assert "s3cret" not in log.read_text(errors="replace"), log


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"])
def test_all_routes_reuse_everything(lm_stack, path, stream):
    counts = ("usage_reports", "full_reuse_requests", "kv_state")
    before = [lm_stack.metric(f"disagg_{name}_total") for name in counts]
    rng = random.Random()
    text = " ".join(f"w{rng.randrange(10000)}" for _ in range(40))
    messages = [{"role": "user", "content": text}]
    prompt = {"/v1/completions": {"prompt": text}, "/v1/responses": {"input": text}}.get(path, {"messages": messages})
    limit = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
    for own_id in ({}, {"request_id": f"my-own_id-{rng.random()}"}):
        body = {"model": MODEL, limit: ANSWER, "temperature": 0, "stream": stream, **prompt, **own_id}
        if stream and "completions" in path:
            body["stream_options"] = {"include_usage": True}
        text += " and more"
        with post(lm_stack.proxy, path, body) as response:
            response.read()
            assert response.headers["x-kv-state"] == "stored"
            assert float(response.headers["x-kv-wait-ms"]) >= 0
    # A request is counted when its last bytes are out.
    counted = lambda: [lm_stack.metric(f"disagg_{name}_total") for name in counts] == [n + 2 for n in before]  # noqa: E731
    wait_until(counted, "both requests are counted")


def test_the_status_page_shows_the_stack(lm_stack):
    with chromium() as browser, page_of(browser, "light") as (page, complaints, _):
        page.goto(f"http://127.0.0.1:{lm_stack.proxy}/")
        page.wait_for_selector("#servers .good")
        rng = random.Random()
        body = {"max_tokens": ANSWER, "ignore_eos": True, "stream": True, "model": MODEL}
        for size in (40, 300):
            with post(lm_stack.proxy, "/v1/completions", {**body, "prompt": prompt_tokens(rng, size)}) as response:
                response.read()
        page.wait_for_selector("#legend span:has-text('kv_visible')")
        shown = [text.split()[0] for text in page.locator("#legend span").all_inner_texts()]
        assert {"prefill", "kv_visible", "load", "first_step"} <= set(shown)
        assert float(page.inner_text("#ttft")) > 0
        assert page.locator("#servers .good").count() == 2
        assert complaints == []


@pytest.mark.parametrize(("stage", "stream"), [("prefill", False), ("decode", False), ("decode", True)])
def test_a_hang_up_is_an_abort_in_vllm(lm_stack, stage, stream):
    """Seen as: the API server works on nothing, the engine runs nothing, and no request has come to its end.

    vLLM counts no abort that comes from a client (finished_reason="abort" is for those that the engine makes),
    and its engine looks for aborts between two steps: in prefill it works on for a step or two.
    """
    port = lm_stack.prefiller if stage == "prefill" else lm_stack.decoder
    size, answer = (MAX_MODEL_LEN - 100, 4) if stage == "prefill" else (20, MAX_MODEL_LEN - 100)
    body = {"model": MODEL, "max_tokens": answer, "ignore_eos": True, "stream": stream}
    ports = (lm_stack.prefiller, lm_stack.decoder)
    # Streams that are cut stay in vLLM's count of its API server: only what is added counts.
    loads = [lm_stack.load(each) for each in ports]
    to_its_end = r'vllm:request_success_total\{[^}]*finished_reason="(?:length|stop)"[^}]*\}'
    # All of the answer takes more than a minute. A prefill takes seconds: a hang-up that a busy machine brings only
    # after its last step says nothing.
    for left in reversed(range(5 if stage == "prefill" else 1)):
        data = json.dumps({**body, "prompt": prompt_tokens(random.Random(), size)}).encode()
        finished = lm_stack.metric(to_its_end, port)
        with socket.create_connection(("127.0.0.1", lm_stack.proxy)) as client:
            client.sendall(
                b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
                b"content-length: %d\r\n\r\n%b" % (len(data), data)
            )
            wait_until(lambda: lm_stack.metric("vllm:num_requests_running", port) == 1, f"{stage} runs")
        if stage == "prefill" or not stream:
            wait_until(lambda: [lm_stack.load(each) for each in ports] == loads, "the API servers are free", 60)
        wait_until(lambda: lm_stack.metric("vllm:num_requests_running", port) == 0, "the engine is free", 60)
        if lm_stack.metric(to_its_end, port) == finished:
            return
        assert left, "the request has come to its end"


def test_the_openai_client_cannot_tell_the_proxy_from_the_decoder(lm_stack):
    urls = [f"http://127.0.0.1:{port}" for port in (lm_stack.proxy, lm_stack.decoder)]

    def differs(name: str) -> list:
        through, direct = (calls.outcome(url, calls.CALLS[name]) for url in urls)
        return [] if calls.same(through, direct) else [name, through, direct]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        different = [found for found in pool.map(differs, calls.CALLS) if found]
    # Together with others a request is computed in another batch, which may tip a near tie; alone it must be equal.
    assert [again for name, *_ in different if (again := differs(name))] == []
    assert len(different) < 5


def test_made_up_requests_find_no_error_that_vllm_has_not(lm_stack):
    pytest.importorskip("schemathesis")
    import schema_fuzz

    fuzz = schema_fuzz.Fuzz(*(f"http://127.0.0.1:{port}" for port in (lm_stack.proxy, lm_stack.decoder)))
    fuzz.run(cases=4)
    assert fuzz.wrong == []
    answered = [path for _, path in schema_fuzz.ROUTES if fuzz.seen[f"POST {path} 200"]]
    assert {"/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"} <= set(answered), fuzz.seen


def test_killed_decoder_ends_the_stack(lm_stack):
    """Last: it ends the stack."""
    pids = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it may just have ended
            if f"--port\0{lm_stack.decoder}\0".encode() in entry.read_bytes():
                pids.append(int(entry.parent.name))
    assert pids
    os.kill(min(pids), signal.SIGKILL)
    status = lm_stack.child.wait(120)
    assert status == 1
    assert "decoder was killed" in lm_stack.text
    assert left_running(lm_stack.run_dir) == []
