"""The example on real parts: vLLM servers on the CPU, each KV store, the proxy.

Every answer is compared with one plain vLLM server without any connector, token for token, in float32.
Takes about 10 minutes on 2 cores: python -m pytest tests/stack/test_stack.py
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import test_proxy_openai_client as calls
from launch_harness import PACKAGE, REPOSITORY, free_ports, free_ports_in_a_row, wait_until

pytest.importorskip("vllm", reason="vLLM is not installed: the real stack is what is tested")
pytest.importorskip("lmcache", reason="LMCache is not installed: the real stack is what is tested")

MODEL = "tiny-llama"
ANSWER = 12
MAX_MODEL_LEN = 8192
REQUEST_S = 120.0
START_S = 300.0


# requests


@dataclasses.dataclass(frozen=True)
class Case:
    """One request of the matrix; ``tokens`` of a chat count its template too, so they are known from the answer."""

    name: str
    path: str
    body: dict

    @property
    def streamed(self) -> bool:
        return bool(self.body.get("stream"))


@dataclasses.dataclass
class Answer:
    tokens: list[int]
    top: list[dict[str, float]]  # log-probabilities of the likeliest tokens, before each token
    prompt_tokens: int
    reused: int
    headers: dict[str, str]

    @property
    def full_reuse(self) -> bool:
        return self.reused >= self.prompt_tokens - 1


def ask(port: int, case: Case) -> Answer:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{case.path}",
        json.dumps({"model": MODEL, **case.body}).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=REQUEST_S) as response:
        raw = response.read().decode()
        headers = {k.lower(): v for k, v in response.headers.items()}
    if case.streamed:
        events = [line[6:] for line in raw.splitlines() if line.startswith("data: ")]
        assert events[-1] == "[DONE]", events[-1]
        parts = [json.loads(event) for event in events[:-1]]
    else:
        parts = [json.loads(raw)]
    tokens = [t for part in parts for choice in part["choices"] for t in choice.get("token_ids") or []]
    probabilities = [choice.get("logprobs") or {} for part in parts for choice in part["choices"]]
    top = [step for each in probabilities for step in each.get("top_logprobs") or []]
    usage = next(part["usage"] for part in reversed(parts) if part.get("usage"))
    reused = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return Answer(tokens, top, usage["prompt_tokens"], reused, headers)


def ask_all(port: int, cases: list[Case], concurrency: int) -> list[Answer]:
    with concurrent.futures.ThreadPoolExecutor(concurrency) as pool:
        return list(pool.map(lambda case: ask(port, case), cases))


def prompt_tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(300, 1000) for _ in range(count)]


def matrix(seed: int = 20) -> list[Case]:
    """Sizes around block (32, 128) and chunk (256) borders and the step limit (2,048), shared prefixes, repeats."""
    rng = random.Random(seed)
    sizes = [2, 3, 5, 31, 32, 33, 64, 127, 128, 129, 200, 255, 256, 257, 300, 383, 384, 385, 511, 512, 513, 600, 640]
    sizes += [767, 768, 769, 900, 1023, 1024, 1025, 1300, 1536, 1793, 2047, 2048, 2049, 2304, 2500, 4100]
    prompts = [(f"{n} tokens", prompt_tokens(rng, n)) for n in sizes]
    prompts.append(("the model's limit", prompt_tokens(rng, MAX_MODEL_LEN - ANSWER)))
    base = prompt_tokens(rng, 1500)
    for n in (100, 256, 300, 600, 1100, 1500):
        prompts.append((f"shared prefix of {n}", base[:n] + prompt_tokens(rng, 37)))
    prompts += [(f"repeated {name}", prompt) for name, prompt in rng.sample(prompts[:30], 8)]
    cases = []
    for i, (name, prompt) in enumerate(prompts):
        body = {"prompt": prompt, "max_tokens": ANSWER, "ignore_eos": True, "return_token_ids": True}
        body |= {"temperature": 0} if i % 2 == 0 else {"temperature": 0.8, "top_p": 0.95, "seed": i, "logprobs": 5}
        if i % 3 == 2:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        cases.append(Case(name, "/v1/completions", body))
    for i, words in enumerate((1, 5, 20, 60, 100, 200)):
        text = " ".join(f"w{rng.randrange(1000)}" for _ in range(words))
        messages = [{"role": "system", "content": "Answer."}, {"role": "user", "content": text}]
        body = {"messages": messages, "max_tokens": ANSWER, "temperature": 0, "ignore_eos": True}
        body |= {"return_token_ids": True}
        if i % 2:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        cases.append(Case(f"chat of {words} words", "/v1/chat/completions", body))
    assert len(cases) >= 60
    return cases


# processes


@contextlib.contextmanager
def process(command, log: Path, **environment):
    """A program in a group of its own, ended with everything that it started."""
    with log.open("w") as out:
        child = subprocess.Popen(
            command, env={**os.environ, **environment}, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
            start_new_session=True,
        )  # fmt: skip
    try:
        yield child
    finally:
        if child.poll() is None:
            child.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(40)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def answers_health(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as response:
            return response.status == 200
    except OSError:
        return False


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    from disagg_prefill_lmcache_v1.measure import tiny_model

    folder = tmp_path_factory.mktemp("model") / MODEL
    subprocess.run([sys.executable, "-m", tiny_model.__name__, "--output", str(folder)], check=True, cwd=REPOSITORY)
    return folder


@pytest.fixture(scope="session")
def reference(model_folder, tmp_path_factory) -> list[Answer]:
    """What one plain vLLM server answers to the matrix."""
    port = free_ports(1)[0]
    log = tmp_path_factory.mktemp("plain") / "plain.log"
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model_folder),
        "--served-model-name", MODEL, "--port", str(port), "--host", "127.0.0.1", "--dtype", "float32",
        "--enforce-eager", "--max-model-len", str(MAX_MODEL_LEN), "--max-num-batched-tokens", str(MAX_MODEL_LEN),
    ]  # fmt: skip
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    with process(command, log, HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", **environment) as child:
        wait_until(
            lambda: child.poll() is not None or answers_health(port), f"plain vLLM answers (log: {log})", START_S
        )
        assert child.poll() is None, log.read_text()[-3000:]
        # One at a time, each in one step: a partly prefilled request with a seed ends a plain vLLM on the CPU.
        return ask_all(port, matrix(), 1)


class Stack:
    """The example script on ports of its own."""

    def __init__(self, folder: Path, model: Path, *flags: str, script: str = "disagg_example_gaudi_lm.sh") -> None:
        self.run_dir = folder
        self.log = folder / "example.log"
        self.proxy, self.prefiller, self.decoder = free_ports(3)
        self.kv = free_ports_in_a_row(2)  # with nixl each rank has one
        self.command = [
            "bash", str(PACKAGE / script), "--device=cpu", f"--run-dir={folder}", f"--model={model}",
            f"--served-model-name={MODEL}", f"--max-model-len={MAX_MODEL_LEN}", f"--proxy-port={self.proxy}",
            f"--prefiller-port={self.prefiller}", f"--decoder-port={self.decoder}", f"--kv-port={self.kv}",
            "--kv-load=always", *flags,
        ]  # fmt: skip

    def run(self, **environment: str) -> int:
        """The whole example; its exit status."""
        with process(self.command, self.log, DISAGG_PYTHON=sys.executable, **environment) as child:
            return child.wait(900)

    @contextlib.contextmanager
    def serving(self):
        command = [*self.command, "--serve", "--", "--enable-server-load-tracking"]
        with process(command, self.log, DISAGG_PYTHON=sys.executable) as self.child:
            wait_until(lambda: "curl http" in self.text or self.child.poll() is not None, "the stack serves", START_S)
            assert self.child.poll() is None, self.text
            yield self

    @property
    def text(self) -> str:
        return self.log.read_text()

    @property
    def summary(self) -> dict:
        return json.loads((self.run_dir / "summary.json").read_text())

    def metric(self, name: str, port: int | None = None) -> float:
        """Sum of a metric's values, of the proxy or of the server at this port."""
        with urllib.request.urlopen(f"http://127.0.0.1:{port or self.proxy}/metrics", timeout=5) as response:
            text = response.read().decode()
        values = re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
        assert values, f"no metric {name}"
        return sum(map(float, values))

    def load(self, port: int) -> int:
        """Requests that the API server at this port is working on; unlike its metrics not told by the engine."""
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/load", timeout=5) as response:
            return json.load(response)["server_load"]


