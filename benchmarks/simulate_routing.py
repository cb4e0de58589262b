"""Simulates a pair of servers and two plain ones under the ways that the proxy can choose (``--route``).

Discrete events: each server runs vLLM's steps (all running answers get a token, prompts take what is left of
``max_num_batched_tokens``), with times measured on two H100 (8B shape, bfloat16, CUDA graphs). The choices are made by
the proxy's own code (``proxy/routing.py``). ``--validate`` runs the two arms that were measured with the very arrival
times of the measurement and shows both. Nothing here needs a card; nothing here is a measurement.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import random
import sys
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from disagg_prefill_lmcache_v1.proxy.routing import AUTO, Load, Router

# Seconds, fitted to what was measured with one request at a time and with answers alone (docs/performance.md).
STEP = 6.5e-3  # a step that has anything to do
CONTEXT = 0.0525e-6  # more for each token that the answers of a step have as context
PREFILL = 24e-6  # more for each prompt token of a step
ATTENTION = 0.6e-9  # more for each prompt token and each token before it
SERVER = 4e-3  # request in, first token out, of the API server
HANDOVERS = {"nixl": (40e-3, 2.5e-6), "shm": (50e-3, 7.1e-6)}  # from prefill's answer to decode's first step: + a token
WHOLE = 8192  # tokens of a step, vLLM's default on such a card

QUANTILES = {
    # share of requests: tokens; Mooncake's conversation trace (Apache-2.0), read off its published file
    "in": ((0.0, 900), (0.5, 6909), (0.9, 27367), (0.99, 85401), (1.0, 120000)),
    "out": ((0.0, 20), (0.5, 350), (0.9, 597), (0.99, 1120), (1.0, 2000)),
}


@dataclass
class Request:
    """One request; times are seconds of the simulation."""

    at: float
    prompt: int
    answer: int
    computed: int = 0
    made: int = 0
    tokens: list[float] = field(default_factory=list)
    reason: str = ""
    done: Callable[[float], None] | None = None  # told of the first token

    @property
    def ttft(self) -> float:
        return self.tokens[0] - self.at + SERVER

    @property
    def gaps(self) -> list[float]:
        return [b - a for a, b in itertools.pairwise(self.tokens)]


class Clock:
    """Events in the order of their times."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()

    def call(self, at: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._events, (at, next(self._count), what))

    def run(self) -> None:
        while self._events:
            self.now, _, what = heapq.heappop(self._events)
            what()


class Server:
    """A vLLM engine: steps, one after the other, while there is work."""

    def __init__(self, clock: Clock, budget: int, note_gap: Callable[[float], None] | None = None) -> None:
        self._clock = clock
        self._budget = budget
        self._note_gap = note_gap
        self.waiting: deque[Request] = deque()  # prompts to compute, the first may be under way
        self.answering: list[Request] = []
        self._busy = False
        self.load = Load()

    def add(self, request: Request, loaded: bool = False) -> None:
        """Compute a prompt and answer it; with ``loaded`` its KV is there."""
        if loaded:
            self.answering.append(request)
        else:
            self.waiting.append(request)
        if not self._busy:
            self._busy = True
            self._clock.call(self._clock.now, self._step)

    def _step(self) -> None:
        answering = list(self.answering)
        left = self._budget - len(answering)
        seconds = STEP + CONTEXT * sum(r.prompt + r.made for r in answering)
        finished = []
        for request in self.waiting:
            if left <= 0:
                break
            share = min(left, request.prompt - request.computed)
            seconds += share * (PREFILL + ATTENTION * (request.computed + share / 2))
            request.computed += share
            left -= share
            if request.computed == request.prompt:
                finished.append(request)
        self._clock.call(self._clock.now + seconds, lambda: self._end(answering, finished))

    def _end(self, answering: list[Request], finished: list[Request]) -> None:
        now = self._clock.now
        for request in finished:
            self.waiting.remove(request)
            self.answering.append(request)
        for request in (*answering, *finished):
            if request.tokens and self._note_gap:
                self._note_gap(now - request.tokens[-1])
            request.tokens.append(now)
            request.made += 1
            if request.made == 1 and request.done:
                request.done(now)
            if request.made >= request.answer:
                self.answering.remove(request)
        if self.waiting or self.answering:
            self._step()
        else:
            self._busy = False


class Plain:
    """Two servers that do everything, the next request to the next one."""

    def __init__(self, clock: Clock) -> None:
        self._turn = itertools.cycle([Server(clock, WHOLE) for _ in range(2)])

    def send(self, request: Request) -> None:
        next(self._turn).add(request)


