"""What two arms under the same load have shown: a table, and one sentence that says which to use."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from disagg_prefill_lmcache_v1.measure.parts import all_points, describe_parts, percentile, rate_name, short

Point = Mapping[str, Any]  # of compare.json
NAMES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2el": "E2E"}
SHARE = 0.9  # of the requests that must meet the targets
RESAMPLED = 200
SURE = 2.0  # standard deviations


def open_points(arms: Mapping[str, Mapping[str, Any]]) -> dict[float, dict[str, Point]]:
    """Points of both arms by rate, the lowest first; all at once is no rate."""
    by_arm = {name: {each["request_rate"]: each for each in arm["points"]} for name, arm in arms.items()}
    rates = sorted(set.intersection(*(set(each) for each in by_arm.values())) - {0})
    return {rate: {name: each[rate] for name, each in by_arm.items()} for rate in rates}


def met(point: Point) -> float:
    """Share of a point's requests that met the targets."""
    return point["goodput"] * point["duration_s"] / (point["completed"] + point["failed"])


def sentence(arms: Mapping[str, Mapping[str, Any]], targets: Mapping[str, float]) -> str:
    """Which arm to use for this load."""
    points = open_points(arms)
    if not targets:
        rate = max(points)
        return f"at {rate:g} requests/s: {without_targets(points[rate])}; --goodput ttft:MS tpot:MS makes it advice"
    best = {name: max((rate for rate in points if met(points[rate][name]) >= SHARE), default=0.0) for name in arms}
    rate = max(best.values()) or min(points)
    text = f"at {rate:g} requests/s: {with_targets(points[rate], targets)}"
    if len(points) > 1:
        told = [f"{name} {highest(points, name, best[name])}" for name in arms]
        text += f"; highest rate that met the targets: {', '.join(told)}"
    return text


def highest(points: Mapping[float, Mapping[str, Point]], name: str, best: float) -> str:
    """The best rate of an arm, and those below at which it was worse: a rate is measured once."""
    missed = [f"{rate:g}" for rate in points if rate < best and met(points[rate][name]) < SHARE]
    return (f"{best:g} requests/s" if best else "none") + (f" (but not {', '.join(missed)})" if missed else "")


def with_targets(points: Mapping[str, Point], targets: Mapping[str, float]) -> str:
    """Which arm at one rate; 9 of 10 requests must meet the targets."""
    shares = {name: met(point) for name, point in points.items()}
    told = " and ".join(f"{NAMES[name]} under {limit:g} ms" for name, limit in targets.items())
    numbers = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
    good = [name for name, share in shares.items() if share >= SHARE]
    if len(good) == len(points):
        return f"either (plain servers are simpler): both meet {told} ({numbers} of the requests)"
    if good and within_noise(points):
        return f"no clear difference for {told} ({numbers} of the requests)"
    if good:
        return f"{good[0]}, for {told} ({numbers} of the requests)"
    only: dict[str, list[str]] = {name: [] for name in points}
    for metric, limit in targets.items():
        keeping = [name for name, point in points.items() if point[f"{metric}_ms"]["p90"] <= limit]
        if len(keeping) == 1:
            only[keeping[0]].append(f"{NAMES[metric]} under {limit:g} ms")
    if only["pair"] and only["plain"]:
        first, second = (" and ".join(only[name]) for name in ("pair", "plain"))
        return f"pair, if {first} matters more than {second}; plain otherwise ({numbers} of the requests meet both)"
    closer = "" if within_noise(points) else f": {max(shares, key=lambda name: shares[name])} comes closer"
    return f"neither for {told}{closer} ({numbers} of the requests)"


def within_noise(points: Mapping[str, Point]) -> bool:
    """Whether the shares that met the targets differ by no more than chance may make them."""
    (p, m), (q, n) = ((met(each), each["completed"] + each["failed"]) for each in points.values())
    return abs(p - q) <= SURE * math.sqrt(p * (1 - p) / m + q * (1 - q) / n)