def left_running(folder: Path) -> list[str]:
    """Command lines of processes that carry the run directory's name."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            line = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if str(folder) in line:
                found.append(line)
    return found


# whole runs


@pytest.mark.parametrize(
    ("script", "backend", "kv_load"),
    [
        ("disagg_example_gaudi_lm.sh", "lm", "always"),
        ("disagg_example_gaudi_lm_tp2.sh", "shm", "auto"),
        ("disagg_example_gaudi_lm_tp2.sh", "nixl", "always"),
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
    assert summary["kv_loaded_tokens"] == 300 * loaded
    assert (summary["kv_load_tokens_per_s"] or 0) > 0 or loaded == 0
    assert (summary["kv_calibration_tokens_per_s"] is not None) is (kv_load == "auto")
    assert (summary["backend"], summary["tensor_parallel_size"], summary["device"]) == (backend, ranks, "cpu")
    logs = {"prefiller.log", "decoder.log", "proxy.log"} | ({"kv_server.log"} if backend != "nixl" else set())
    assert logs <= {path.name for path in tmp_path.iterdir()}
    assert left_running(tmp_path) == []


def test_a_corrupted_load_is_noticed(model_folder, tmp_path):
    stack = Stack(tmp_path, model_folder, "--num-prompts=2", "--input-len=300", "--output-len=8")
    path = f"{REPOSITORY / 'tests' / 'helpers'}:{os.environ.get('PYTHONPATH', '')}"
    status = stack.run(KV_CONNECTOR_MODULE="corrupting_connector", PYTHONPATH=path)
    assert status == 1, stack.text
    assert stack.summary["outputs_match"] is False
    assert stack.summary["errors"] == 0


# a stack that serves


@pytest.fixture(scope="module")
def lm_stack(model_folder, tmp_path_factory):
    with Stack(tmp_path_factory.mktemp("lm"), model_folder).serving() as stack:
        yield stack


class Redis:
    """A Redis that is not the stack's own, so it can die and come back."""

    def __init__(self) -> None:
        self.port = free_ports(1)[0]
        self.start()

    def start(self) -> None:
        self.child = subprocess.Popen(
            ["redis-server", "--bind", "127.0.0.1", "--port", str(self.port), "--save", "", "--requirepass", "s3cret"],
            stdout=subprocess.DEVNULL,
        )
        wait_until(lambda: self("PING") == "PONG", "Redis answers")

    def __call__(self, *words: str) -> str:
        command = ["redis-cli", "-p", str(self.port), "-a", "s3cret", "--no-auth-warning", *words]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    def kill(self) -> None:
        self.child.kill()
        self.child.wait()


