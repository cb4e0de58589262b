"""Load on a disaggregated stack, and the proof that its answers are right and its KV cache is reused.

    python -m disagg_prefill_lmcache_v1.measure.load_and_verify --model NAME [--num-prompts N] ...

First a load of streamed completions goes through the proxy: time to first token (TTFT), inter-token latency (ITL),
errors, and how many prompt tokens the decoder reused. Then the probe: prompts of many sizes are answered greedily
through the proxy, and again by the prefiller alone, which computes all of them itself; the two must be equal token
for token. The result goes to summary.json and report.html in the run directory and, as a table, to the terminal.

Requests for which the decoder chose to compute what it could have loaded (--kv-load) count as reusing nothing by
choice: they are told, and left out of the reuse ratio.

Exit status: 0 when every request was answered, all outputs match and enough was reused; 1 when not; 2 for bad usage.
"""

from __future__ import annotations

import asyncio
import os
import random
import secrets
import sys
from collections.abc import Sequence
from typing import Any

from disagg_prefill_lmcache_v1.measure.completion_client import new_session, one_line
from disagg_prefill_lmcache_v1.measure.load import load
from disagg_prefill_lmcache_v1.measure.priority import go_first
from disagg_prefill_lmcache_v1.measure.probe import probe
from disagg_prefill_lmcache_v1.measure.progress import say, with_progress
from disagg_prefill_lmcache_v1.measure.report import ReportError, write_report
from disagg_prefill_lmcache_v1.measure.settings import Settings, parse_settings
from disagg_prefill_lmcache_v1.measure.summary import find_failures, format_table, summarise, write_summary
from disagg_prefill_lmcache_v1.measure.target import calibrate, inspect_target
from disagg_prefill_lmcache_v1.measure.types import LoadError, LoadResult, ProbeResult, Target, UsageError
from disagg_prefill_lmcache_v1.settings import SettingsError


def check_fit(settings: Settings, target: Target) -> None:
    """Do load and probe fit the model?

    Raises:
        UsageError: they do not.
    """
    longest = target.max_model_len
    if not longest:
        return
    if settings.num_prompts:
        for name in ("input_len", "output_len"):
            if getattr(settings, name) >= longest:
                raise UsageError(f"--{name.replace('_', '-')} must be below the model's {longest} tokens")
        if longest < settings.input_len + settings.output_len:
            raise UsageError(
                f"--input-len {settings.input_len} and --output-len {settings.output_len} "
                f"do not fit the model's {longest} tokens"
            )
    if settings.probe == "on" and longest < settings.probe_output_len + 2:
        raise UsageError(f"--probe-output-len does not fit the model's {longest} tokens")


async def _run_calibration(settings: Settings, seed: int) -> float | None:
    async with new_session() as session:
        target = await with_progress(inspect_target(session, settings), lambda: "waiting for the prefiller")
        return await with_progress(calibrate(session, settings, target, seed), lambda: "calibrating")


async def _run(settings: Settings, seed: int) -> tuple[dict[str, Any], list[str]]:
    async with new_session() as session:
        target = await with_progress(inspect_target(session, settings), lambda: "waiting for the prefiller")
        check_fit(settings, target)
        calibrated = None
        if settings.kv_load == "auto" and settings.calibrate != "off":
            calibrated = await with_progress(calibrate(session, settings, target, seed), lambda: "calibrating")
        rng = random.Random(seed)
        load_result = await load(session, settings, target, rng) if settings.num_prompts else LoadResult()
        answers = load_result.answers
        probe_result = ProbeResult()
        if settings.probe == "on" and not (answers and all(answer.error for answer in answers)):
            probe_result = await probe(session, settings, target, rng)
    summary = summarise(settings, target, load_result, probe_result, seed, calibrated)
    return summary, find_failures(settings, summary, answers, probe_result)


def run(settings: Settings) -> dict[str, Any]:
    """Load and probe. Returns the summary, in which `failures` is a list of lines: empty when all is well.

    Raises:
        UsageError: settings that do not fit together or do not fit the model.
        LoadError: the prefiller cannot be asked for its model.
    """
    seed = secrets.randbelow(2**32) if settings.seed is None else settings.seed
    say(f"load: {settings.num_prompts} requests of {settings.input_len} tokens to {settings.proxy_url}, seed {seed}")
    summary, failures = asyncio.run(_run(settings, seed))
    return {**summary, "failures": failures}


def _fail(message: object, status: int) -> int:
    say(f"load_and_verify: {message}")
    return status


def main(arguments: Sequence[str]) -> int:
    """Everything once; returns the exit status."""
    try:
        settings = parse_settings(arguments, os.environ)
    except SettingsError as error:
        return _fail(error, 2)
    try:
        if settings.calibrate == "only":
            rate = asyncio.run(_run_calibration(settings, secrets.randbelow(2**32)))
            print("calibration: " + ("not told by the decoder" if rate is None else f"{rate:,} tokens/s"), flush=True)
            return 0
        settings.run_dir.mkdir(parents=True, exist_ok=True)
        summary = run(settings)
        path = write_summary(settings.run_dir, summary)
    except LoadError as error:
        return _fail(error, 2 if isinstance(error, UsageError) else 1)
    except OSError as error:
        return _fail(f"--run-dir {settings.run_dir}: {error.strerror or one_line(str(error))}", 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    print(format_table(summary, colour=sys.stdout.isatty() and "NO_COLOR" not in os.environ))
    print(f"  summary: {path}", flush=True)
    try:
        print(f"  report: {write_report(settings.run_dir)}", flush=True)
    except (ReportError, OSError) as error:
        say(f"load_and_verify: no report: {error}")
    for line in summary["failures"]:
        say(f"load_and_verify: {line}")
    return 1 if summary["failures"] else 0


if __name__ == "__main__":
    go_first()
    raise SystemExit(main(sys.argv[1:]))