class Pair:
    """One prefill and one decode server behind the proxy's router, which sees only what the proxy sees."""

    def __init__(
        self, clock: Clock, router: Router, handover: str, chunk: int, itl_target_s: float, early: bool = False
    ) -> None:
        self._clock = clock
        self._router = router
        self._start, self._per_token = HANDOVERS[handover]
        self._prefiller = Server(clock, WHOLE)
        self._decoder = Server(clock, chunk, self._note_gap)
        self._target = itl_target_s
        self._early = early  # the client gets the prefill server's token, the decode server goes on from there
        self._answers = self._over = 0

    def _note_gap(self, seconds: float) -> None:
        over = seconds > self._target
        self._over += over
        self._router.gaps.note(1.0, float(over))

    def send(self, request: Request) -> None:
        clock, load = self._clock, self._prefiller.load
        answers = len(self._decoder.answering)
        choice = self._router.choose(request.prompt, 0.0, load, self._decoder.load, answers)
        request.reason = f"{'direct' if choice.direct else 'pair'}:{choice.reason}"
        if choice.direct:
            self._direct(request, answers)
            return
        ahead = load.tokens + request.prompt
        load.tokens += request.prompt

        def prefilled(now: float) -> None:
            load.tokens -= request.prompt
            load.line.note(ahead, now - request.at)
            clock.call(now + self._start + self._per_token * request.prompt, lambda: self._decoder.add(request, True))
            if self._early:
                request.tokens.append(now)
                request.made = 1
                self._router.handover.note(request.prompt, 0.0)
            request.done = lambda then: self._router.handover.note(request.prompt, then - now)

        self._prefiller.add(Request(clock.now, request.prompt, 1, done=prefilled))

    def _direct(self, request: Request, answers: int) -> None:
        load, over = self._decoder.load, self._over
        ahead = load.tokens + request.prompt
        load.tokens += request.prompt

        def first(now: float) -> None:
            load.tokens -= request.prompt
            load.line.note(ahead, now - request.at)
            self._router.gaps.note_harm(request.prompt, answers, self._over - over)

        request.done = first
        self._decoder.add(request)


# --- loads


def fixed(prompt: int, answer: int, rate: float, count: int, seed: int = 11) -> list[Request]:
    """Poisson arrivals; with the seed 11 the arrival times of the measurement."""
    rng, at, requests = random.Random(seed), 0.0, []
    for _ in range(count):
        requests.append(Request(at, prompt, answer))
        at += rng.expovariate(rate)
    return requests


def mooncake(rate: float, count: int, seed: int = 5) -> list[Request]:
    """Lengths by the quantiles of Mooncake's conversation trace, arrivals in bursts (CV 3), no shared beginnings."""
    rng, at, requests = random.Random(seed), 0.0, []
    for _ in range(count):
        requests.append(Request(at, quantile("in", rng.random()), quantile("out", rng.random())))
        at += rng.gammavariate(1 / 9, 9 / rate)
    return requests


def quantile(name: str, share: float) -> int:
    for (low, a), (high, b) in itertools.pairwise(QUANTILES[name]):
        if share <= high:
            return int(a + (b - a) * (share - low) / (high - low))
    raise AssertionError(share)


def run(requests: Iterable[Request], make: Callable[[Clock], Plain | Pair]) -> list[Request]:
    """Simulate; returns the requests with their tokens' times."""
    clock = Clock()
    requests = list(requests)
    arm = make(clock)
    for request in requests:
        clock.call(request.at, lambda request=request: arm.send(request))
    clock.run()
    return requests


# --- output


def percentiles(values: list[float]) -> list[float]:
    """p50, p90, p99 in ms."""
    values = sorted(values)
    return [1000 * values[min(len(values) - 1, int(len(values) * p / 100))] for p in (50, 90, 99)]


def row(name: str, requests: list[Request]) -> str:
    """One row of a table: TTFT, ITL, goodput at ttft:1000 tpot:30, share of direct requests."""
    texts = [
        " / ".join(f"{value:,.0f}" if value >= 100 else f"{value:.1f}" for value in percentiles(values))
        for values in ([r.ttft for r in requests], [gap for r in requests for gap in r.gaps])
    ]
    good = sum(r.ttft <= 1.0 and sum(r.gaps) <= 0.03 * max(len(r.gaps), 1) for r in requests)
    span = max(r.tokens[-1] for r in requests)
    direct = sum(r.reason.startswith("direct") for r in requests)
    share = f"{100 * direct / len(requests):.0f} %" if any(r.reason for r in requests) else ""
    return f"| {name} | {texts[0]} | {texts[1]} | {good / span:.2f} | {share} |"