@pytest.fixture(scope="module")
def redis_store():
    if not shutil.which("redis-server"):
        pytest.skip("redis-server is not installed")
    redis = Redis()
    yield redis
    redis.kill()


@pytest.fixture(scope="module")
def redis_stack(redis_store, model_folder, tmp_path_factory):
    flags = ("--backend=redis", f"--redis-url=redis://:s3cret@127.0.0.1:{redis_store.port}")
    with Stack(tmp_path_factory.mktemp("redis"), model_folder, *flags).serving() as stack:
        yield stack


@pytest.fixture(params=["lm", "redis"])
def stack(request):
    return request.getfixturevalue(f"{request.param}_stack")


def differs(answer: Answer, reference: Answer) -> bool:
    """Whether other tokens came for another reason than a throw of the dice on the edge.

    float32 sums in another order differ in the last bits, 1e-4 in the log-probabilities here. A sampled token can
    change by that; then the distribution it was drawn from must be the same.
    """
    if answer.tokens == reference.tokens:
        return False
    at = next(i for i, (a, r) in enumerate(zip(answer.tokens, reference.tokens, strict=True)) if a != r)
    if not reference.top:
        return True
    ours, theirs = answer.top[at], reference.top[at]  # the five likeliest, and the one that was drawn
    common = ours.keys() & theirs.keys()
    return len(common) < 5 or any(abs(ours[token] - theirs[token]) > 1e-3 for token in common)


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


