"""A stack on machines of their own (machines.py): two prefill and two decode servers, store, proxy and clients."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from launch_harness import LAUNCHER, PACKAGE, wait_until
from machines import Network, enter
from stack_harness import MODEL, START_S, process

PREFILLERS, DECODERS = ("prefill1", "prefill2"), ("decode1", "decode2")
MACHINES = (*PREFILLERS, *DECODERS, "store", "proxy")
PASSWORD = "s3cret"
LIMITS = {"DISAGG_PROXY_PREFILL_TIMEOUT_S": "30", "DISAGG_PROXY_DECODE_TIMEOUT_S": "30",
          "DISAGG_PROXY_STREAM_IDLE_TIMEOUT_S": "15", "DISAGG_PROXY_HEALTH_INTERVAL_S": "1"}  # fmt: skip
REQUEST_S = 90.0  # all limits of a request together, and some for a busy machine
REQUESTS = 200
AT_ONCE = 8
PORT = 8000  # every machine has all ports to itself


@dataclasses.dataclass
class Result:
    """What came of a request; ``error`` is the body of a refusal, or what is wrong with the answer."""

    status: int
    tokens: list[int]
    prompt_tokens: int
    reused: int
    took_s: float
    error: str = ""

    @property
    def full_reuse(self) -> bool:
        return self.status == 200 and self.reused >= self.prompt_tokens - 1


def prompts(count: int = REQUESTS) -> list[list[int]]:
    """Prompts of 8 to 500 tokens, some of which share their beginning."""
    rng = random.Random(18)
    base = [rng.randrange(300, 1000) for _ in range(300)]
    sizes = [rng.choice((8, 40, 129, 200, 257, 300)) for _ in range(count)]
    return [base * (i % 8 == 0) + [rng.randrange(300, 1000) for _ in range(size)] for i, size in enumerate(sizes)]


class MachineStack:
    """The launcher's servers on their machines."""

    def __init__(self, network: Network, backend: str, model: Path, folder: Path) -> None:
        self.network, self.backend, self.folder = network, backend, folder
        self.common = [
            "--device=cpu", f"--model={model}", f"--served-model-name={MODEL}", "--max-model-len=2048",
            f"--backend={backend}", "--kv-load=always",
        ]  # fmt: skip
        self._exits = contextlib.ExitStack()
        self._pool = ThreadPoolExecutor(AT_ONCE, initializer=lambda: enter(network.namespace("proxy")))
        self._direct = network.address(PREFILLERS[0]), 8100
        self.proxy = network.address("proxy"), PORT
        self.answered = 0  # requests so far

    def url(self, machine: str, port: int) -> str:
        return f"http://{self.network.address(machine)}:{port}"

    def start(self, machine: str, role: str, *flags: str, **environment: str) -> Path:
        """A server of the launcher on its machine; returns its log."""
        log = self.folder / f"{machine}.log"
        run_dir = self.folder / machine
        command = self.network.command(
            machine, "bash", str(PACKAGE / LAUNCHER), role, *self.common, f"--run-dir={run_dir}",
            f"--host={self.network.address(machine)}", *flags,
        )  # fmt: skip
        self._exits.enter_context(process(command, log, DISAGG_PYTHON=sys.executable, **environment))
        return log

    def __enter__(self) -> MachineStack:
        with contextlib.ExitStack() as on_error:
            on_error.callback(self.__exit__)
            environment = self._start_store()
            for role, machines in (("prefiller", PREFILLERS), ("decoder", DECODERS)):
                for machine in machines:
                    self.start(machine, role, f"--advertise-host={self.network.address(machine)}", **environment)
            urls = [f"--prefiller-url={self.url(name, 8100)}" for name in PREFILLERS]
            urls += [f"--decoder-url={self.url(name, 8200)}" for name in DECODERS]
            self.start("proxy", "proxy", *urls, **LIMITS)
            on_error.pop_all()
            begin = time.monotonic()
            wait_until(self._is_ready, f"all servers are ready (logs: {self.folder})", 2 * START_S)
            self.start_s = time.monotonic() - begin
        return self

    def _start_store(self) -> dict[str, str]:
        if self.backend == "nixl":
            return {}
        address = self.network.address("store")
        if self.backend == "lm":
            self.start("store", "kv-server")
            return {"DISAGG_KV_URL": f"lm://{address}:8300"}
        words = ["redis-server", "--bind", address, "--requirepass", PASSWORD, "--save", ""]
        self._exits.enter_context(process(self.network.command("store", *words), self.folder / "store.log"))
        return {"DISAGG_KV_URL": f"redis://:{PASSWORD}@{address}:6379"}

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._exits.close()

    def _is_ready(self) -> bool:
        return self._pool.submit(self._ready).result()

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://{self.proxy[0]}:{PORT}/ready", timeout=5) as response:
                servers = json.load(response)["servers"]
        except OSError:
            return False
        return all(all(members.values()) for members in servers.values())  # ready is said when one of a kind is

    # requests

    def answers(self, salt: str, count: int = REQUESTS, at_once: int = AT_ONCE, direct: bool = False) -> list[Result]:
        """What the stack answers to the prompts; no two salts share any KV.

        ``direct``: what the first prefill server alone answers, which stores and loads nothing.
        """
        host, port = self._direct if direct else self.proxy
        more = {"kv_transfer_params": {"lmcache.skip_save": True}} if direct else {}
        places = threading.Semaphore(at_once)

        def one(prompt: list[int]) -> Result:
            body = {"model": MODEL, "prompt": prompt, "max_tokens": 4, "temperature": 0, "ignore_eos": True}
            body |= {"return_token_ids": True, "cache_salt": salt, **more}
            with places:
                result = _ask(f"http://{host}:{port}/v1/completions", body)
            self.answered += 1  # near enough, whatever threads do
            return result

        return list(self._pool.map(one, prompts()[:count]))

    @contextlib.contextmanager
    def cut_for(self, seconds: float, *machines: str) -> Iterator[None]:
        """The links of these machines are cut from now on, and whole again after so many seconds."""
        self.network.set_links(cut=machines)
        timer = threading.Timer(seconds, self.network.set_links)
        timer.start()
        try:
            yield
        finally:
            timer.join()


