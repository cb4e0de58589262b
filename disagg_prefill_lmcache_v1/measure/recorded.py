"""What a run's files tell the plan: compare.json of both arms, or summary.json of the pair alone. Times in seconds."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from disagg_prefill_lmcache_v1.measure.parts import percentile
from disagg_prefill_lmcache_v1.measure.queueing import Arm, Load, Rates
from disagg_prefill_lmcache_v1.settings import SettingsError

ALONE = 10  # percentile of TTFT of requests that met no other one, at the lowest rate
SHARES = (50, 90, 99)
# Parts of TTFT that are neither computing the prompt nor the hand-over.
NOT_HANDED = ("proxy_queue", "prefill_queue", "prefill", "first_step", "client")


@dataclass(frozen=True)
class Recorded:
    """None where the run does not tell. ``points`` by arm: the lists of compare.json."""

    prefill_s: float | None = None
    step_s: float | None = None
    slope_s: float | None = None
    handover_s: float | None = None
    input_tokens: float | None = None
    output_tokens: float | None = None
    input_cv: float | None = None
    points: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    servers: tuple[int, int] = (1, 1)  # of prefill, of decode; the plain arm has as many as both


def read_run(folder: Path) -> Recorded:
    """Raises SettingsError where there is neither file, or one that cannot be understood."""
    for name, reader in (("compare.json", of_comparison), ("summary.json", of_summary)):
        path = folder / name
        if path.is_file():
            try:
                return reader(json.loads(path.read_text(encoding="utf-8")))
            except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
                raise SettingsError(f"--run-dir: {path} cannot be understood: {error!r}") from None
    raise SettingsError(f"--run-dir {str(folder)!r}: allowed: a folder with compare.json or summary.json")


def of_comparison(content: Mapping[str, Any]) -> Recorded:
    """What both arms tell: the plain one computes alone, the pair steps alone."""
    arms = {name: open_points(content["arms"][name]["points"]) for name in ("plain", "pair")}
    flags = content.get("flags") or {}
    servers = (int(flags.get("prefillers") or 1), int(flags.get("decoders") or 1))
    requests = [each for points in arms.values() for point in points for each in point.get("requests") or ()]
    inputs = [each["input_tokens"] for each in requests]
    outputs = [each["output_tokens"] for each in requests]
    workload = content.get("workload") or {}
    input_tokens = statistics.fmean(inputs) if inputs else workload.get("input_len")
    output_tokens = statistics.fmean(outputs) if outputs else workload.get("output_len")
    step_s, slope_s = steps_of(arms["pair"], servers[1], output_tokens)
    plain, pair = (ttft_alone_s(arms[name][0]) for name in ("plain", "pair"))
    return Recorded(
        prefill_s=plain - step_s if step_s is not None else None, step_s=step_s, slope_s=slope_s,
        handover_s=max(pair - plain, 0.0), input_tokens=input_tokens, output_tokens=output_tokens,
        input_cv=statistics.pstdev(inputs) / input_tokens if inputs else None, points=arms, servers=servers,
    )  # fmt: skip


def open_points(points: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those with a rate of arrivals, the lowest first: all requests at once, or one after the other, have none."""
    found = [each for each in points if isinstance(each["request_rate"], (int, float))]
    found = [each for each in found if 0 < each["request_rate"] < math.inf]
    return sorted(found, key=lambda each: each["request_rate"])


def ttft_alone_s(point: Mapping[str, Any]) -> float:
    """TTFT of a request that met no other one, nearly; the median where single requests are not recorded."""
    single = [each["ttft_ms"] for each in point.get("requests") or () if not each.get("error") and each.get("ttft_ms")]
    return (percentile(single, ALONE) if single else point["ttft_ms"]["p50"]) / 1000


def tpot_s(point: Mapping[str, Any]) -> float:
    """Mean time between two tokens; where it is not recorded the median of single steps."""
    mean = (point.get("tpot_ms") or {}).get("mean")
    return (point["itl_ms"]["p50"] if mean is None else mean) / 1000


def steps_of(points: Sequence[Mapping[str, Any]], decoders: int, tokens: float) -> tuple[float | None, float | None]:
    """Step without requests and what each adds, by least squares over the points; one point: all of it is the step."""
    rates = [each.get("request_throughput") or each["request_rate"] for each in points]  # a full server serves fewer
    found = [(rate / decoders * tokens * tpot_s(each), tpot_s(each)) for rate, each in zip(rates, points, strict=True)]
    requests, times = zip(*found, strict=True)
    middle, mean = statistics.fmean(requests), statistics.fmean(times)
    spread = sum((each - middle) ** 2 for each in requests)
    slope = sum((each - middle) * (time - mean) for each, time in found) / spread if spread > 1e-9 else 0.0
    slope = min(max(slope, 0.0), 0.9 * mean / max(middle, 1e-9))  # noise must not make a step take nothing
    return mean - slope * middle, slope


def of_summary(content: Mapping[str, Any]) -> Recorded:
    """What a run of the pair alone tells: parts of TTFT, and its steps as they were at its load."""
    parts = {name: figures["p50"] / 1000 for name, figures in (content.get("ttft_parts_ms") or {}).items()}
    itl = content.get("itl_ms_p50")
    return Recorded(
        prefill_s=parts.get("prefill"),
        step_s=None if itl is None else itl / 1000,
        handover_s=sum(time for name, time in parts.items() if name not in NOT_HANDED) if parts else None,
        input_tokens=content["input_len"],
        output_tokens=content["output_len"],
    )


def errors(recorded: Recorded, rates: Rates, load: Load) -> list[dict[str, Any]]:
    """For each point of a comparison: figures of the model and of the measurement, in milliseconds."""
    found = []
    for name, points in recorded.points.items():
        prefillers, decoders = recorded.servers
        counts = (prefillers, decoders) if name == "pair" else (0, prefillers + decoders)
        for point in points:
            arm = Arm(*counts, rates, load.at(point["request_rate"]))
            told = {f"TTFT p{each}": (arm.ttft_quantile_s(each / 100), point["ttft_ms"].get(f"p{each}"))
                    for each in SHARES}  # fmt: skip
            if name == "pair" or (point.get("tpot_ms") or {}).get("mean") is not None:
                told["TPOT"] = (arm.tpot_s, tpot_s(point) * 1000)
            figures = {key: (round(seconds * 1000, 2), seen) for key, (seconds, seen) in told.items()
                       if seen and math.isfinite(seconds)}  # fmt: skip
            found.append({"arm": name, "rate": point["request_rate"], "figures": figures})
    return found