MEASURED = {
    (8000, 200, 2.0, 40): ("221 / 269 / 348 | 7.4 / 9.3 / 68", "283 / 818 / 1,089 | 7.7 / 9.4 / 22"),
    (8000, 200, 3.2, 50): ("229 / 359 / 470 | 8.3 / 10.6 / 186", "525 / 1,129 / 1,525 | 9.1 / 12.1 / 61"),
    (2000, 150, 10.0, 150): ("63 / 83 / 104 | 7.4 / 9.5 / 35", "133 / 249 / 324 | 7.7 / 8.9 / 19"),
}
"""Prompt, answer, requests/s, requests: two plain servers; vLLM's NixlConnector."""


def validate() -> None:
    """The measured arms, with the arrival times of the measurement."""
    print("| prompt/answer at requests/s | arm | | TTFT ms p50 / p90 / p99 | ITL ms p50 / p90 / p99 |")
    print("| --- | --- | --- | --- | --- |")
    for load, (plain, nixl) in MEASURED.items():
        for name, measured, make in (
            ("plain", plain, Plain),
            ("vLLM NIXL", nixl, lambda clock: Pair(clock, Router("always"), "nixl", WHOLE, 1.0)),
        ):
            head = f"| {load[0]:,}/{load[1]} at {load[2]:g} | {name}"
            print(f"{head} | measured | {measured} |")
            print(f"{head} | simulated |{'|'.join(row('', run(fixed(*load), make)).split('|')[2:4])}|")


def arms(args: argparse.Namespace) -> dict[str, Callable[[Clock], Plain | Pair]]:
    """Everything to compare."""

    def pair(mode: str, chunk: int, threshold: int = 0, early: bool = False) -> Callable[[Clock], Pair]:
        router = lambda: Router(mode, threshold, args.ttft_target_ms / 1000)  # noqa: E731
        return lambda clock: Pair(clock, router(), args.handover, chunk, args.itl_target_ms / 1000, early)

    found: dict[str, Callable[[Clock], Plain | Pair]] = {"two plain servers": Plain, "always": pair("always", WHOLE)}
    for threshold in args.thresholds:
        found[f"{threshold:,}"] = pair("", WHOLE, threshold)
    for chunk in args.chunks:
        found[f"auto, steps of {chunk:,} tokens"] = pair(AUTO, chunk)
    found["auto, first token from the prefill server (not built)"] = pair(AUTO, WHOLE, early=True)
    return found


def compare(args: argparse.Namespace) -> None:
    """The policies under each load."""
    loads = {
        f"{prompt:,} in, {answer} out at {rate:g}/s": fixed(prompt, answer, rate, args.requests, args.seed)
        for prompt, answer, rate, _ in MEASURED
    }
    for rate in args.mooncake:
        loads[f"Mooncake's conversation at {rate:g}/s"] = mooncake(rate, args.requests, args.seed)
    for title, requests in loads.items():
        print(f"\n{title}\n")
        print("| route | TTFT ms p50 / p90 / p99 | ITL ms p50 / p90 / p99 | goodput/s | direct |")
        print("| --- " * 5 + "|")
        for name, make in arms(args).items():
            fresh = [Request(r.at, r.prompt, r.answer) for r in requests]
            print(row(name, run(fresh, make)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--validate", action="store_true", help="measured and simulated, side by side")
    parser.add_argument("--requests", type=int, default=600, help="requests of each load (600)")
    parser.add_argument("--seed", type=int, default=3, help="of arrivals and lengths (3)")
    parser.add_argument("--handover", choices=HANDOVERS, default="nixl", help="how the KV cache travels (nixl)")
    parser.add_argument("--chunks", type=int, nargs="+", default=[512, 8192],
                        help="--max-num-batched-tokens of the decode server (512 8192)")  # fmt: skip
    parser.add_argument("--thresholds", type=int, nargs="+", default=[4000], help="tokens for --route TOKENS (4000)")
    parser.add_argument("--ttft-target-ms", type=float, default=0, help="0: none (0)")
    parser.add_argument("--itl-target-ms", type=float, default=30, help="(30)")
    parser.add_argument("--mooncake", type=float, nargs="+", default=[1.0, 2.0], help="requests/s (1 2)")
    args = parser.parse_args()
    validate() if args.validate else compare(args)


if __name__ == "__main__":
    main()
