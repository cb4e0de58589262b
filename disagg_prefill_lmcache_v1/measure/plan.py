"""How many cards, and how many of them for prefill: advice from measured rates and a queueing model (queueing.py).

    python -m disagg_prefill_lmcache_v1.measure.plan --run-dir RUN_DIR --goodput "ttft:500 tpot:15"

The rates come from a run's ``compare.json`` or ``summary.json``, or are given one by one, which wins. With a
``compare.json`` the model is held against what it measured, and the error is told.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from disagg_prefill_lmcache_v1.measure.queueing import Arm, Load, Rates, Targets, best_split
from disagg_prefill_lmcache_v1.measure.recorded import Recorded, errors, read_run
from disagg_prefill_lmcache_v1.settings import SettingsError, load, setting

PREFIX = "DISAGG_PLAN_"
_TARGET = r"(ttft|tpot|e2el):[0-9]+(\.[0-9]+)?"
_OWN = {"kind": "number", "shown": "the run's"}


@dataclass(frozen=True)
class PlanSettings:
    """Milliseconds where nothing else is said."""

    run_dir: Path | None = setting(None, "folder of a run with compare.json or summary.json", kind="path")
    goodput: str = setting(
        "", "targets of a request in milliseconds, as vLLM spells them: 'ttft:500 tpot:15 e2el:9000'",
        pattern=rf"{_TARGET}([ ,]+{_TARGET})*", allowed="ttft:MS, tpot:MS, e2el:MS, one or more of them",
    )  # fmt: skip
    share: float = setting(0.9, "share of the requests that must meet the targets", above=0, high=0.999)
    cards: tuple[str, ...] = setting(
        ("2", "4", "8", "16", "32", "64"), "numbers of cards", pattern=r"[1-9][0-9]{0,3}", allowed="whole numbers"
    )
    tensor_parallel_size: int = setting(1, "cards of each server", low=1, high=64)
    request_rate: float = setting(0.0, "requests per second that must be served; 0: as many as can be", low=0)
    input_len: float | None = setting(None, "prompt tokens, on average", above=0, **_OWN)
    output_len: float | None = setting(None, "answer tokens, on average", above=0, **_OWN)
    prefill_rate: float | None = setting(None, "prompt tokens per second that one server computes", above=0, **_OWN)
    step: float | None = setting(None, "one decode step of a server with no requests", above=0, **_OWN)
    step_per_request: float | None = setting(None, "what each request adds to a decode step", low=0, **_OWN)
    handover: float | None = setting(None, "from the end of prefill until the decode server goes on", low=0, **_OWN)
    burstiness: float = setting(1.0, "how even arrivals are, as vLLM has it: 1 is Poisson, more is more even", above=0)
    input_cv: float | None = setting(None, "deviation of the prompt lengths by their mean", low=0, **_OWN)
    json: bool = setting(False, "print the plan as JSON")


def targets_of(settings: PlanSettings) -> Targets:
    """Raises SettingsError."""
    found = {name: float(value) / 1000 for name, value in re.findall(r"(\w+):([\d.]+)", settings.goodput)}
    if not found:
        raise SettingsError("--goodput is needed: targets as in 'ttft:500 tpot:15'")
    return Targets(found.get("ttft"), found.get("tpot"), found.get("e2el"), settings.share)


def inputs(settings: PlanSettings, recorded: Recorded) -> tuple[Rates, Load]:
    """Rates and load: what is given, else what the run recorded. Raises SettingsError for what is in neither."""

    def value(name: str, of_run: float | None, default: float | None = None) -> float:
        given = getattr(settings, name)
        found = given if given is not None else of_run if of_run is not None else default
        if found is None:
            raise SettingsError(f"--{name.replace('_', '-')} is needed: the run does not tell it")
        return found

    tokens = value("input_len", recorded.input_tokens)
    measured = recorded.prefill_s
    if measured is not None and recorded.input_tokens:
        measured = measured * tokens / recorded.input_tokens
    prefill_s = tokens / settings.prefill_rate if settings.prefill_rate is not None else measured
    if prefill_s is None:
        raise SettingsError("--prefill-rate is needed: the run does not tell it")
    rates = Rates(
        prefill_s=prefill_s,
        step_s=value("step", _ms(recorded.step_s)) / 1000,
        slope_s=value("step_per_request", _ms(recorded.slope_s), 0.0) / 1000,
        handover_s=value("handover", _ms(recorded.handover_s), 0.0) / 1000,
    )
    spread = value("input_cv", recorded.input_cv, 0.0)
    return rates, Load(1.0, value("output_len", recorded.output_tokens), 1 / settings.burstiness, spread**2)


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1000


def plan(settings: PlanSettings, recorded: Recorded) -> dict[str, Any]:
    """The advice. Raises SettingsError."""
    targets, (rates, load_) = targets_of(settings), inputs(settings, recorded)
    rows = []
    for cards in sorted({int(each) for each in settings.cards}):
        servers = cards // settings.tensor_parallel_size
        if not servers:
            continue
        plain_rate = Arm(0, servers, rates, load_).best_rate(targets)
        row: dict[str, Any] = {"cards": cards, "plain_rate": round(plain_rate, 3), "pair_rate": None, "split": None}
        if servers >= 2:
            pair = best_split(servers, rates, load_, targets)
            row |= {"pair_rate": round(pair.load.rate, 3)}
            row |= {"split": [pair.prefillers, pair.decoders] if pair.load.rate > 1e-6 else None}
        rows.append(row)
    return {
        "rates": {name: round(value, 6) for name, value in vars(rates).items()},
        "load": {name: value for name, value in vars(load_).items() if name != "rate"},
        "targets": vars(targets),
        "tensor_parallel_size": settings.tensor_parallel_size,
        "rows": rows,
        "errors": errors(recorded, rates, load_),
    }


def better(row: Mapping[str, Any]) -> str:
    """Which way serves more; within a tenth the model cannot tell."""
    pair, plain = row["pair_rate"] or 0.0, row["plain_rate"]
    if max(pair, plain) < 1e-6:
        return "neither meets the targets"
    if abs(pair - plain) <= 0.1 * max(pair, plain):
        return "alike"
    return "pair" if pair > plain else "plain"


def describe(found: Mapping[str, Any], wanted: float) -> str:
    """For people."""
    rates, load_, targets = found["rates"], found["load"], found["targets"]
    told = [f"{name} {targets[key] * 1000:g} ms" for name, key in
            (("TTFT", "ttft_s"), ("TPOT", "tpot_s"), ("E2E", "e2el_s")) if targets[key] is not None]  # fmt: skip
    lines = [
        f"  a server     prefill {rates['prefill_s'] * 1000:,.1f} ms a prompt, decode step "
        f"{rates['step_s'] * 1000:.2f} ms + {rates['slope_s'] * 1000:.3f} ms a request, "
        f"hand-over {rates['handover_s'] * 1000:,.1f} ms",
        f"  a request    {load_['output_tokens']:,g} answer tokens; "
        f"{', '.join(told)} for {targets['share']:.0%} of them",
        "",
        "  cards   pair, P:D of servers   requests/s   a card   plain servers   requests/s   a card   more",
    ]
    for row in found["rows"]:
        cards, pair = row["cards"], row["pair_rate"]
        split = f"{row['split'][0]}:{row['split'][1]}" if row["split"] else "-"
        cells = [f"{cards:7}", f"{split:>21}", f"{pair or 0:10.2f}", f"{(pair or 0) / cards:6.3f}"]
        cells += [f"{cards // found['tensor_parallel_size']:13}", f"{row['plain_rate']:10.2f}"]
        lines.append("   ".join([*cells, f"{row['plain_rate'] / cards:6.3f}", better(row)]))
    if wanted:
        enough = {way: next((row["cards"] for row in found["rows"] if (row[f"{way}_rate"] or 0) >= wanted), None)
                  for way in ("pair", "plain")}  # fmt: skip
        lines += ["", *(f"  {wanted:g} requests/s: {way}: " + (f"{cards} cards" if cards else "more cards than these")
                        for way, cards in enough.items())]  # fmt: skip
    lines += ["", *_error_lines(found["errors"])]
    return "\n".join(lines)


def _error_lines(found: Sequence[Mapping[str, Any]]) -> list[str]:
    if not found:
        return ["  not checked: without a compare.json nothing tells how far the model is off"]
    lines = ["  the model against what was measured, milliseconds:"]
    for row in found:
        parts = [f"{name} {told:,.1f} for {seen:,.1f}" for name, (told, seen) in row["figures"].items()]
        lines.append(f"  {row['arm']:5} at {row['rate']:g}/s: {', '.join(parts)}")
    ratios = sorted(abs(told / seen - 1) for row in found for told, seen in row["figures"].values() if seen)
    lines.append(f"  error: median {ratios[len(ratios) // 2]:.0%}, largest {ratios[-1]:.0%}")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status."""
    try:
        settings = load(
            PlanSettings, sys.argv[1:] if argv is None else argv, os.environ, prefix=PREFIX, prog="plan",
            description="Says how many cards a load needs, as a pair and as plain servers.",
        )  # fmt: skip
        recorded = read_run(settings.run_dir) if settings.run_dir else Recorded()
        found = plan(settings, recorded)
    except SettingsError as error:
        print(f"plan: error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found, indent=2) if settings.json else describe(found, settings.request_rate))
    return 0


if __name__ == "__main__":
    sys.exit(main())
