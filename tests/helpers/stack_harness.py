"""Real stacks for tests: requests and what they must be answered, the example script, a Redis that can die."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

from launch_harness import PACKAGE, free_ports, free_ports_in_a_row, wait_until

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
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=30) as response:
            return response.status == 200
    except OSError:
        return False


class Stack:
    """The example script on ports of its own."""

    def __init__(self, folder: Path, model: Path, *flags: str, script: str = "disagg_example_gaudi_lm.sh") -> None:
        self.run_dir = folder
        self.log = folder / "example.log"
        self.proxy, self.prefiller, self.decoder = free_ports(3)
        self.kv = free_ports_in_a_row(2)  # with nixl each server has one
        self.command = [
            "bash", str(PACKAGE / script), "--device=cpu", f"--run-dir={folder}", f"--model={model}",
            f"--served-model-name={MODEL}", f"--max-model-len={MAX_MODEL_LEN}", f"--proxy-port={self.proxy}",
            f"--prefiller-port={self.prefiller}", f"--decoder-port={self.decoder}",
            *([] if "--backend=shm" in flags else [f"--kv-port={self.kv}"]), "--kv-load=always", *flags,
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
        with urllib.request.urlopen(f"http://127.0.0.1:{port or self.proxy}/metrics", timeout=30) as response:
            text = response.read().decode()
        values = re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
        assert values, f"no metric {name}"
        return sum(map(float, values))

    def load(self, port: int) -> int:
        """Requests that the API server at this port is working on; unlike its metrics not told by the engine."""
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/load", timeout=30) as response:
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


# requests without pause


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

    def fresh(self) -> Answer:
        """What is answered to a prompt that nobody has seen: it is in no server's own prefix cache."""
        prompt = prompt_tokens(random.Random(), 300)
        body = {"prompt": prompt, "max_tokens": ANSWER, "ignore_eos": True, "return_token_ids": True}
        return ask(self.stack.proxy, Case("fresh", "/v1/completions", body))

    def wait_for(self, answers: int) -> None:
        """Until that many more answers have come."""
        wanted = len(self.reused) + answers
        wait_until(lambda: len(self.reused) >= wanted or bool(self.wrong), f"{answers} answers", REQUEST_S)


def post(port: int, path: str, body: dict):
    data = json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"content-type": "application/json"})
    return urllib.request.urlopen(request, timeout=REQUEST_S)