def without_targets(points: Mapping[str, Point]) -> str:
    """Which arm has the lower latencies."""
    better: dict[str, list[str]] = {name: [] for name in points}
    same = []
    for title, of, percent in (("TTFT p50", ttft, 50), ("TPOT p50", tpot, 50), ("ITL p99", itl, 99)):
        values = {name: percentile([*of(point["requests"])], percent) for name, point in points.items()}
        if None in values.values():
            continue
        low, high = sorted(values, key=lambda name: values[name] or 0.0)
        if differ(
            *(point["requests"] for point in points.values()), lambda rows, of=of, p=percent: percentile([*of(rows)], p)
        ):
            better[low].append(f"{title} ({values[low]:,.3g} ms against {values[high]:,.3g})")
        else:
            same.append(title)
    told = [f"{name} for {' and '.join(titles)}" for name, titles in better.items() if titles]
    told += [f"no clear difference in {' and '.join(same)}"] if same else []
    return ", ".join(told)


def complete(requests: Iterable[Point]) -> Iterable[Point]:
    """Those that were answered."""
    return (each for each in requests if not each["error"] and each["ttft_ms"])


def ttft(requests: Iterable[Point]) -> Iterable[float]:
    return (each["ttft_ms"] for each in complete(requests))


def tpot(requests: Iterable[Point]) -> Iterable[float]:
    return (
        (each["e2el_ms"] - each["ttft_ms"]) / (each["output_tokens"] - 1)
        for each in complete(requests)
        if each["output_tokens"] > 1
    )


def itl(requests: Iterable[Point]) -> Iterable[float]:
    return itertools.chain.from_iterable(each["itls_ms"] for each in complete(requests))


def differ(ours: Sequence[Point], theirs: Sequence[Point], figure: Callable[[Sequence[Point]], float | None]) -> bool:
    """Whether a figure of two lists of requests differs by more than other samples of them would (bootstrap, 95 %)."""
    rng = random.Random(0)
    gaps = []
    for _ in range(RESAMPLED):
        a, b = (figure(rng.choices(rows, k=len(rows))) for rows in (ours, theirs))
        gaps.append((a or 0.0) - (b or 0.0))
    low, high = (percentile(gaps, each) or 0.0 for each in (2.5, 97.5))
    return low > 0 or high < 0


def table(arms: Mapping[str, Mapping[str, Any]], servers: int) -> str:
    """The figures for people; latencies are p50/p90/p99 in milliseconds."""
    rows = [["requests/s", "arm", "failed", *NAMES.values(), "answered/s", "tokens/s a server", "goodput/s"]]
    points = [(name, each) for name, arm in arms.items() for each in all_points(arm)]
    for name, point in sorted(points, key=_order):
        goodput = point.get("goodput")
        latencies = ("/".join(short(point[f"{key}_ms"][share]) for share in ("p50", "p90", "p99")) for key in NAMES)
        rows.append([
            rate_name(point), name, f"{point['failed']}", *latencies,
            short(point["request_throughput"]), short(point["output_throughput"] / servers),
            "-" if goodput is None else short(goodput),
        ])  # fmt: skip
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    return "\n".join(
        "  " + "  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _order(row: tuple[str, Point]) -> float:
    return -1.0 if row[1].get("serial") else row[1]["request_rate"] or math.inf


def where_ttft_goes(points: Sequence[Point]) -> str:
    """Of an arm's point with the highest rate: the largest parts of TTFT and what was reused."""
    point = max(points, key=lambda each: each["request_rate"])
    requests = [each for each in point["requests"] if each["parts"]]
    names = dict.fromkeys(name for each in requests for name in each["parts"])
    means = {name: {"mean": sum(each["parts"].get(name, 0.0) for each in requests) / len(requests)} for name in names}
    told = [each for each in point["requests"] if each["reused_tokens"] is not None]
    prompts = sum(each["input_tokens"] for each in told)
    reused = (
        f"; reused {sum(each['reused_tokens'] for each in told) / prompts:.1%} of the prompt tokens" if prompts else ""
    )
    return f"at {rate_name(point)} requests/s goes to: {describe_parts({'ttft_parts_ms': means})}{reused}"


def answers(arms: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """How many requests had the same answer in both arms, and the first one that had not."""
    equal = compared = 0
    first = ""
    for plain, pair in zip(*(all_points(arms[name]) for name in ("plain", "pair")), strict=True):
        for a, b in zip(plain["requests"], pair["requests"], strict=True):
            if not (a["error"] or b["error"]):
                compared += 1
                equal += a["text"] == b["text"]
                first = first or ("" if a["text"] == b["text"] else f"{b['text'][:60]!r} instead of {a['text'][:60]!r}")
    return {"compared": compared, "equal": equal, "first_difference": first}