def _ask(url: str, body: dict) -> Result:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    begin = time.monotonic()
    try:
        with urllib.request.urlopen(request, timeout=REQUEST_S) as response:
            answer = json.load(response)
            told = int(response.headers.get("x-reused-tokens", -1))
    except urllib.error.HTTPError as error:
        text = error.read().decode(errors="replace")
        return Result(error.code, [], 0, 0, time.monotonic() - begin, text)
    except (OSError, ValueError) as error:
        return Result(0, [], 0, 0, time.monotonic() - begin, f"{type(error).__name__}: {error}")
    usage = answer["usage"]
    tokens = answer["choices"][0]["token_ids"]
    return Result(200, tokens, usage["prompt_tokens"], told, time.monotonic() - begin)


def report(name: str, results: list[Result]) -> str:
    """One line for a person."""
    good = [result for result in results if result.status == 200]
    return (
        f"{name}: {len(good)} of {len(results)} answered, {sum(result.full_reuse for result in results)} fully reused, "
        f"longest {max(result.took_s for result in results):.1f} s"
    )


def check_all(stack: MachineStack, say=print) -> None:
    """The promises, one after the other, with one set of servers."""
    say(f"{stack.backend}: all servers ready after {stack.start_s:.0f} s, {os.cpu_count()} cores")
    reference = stack.answers("reference", direct=True)
    assert all(result.status == 200 for result in reference), reference[0]

    def check(name: str, results: list[Result]) -> None:
        say(report(name, results))
        wrong = [
            f"request {i}: {ours.tokens} instead of {theirs.tokens}"
            for i, (ours, theirs) in enumerate(zip(results, reference, strict=False))
            if ours.status == 200 and ours.tokens != theirs.tokens
        ]
        assert not wrong, f"{name}: {len(wrong)} answers are wrong: {wrong[:3]}"
        late = [result.took_s for result in results if result.took_s >= REQUEST_S]
        assert not late, f"{name}: {len(late)} requests were not ended by the proxy's limits"

    whole = stack.answers("whole")
    check("links as they are", whole)
    not_reused = [(i, result) for i, result in enumerate(whole) if not result.full_reuse]
    assert not not_reused, f"{len(not_reused)} of {len(whole)} not fully reused: {not_reused[:3]}"

    stack.network.set_links(delay_s=0.02, loss=0.01)
    slow = stack.answers("slow")
    stack.network.set_links()
    check("20 ms delay, 1 % loss", slow)
    assert all(result.status == 200 for result in slow), [result for result in slow if result.status != 200][:3]

    cut_off = [DECODERS[1], "store" if stack.backend != "nixl" else PREFILLERS[1]]
    with ThreadPoolExecutor(1) as beside:
        before = stack.answered
        running = beside.submit(stack.answers, "cut")
        wait_until(lambda: stack.answered >= before + AT_ONCE, "requests are under way")
        with stack.cut_for(5.0, *cut_off):
            pass
        cut = running.result()
    check(f"5 s without {' and '.join(cut_off)}", cut)
    refused = [result.error for result in cut if result.status != 200]
    assert all("message" in json.loads(text)["error"] for text in refused), refused[:3]

    attempt = iter(range(10**6))

    def heals() -> bool:
        results = stack.answers(f"healing {next(attempt)}", count=8)
        return all(result.full_reuse for result in results)

    wait_until(heals, "requests reuse all again after the cut", 60)
    healed = stack.answers("healed", count=REQUESTS // 2)
    check("links back", healed)
    assert all(result.full_reuse for result in healed), [result for result in healed if not result.full_reuse][:3]
