"""A small queueing model of both arms: prefill and decode servers apart, or whole servers. Times in seconds.

A prefill server computes one prompt after the other: the pool is a G/G/c queue, Erlang's C for the chance to wait,
Allen and Cunneen's correction for how arrivals and prompts vary, an exponential tail. A decode server steps all its
requests at once, and a step takes longer with each of them: Little's law gives how many there are, a Poisson number of
them how the time between tokens varies. In a whole server prompts take the engine from the steps: what is left of the
time is what its requests get. Left out: preemption and what fits into a card's memory, a KV store that is the slowest
part, prefix caches, and that some requests of a whole server meet more prompts than others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Rates:
    """What was measured of one server.

    prefill_s: one prompt, computed alone; handover_s: from its end until the decode server goes on; step_s: one decode
    step with no request, slope_s: what each request adds to it.
    """

    prefill_s: float
    step_s: float
    slope_s: float = 0.0
    handover_s: float = 0.0


@dataclass(frozen=True)
class Load:
    """Requests per second, answer tokens, squared coefficients of variation of arrivals and of prompts' lengths."""

    rate: float
    output_tokens: float
    arrival_cv2: float = 1.0
    prompt_cv2: float = 0.0

    def at(self, rate: float) -> Load:
        return replace(self, rate=rate)


@dataclass(frozen=True)
class Targets:
    """Seconds, None: any; ``share`` of the requests must meet all of them."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2el_s: float | None = None
    share: float = 0.9


def erlang_c(servers: int, offered: float) -> float:
    """The chance that a request waits; ``offered``: servers that are busy on average."""
    if offered >= servers:
        return 1.0
    blocked = 1.0  # Erlang's B, by its recursion
    for count in range(1, servers + 1):
        blocked = offered * blocked / (count + offered * blocked)
    return blocked / (1 - offered / servers * (1 - blocked))


@dataclass(frozen=True)
class Queue:
    """A pool of servers that take one request at a time."""

    servers: int
    service_s: float
    load: Load

    @property
    def busy(self) -> float:
        """Share of the time that a server works; 1 or more: it never keeps up."""
        return self.load.rate * self.service_s / self.servers

    @property
    def mean_wait_s(self) -> float:
        """Allen and Cunneen's approximation."""
        if self.busy >= 1:
            return math.inf
        varies = (self.load.arrival_cv2 + self.load.prompt_cv2) / 2
        waits = erlang_c(self.servers, self.load.rate * self.service_s)
        return waits * varies * self.service_s / (self.servers * (1 - self.busy))

    def wait_quantile_s(self, share: float) -> float:
        """The wait that this share of the requests does not exceed."""
        waits = erlang_c(self.servers, self.load.rate * self.service_s)
        if self.busy >= 1 or share <= 1 - waits:
            return math.inf if self.busy >= 1 else 0.0
        return self.mean_wait_s / waits * math.log(waits / (1 - share))

    def share_within(self, seconds: float) -> float:
        """Share of the requests that wait no longer."""
        if self.busy >= 1 or seconds < 0:
            return 0.0
        waits = erlang_c(self.servers, self.load.rate * self.service_s)
        mean = self.mean_wait_s / waits if waits else 0.0
        return 1 - waits * math.exp(-seconds / mean) if mean else 1.0


@dataclass(frozen=True)
class Steps:
    """The decode steps of one of ``servers``; ``free``: share of the time that is left for them."""

    servers: int
    rates: Rates
    load: Load
    free: float = 1.0
    limit: int = 256  # requests in one step

    @property
    def requests(self) -> float:
        """In a step, on average; infinite where the servers do not keep up."""
        tokens = self.load.rate * self.load.output_tokens / self.servers  # a second, of one server
        room = self.free - tokens * self.rates.slope_s
        return tokens * self.rates.step_s / room if room > 0 else math.inf

    def tpot_s(self, requests: float) -> float:
        """Time between two tokens of one request with so many in a step."""
        return (self.rates.step_s + self.rates.slope_s * max(requests, 1.0)) / self.free

    def share_within(self, seconds: float) -> float:
        """Share of the requests with no longer time between two tokens: their number is nearly a Poisson one."""
        mean = self.requests
        if not mean <= self.limit:
            return 0.0
        if not self.rates.slope_s:
            return float(self.tpot_s(mean) <= seconds)
        most = (seconds * self.free - self.rates.step_s) / self.rates.slope_s
        # A request sees itself and those that are there: one more than a Poisson number.
        return 0.0 if most < 1 else 0.5 * (1 + math.erf((most - 0.5 - mean) / math.sqrt(2 * max(mean, 0.25))))


@dataclass(frozen=True)
class Arm:
    """Both stages of one way to serve: ``prefillers`` 0 means whole servers, which do both."""

    prefillers: int
    decoders: int
    rates: Rates
    load: Load

    @property
    def prefill(self) -> Queue:
        # A whole server gives a prompt the engine as soon as the one before it is done: decode steps wait, not it.
        return Queue(self.prefillers or self.decoders, self.rates.prefill_s, self.load)

    @property
    def decode(self) -> Steps:
        free = 1.0 if self.prefillers else 1 - self.prefill.busy
        return Steps(self.decoders, self.rates, self.load, max(free, 1e-9))

    def ttft_quantile_s(self, share: float) -> float:
        """Wait, prefill, hand-over and the first step."""
        return self.prefill.wait_quantile_s(share) + self.unloaded_ttft_s

    @property
    def unloaded_ttft_s(self) -> float:
        handover = self.rates.handover_s if self.prefillers else 0.0
        return self.rates.prefill_s + handover + self.rates.step_s

    @property
    def tpot_s(self) -> float:
        """Of the average request."""
        return self.decode.tpot_s(self.decode.requests)

    def attained(self, targets: Targets) -> float:
        """Share of the requests that meet all targets: both stages vary apart from each other."""
        prefill, decode = self.prefill, self.decode
        if prefill.busy >= 1 or not decode.requests <= decode.limit:
            return 0.0
        ttft = targets.ttft_s
        if targets.e2el_s is not None:
            rest = targets.e2el_s - (self.load.output_tokens - 1) * self.tpot_s
            ttft = rest if ttft is None else min(ttft, rest)
        share = 1.0 if ttft is None else prefill.share_within(ttft - self.unloaded_ttft_s)
        return share * (1.0 if targets.tpot_s is None else decode.share_within(targets.tpot_s))

    def best_rate(self, targets: Targets) -> float:
        """Highest rate, in requests per second, at which enough of the requests meet the targets; 0: at none."""
        low, high = 0.0, 2 * (self.prefillers + self.decoders) / self.rates.prefill_s
        for _ in range(50):
            middle = (low + high) / 2
            good = replace(self, load=self.load.at(middle)).attained(targets) >= targets.share
            low, high = (middle, high) if good else (low, middle)
        return low


def best_split(servers: int, rates: Rates, load: Load, targets: Targets) -> Arm:
    """The pair that meets the targets at the highest rate with so many servers, at that rate; at least two."""
    arms = [Arm(count, servers - count, rates, load) for count in range(1, servers)]
    best = max(arms, key=lambda arm: arm.best_rate(targets))
    return replace(best, load=load.at(best.best_rate(targets)))
