"""Simulates several prefill servers under the ways to choose one: by requests, by tokens, by how prompts begin.

The servers are those of simulate_routing.py (8B shape, a H100 each), with a prefix cache that never forgets; the choice
is made by the proxy's own code (``proxy/affinity.py``). Conversations: a system prompt that all share, then turns, each
with all before it; among them long documents that come once. Nothing here is a measurement.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from simulate_routing import WHOLE, Clock, Request, Server, percentiles, quantile

from disagg_prefill_lmcache_v1.proxy.affinity import PrefixTable, Prompt

SYSTEM, QUESTION, ANSWER, THINK_S = 1500, (50, 1200), (100, 600), 20.0  # tokens, and seconds between turns


class Asked(Prompt):
    """A prompt made of parts: (name, tokens until its end), shortest first."""

    def __init__(self, parts: list[tuple[str, int]]) -> None:
        super().__init__(b"", 0, parts[-1][1])
        self._keys = [(zlib.crc32(name.encode()), tokens) for name, tokens in parts]


class Prefiller(Server):
    """A prefill server with its cache, as the proxy sees it and as it is."""

    def __init__(self, clock: Clock, name: str) -> None:
        super().__init__(clock, WHOLE)
        self.name, self.in_flight, self.cache = name, 0, {0: 0}

    @property
    def work(self) -> float:
        return self.load.tokens + 64 * self.in_flight


def by_requests(turn: itertools.count[int], prompt: Asked, servers: list[Prefiller]) -> tuple[Prefiller, int]:
    first = next(turn) % len(servers)
    return min(servers[first:] + servers[:first], key=lambda each: each.in_flight), 0


def by_tokens(turn: itertools.count[int], prompt: Asked, servers: list[Prefiller]) -> tuple[Prefiller, int]:
    first = next(turn) % len(servers)
    return min(servers[first:] + servers[:first], key=lambda each: each.work), 0


class Sticky:
    """The rule before: the server that had the beginning, if it has at most 4 requests more than the least."""

    def __init__(self) -> None:
        self._had: dict[int, Prefiller] = {}

    def __call__(self, turn: itertools.count[int], prompt: Asked, servers: list[Prefiller]) -> tuple[Prefiller, int]:
        most = min(each.in_flight for each in servers) + 4
        keys = [key for key, _ in prompt.beginnings()]
        free = [each for each in servers if each.in_flight <= most]
        chosen = next((self._had[key] for key in reversed(keys) if self._had.get(key) in free), None)
        chosen = chosen or max(free, key=lambda each: zlib.crc32(each.name.encode(), keys[0]))
        self._had.update(dict.fromkeys(keys, chosen))
        return chosen, 0


class Affinity:
    """The proxy's."""

    def __init__(self) -> None:
        self._table: PrefixTable[Prefiller] = PrefixTable()

    def __call__(self, turn: itertools.count[int], prompt: Asked, servers: list[Prefiller]) -> tuple[Prefiller, int]:
        chosen, known = self._table.find(prompt, servers)
        self._table.note(prompt, chosen)
        return chosen, known


RULES = {
    "requests in flight": lambda: by_requests, "beginnings, within 4 requests (before)": Sticky,
    "tokens in flight (--prefix-affinity off)": lambda: by_tokens, "tokens and beginnings (default)": Affinity,
}  # fmt: skip


def conversations(rate: float, seconds: float, documents: float, seed: int) -> list[tuple[float, Asked]]:
    """Prompts and when they come: ``rate`` new conversations a second, ``documents`` of all prompts are long ones."""
    rng, found, at = random.Random(seed), [], 0.0
    while (at := at + rng.expovariate(rate)) < seconds:
        parts, then, name = [("system", SYSTEM)], at, f"{at}"
        for turn in range(rng.randint(1, 8)):
            parts.append((f"{name}/{turn}", parts[-1][1] + rng.randint(*QUESTION) + (turn > 0) * rng.randint(*ANSWER)))
            found.append((then, Asked(list(parts))))
            if rng.random() < documents:
                found.append((then, Asked([(f"document {name}/{turn}", quantile("in", rng.random()))])))
            then += rng.expovariate(1 / THINK_S)
    return sorted(found, key=lambda each: each[0])


def run(load: list[tuple[float, Asked]], rule: Callable[..., tuple[Prefiller, int]], count: int) -> str:
    """A row: TTFT of prefill, and the share of prompt tokens that were computed."""
    clock, turn, requests = Clock(), itertools.count(), []
    servers = [Prefiller(clock, f"http://prefill-{number}") for number in range(count)]

    def send(prompt: Asked) -> None:
        server, known = rule(turn, prompt, servers)
        tokens = prompt.tokens - known
        cached = max(tokens for key, tokens in [*prompt.beginnings(), (0, 0)] if key in server.cache or not tokens)
        server.cache.update(prompt.beginnings())
        server.load.tokens += tokens
        server.in_flight += 1

        def done(now: float) -> None:
            server.load.tokens -= tokens
            server.in_flight -= 1

        requests.append(
            (Request(clock.now, prompt.tokens, 1, computed=min(cached, prompt.tokens - 1), done=done), cached)
        )
        server.add(requests[-1][0])

    for at, prompt in load:
        clock.call(at, lambda prompt=prompt: send(prompt))
    clock.run()
    ttft = " / ".join(f"{value:,.0f}" for value in percentiles([each.ttft for each, _ in requests]))
    total = sum(each.prompt for each, _ in requests)
    return f"{ttft} | {100 * (1 - sum(cached for _, cached in requests) / total):.0f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prefillers", type=int, default=4, help="(4)")
    parser.add_argument("--rates", type=float, nargs="+", default=[4.0, 8.0], help="new conversations a second (4 8)")
    parser.add_argument("--documents", type=float, nargs="+", default=[0.0, 0.2], help="share of turns (0 0.2)")
    parser.add_argument("--seconds", type=float, default=300.0, help="of arrivals (300)")
    parser.add_argument("--seed", type=int, default=3, help="(3)")
    args = parser.parse_args()
    print(
        "| conversations/s, documents | rule | TTFT ms p50 / p90 / p99 | prompt tokens computed |\n"
        + "| --- " * 4
        + "|"
    )
    for rate, documents in itertools.product(args.rates, args.documents):
        load = conversations(rate, args.seconds, documents, args.seed)
        for name, rule in RULES.items():
            print(f"| {rate:g}, {100 * documents:g} % | {name} | {run(load, rule(), args.prefillers)} |", flush=True)


if __name__ == "__main__":
    main()
