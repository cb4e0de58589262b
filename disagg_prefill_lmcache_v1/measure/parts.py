"""Where the time to the first token went: the parts that the proxy tells of each streamed answer (proxy/timing.py)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from disagg_prefill_lmcache_v1.measure.types import Answer

_CLOSE = 0.02  # the parts of a request sum to its TTFT within this part of it
_part = re.compile(r"(\w+);dur=(\d+(?:\.\d+)?)(?:,|$)").findall


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Linear between the two nearest ranks; None without values."""
    if not values:
        return None
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def all_points(arm: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Points of an arm of compare.json; of a sweep also the one with one request at a time."""
    return ([arm["serial"]] if arm.get("serial") else []) + arm["points"]


def rate_name(point: Mapping[str, Any]) -> str:
    """Requests per second of a point, or how else it was measured."""
    if point["request_rate"]:
        return f"{point['request_rate']:g}"
    return "one at a time" if point.get("serial") else "all at once"


def short(value: float) -> str:
    """Three digits, and never an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value >= 0.001 else "0"


def read_parts(header: str) -> dict[str, float]:
    """Milliseconds of each part, from a ``server-timing`` header."""
    return {name: float(ms) for name, ms in _part(header)}


def all_parts(answer: Answer) -> dict[str, float]:
    """Milliseconds of each part of the TTFT that the client has measured: what is left over is its own part."""
    if not answer.parts or answer.ttft_ms is None:
        return {}
    return {**answer.parts, "client": round(max(answer.ttft_ms - sum(answer.parts.values()), 0.0), 2)}


def summarise_parts(answers: Iterable[Answer]) -> dict[str, Any]:
    """Keys of summary.json: milliseconds of the parts, the slowest, and how often little is left for the client's."""
    told = [answer for answer in answers if answer.parts and answer.ttft_ms]
    parts = [all_parts(answer) for answer in told]
    figures: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(name for each in parts for name in each):  # in the order of a request's way
        values = [each.get(name, 0.0) for each in parts]
        of = {f"p{percent}": percentile(values, percent) for percent in (50, 90, 99)}
        figures[name] = {key: round(value or 0.0, 2) for key, value in of.items()}
        figures[name]["mean"] = round(sum(values) / len(values), 2)
    close = [abs(sum(answer.parts.values()) / answer.ttft_ms - 1) <= _CLOSE for answer in told if answer.ttft_ms]
    return {
        "ttft_parts_ms": figures,
        "ttft_slowest_part": max(figures, key=lambda name: figures[name]["mean"], default=None),
        "ttft_parts_close": round(sum(close) / len(close), 4) if close else None,
    }


def describe_parts(summary: dict[str, Any], shown: int = 4) -> str:
    """One line: the largest parts, by their mean."""
    means = {name: figures["mean"] for name, figures in summary["ttft_parts_ms"].items()}
    total = sum(means.values())
    if not total:
        return "-"
    largest = sorted(means, key=lambda name: -means[name])[:shown]
    return ", ".join(f"{name} {means[name]:,.1f} ms ({means[name] / total:.0%})" for name in largest)