class Load:
    """Asks without pause until stopped; every answer must be right, reused or not."""

    def __init__(self, stack: Stack, reference: list[Answer]) -> None:
        pairs = [(c, r) for c, r in zip(matrix(), reference, strict=True) if r.prompt_tokens < 1300]
        self.pairs, self.stack = pairs, stack
        self.wrong: list[str] = []
        self.reused: list[bool] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(i,)) for i in range(4)]

    def _run(self, i: int) -> None:
        while not self._stop.is_set():
            case, wanted = self.pairs[i % len(self.pairs)]
            i += 7
            try:
                answer = ask(self.stack.proxy, case)
            except (urllib.error.URLError, OSError, AssertionError) as error:
                self.wrong.append(f"{case.name}: {error}")
                return
            if differs(answer, wanted):
                self.wrong.append(f"{case.name}: other tokens")
            self.reused.append(answer.full_reuse)

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(REQUEST_S)

    def wait_for(self, answers: int) -> None:
        """Until that many more answers have come."""
        wanted = len(self.reused) + answers
        wait_until(lambda: len(self.reused) >= wanted or bool(self.wrong), f"{answers} answers", REQUEST_S)


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
        assert redis_stack.metric("disagg_kv_degraded") == 0
        before = len(log.read_text())
        redis_store.kill()
        begin = time.monotonic()
        wait_until(lambda: redis_stack.metric("disagg_kv_degraded") == 1, "the gauge shows the dead store", 15)
        wait_until(lambda: "is not visible" in log.read_text()[before:], "the prefiller's log names the cause", 10)
        assert time.monotonic() - begin < 15
        load.wait_for(8)
        redis_store.start()
        wait_until(lambda: redis_stack.metric("disagg_kv_degraded") == 0, "the gauge shows the recovery", 40)
        load.wait_for(4)
        load.reused.clear()
        load.wait_for(8)
        assert all(load.reused[:8]), "requests after the recovery reuse again"
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
            assert float(response.headers["x-kv-wait-ms"]) < 900  # 1 s: nobody knew the request
    assert [lm_stack.metric(f"disagg_{name}_total") for name in counts] == [count + 2 for count in before]


def post(port: int, path: str, body: dict):
    data = json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"content-type": "application/json"})
    return urllib.request.urlopen(request, timeout=REQUEST_S)


@pytest.mark.parametrize(("stage", "stream"), [("prefill", False), ("decode", False), ("decode", True)])
def test_a_hang_up_is_an_abort_in_vllm(lm_stack, stage, stream):
    """Seen as: the API server works on nothing, the engine runs nothing, and no request has come to its end.

    vLLM counts no abort that comes from a client (finished_reason="abort" is for those that the engine makes),
    and its engine looks for aborts between two steps: in prefill it works on for a step or two.
    """
    port = lm_stack.prefiller if stage == "prefill" else lm_stack.decoder
    size, answer = (MAX_MODEL_LEN - 100, 4) if stage == "prefill" else (20, MAX_MODEL_LEN - 100)
    body = {"prompt": prompt_tokens(random.Random(), size), "max_tokens": answer, "ignore_eos": True, "stream": stream}
    data = json.dumps({"model": MODEL, **body}).encode()
    ports = (lm_stack.prefiller, lm_stack.decoder)
    # Streams that are cut stay in vLLM's count of its API server: only what is added counts.
    loads = [lm_stack.load(each) for each in ports]
    to_its_end = r'vllm:request_success_total\{[^}]*finished_reason="(?:length|stop)"[^}]*\}'
    finished = lm_stack.metric(to_its_end, port)
    with socket.create_connection(("127.0.0.1", lm_stack.proxy)) as client:
        client.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\n\r\n%b" % (len(data), data)
        )
        wait_until(lambda: lm_stack.metric("vllm:num_requests_running", port) == 1, f"{stage} runs", 20)
        begin = time.monotonic()
    if stage == "prefill" or not stream:
        wait_until(lambda: [lm_stack.load(each) for each in ports] == loads, "the API servers are free", 5)
    else:
        wait_until(lambda: lm_stack.metric("vllm:num_requests_running", port) == 0, "the engine is free", 5)
    assert time.monotonic() - begin < 0.5  # the aim is 0.1 s; the rest is room for a busy machine
    wait_until(lambda: lm_stack.metric("vllm:num_requests_running", port) == 0, "the engine is free", 20)
    assert lm_stack.metric(to_its_end, port) == finished


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
    pids = [
        int(entry.parent.name)
        for entry in Path("/proc").glob("[0-9]*/cmdline")
        if f"--port\0{lm_stack.decoder}\0".encode() in entry.read_bytes()
    ]
    assert pids
    os.kill(min(pids), signal.SIGKILL)
    status = lm_stack.child.wait(15)
    assert status == 1
    assert "decoder was killed" in lm_stack.text
    assert left_running(lm_stack.run_dir) == []
