"""Steps of a comparison: the same load on plain servers, and on prefill and decode servers.

    python -m disagg_prefill_lmcache_v1.measure.compare --step check|plain|pair|result ...

``check`` says what the load is. ``plain`` and ``pair`` measure the arm that runs, and write what they saw to a
folder ``compare``. ``result`` makes compare.json and report.html of them, and says which arm to use.

Exit status: 0; 1 where an arm cannot be measured, requests failed, or (on the CPU) answers of the arms differ; 2 for
bad usage.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from disagg_prefill_lmcache_v1.measure.arm import measure_arm
from disagg_prefill_lmcache_v1.measure.compare_settings import ARMS, CompareSettings, parse_settings
from disagg_prefill_lmcache_v1.measure.files import write_whole
from disagg_prefill_lmcache_v1.measure.parts import all_points, rate_name
from disagg_prefill_lmcache_v1.measure.progress import say
from disagg_prefill_lmcache_v1.measure.report import ReportError, write_report
from disagg_prefill_lmcache_v1.measure.types import LoadError, UsageError
from disagg_prefill_lmcache_v1.measure.verdict import answers, sentence, table, where_ttft_goes
from disagg_prefill_lmcache_v1.measure.workloads import Workload, make_workload
from disagg_prefill_lmcache_v1.settings import SettingsError


def workload_of(settings: CompareSettings) -> Workload:
    """Raises UsageError."""
    return make_workload(
        settings.workload, count=settings.num_prompts, input_len=settings.input_len, output_len=settings.output_len,
        burstiness=settings.burstiness, max_model_len=settings.max_model_len, seed=settings.seed,
    )  # fmt: skip


def describe(workload: Workload) -> str:
    """One line."""
    facts = workload.describe()
    count = facts["requests"]
    text = (
        f"load: {facts['name']} ({facts['source']}), {count} requests at each rate, on average "
        f"{facts['input_tokens'] / count:,.0f} prompt and {facts['output_tokens'] / count:,.0f} answer tokens"
    )
    if facts["shared_blocks"]:
        text += f", {facts['shared_blocks']:.0%} of the prompts shared"
    return text + (f", all lengths by {facts['scale']:g} to fit the model" if facts["scale"] != 1 else "")


def arm_file(settings: CompareSettings, arm: str) -> Path:
    return settings.folder / f"arm-{arm}.json"


def read(path: Path) -> Any:
    """Raises LoadError."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LoadError(f"{path} cannot be read: {error}") from None


def write(path: Path, content: Any) -> None:
    write_whole(path, json.dumps(content) + "\n")


def run_arm(settings: CompareSettings, workload: Workload) -> None:
    """Raises LoadError."""
    settings.folder.mkdir(parents=True, exist_ok=True)
    rates: list[float] | None = list(settings.request_rate)
    if settings.sweep:  # the pair gets the rates that the plain servers' ends gave
        rates = None if settings.step == "plain" else read(arm_file(settings, "plain"))["rates"]
    write(arm_file(settings, settings.step), asyncio.run(measure_arm(settings, settings.step, workload, rates)))


def result(settings: CompareSettings, workload: Workload) -> list[str]:
    """Writes and says the result; returns the causes for which it does not count. Raises LoadError."""
    arms = {name: read(arm_file(settings, name)) for name in ARMS}
    path = settings.run_dir / "summary.json"
    summary = read(path) if path.is_file() else {}  # of the probe of the pair
    same = answers(arms)
    text = sentence(arms, settings.targets)
    for point in (each for arm in arms.values() for each in all_points(arm)):
        for request in point["requests"]:
            del request["text"]
    names = ("model", "backend", "kv_load", "graphs", "tensor_parallel_size", "prefillers", "decoders")
    content = {
        "arms": arms, "sentence": text, "targets": settings.targets, "answers": same,
        "versions": summary.get("versions") or {},
        "flags": {name: getattr(settings, name) for name in names} | {"probe_equal": summary.get("outputs_match")},
        "machine": {"device": settings.device, **(summary.get("machine") or {})},
        "cards": settings.servers * settings.tensor_parallel_size,
        "workload": workload.describe(),
    }  # fmt: skip
    path = settings.run_dir / "compare.json"
    write(path, content)
    print("  latencies: p50/p90/p99, milliseconds")
    print(table(arms, settings.servers))
    print(f"  TTFT of the pair {where_ttft_goes(arms['pair']['points'])}")
    print(f"  answers: {same['equal']} of {same['compared']} the same in both arms")
    print(f"  comparison: {path}")
    try:
        print(f"  report: {write_report(settings.run_dir)}")
    except (ReportError, OSError) as error:
        say(f"compare: no report: {error}")
    print(f"\n{text}", flush=True)
    failures = [
        f"{name}, {rate_name(point)} requests/s: {point['failed']} requests failed: "
        + next(each["error"] for each in point["requests"] if each["error"])
        for name, arm in arms.items() for point in all_points(arm) if point["failed"]
    ]  # fmt: skip
    if settings.device == "cpu" and same["equal"] != same["compared"]:
        failures.append(f"answers of the two arms differ: {same['first_difference']}")
    return failures


def main(arguments: Sequence[str]) -> int:
    """One step; returns the exit status."""
    try:
        settings = parse_settings(arguments, os.environ)
        workload = workload_of(settings)
        if settings.step == "check":
            say(describe(workload))
        elif settings.step == "result":
            failures = result(settings, workload)
            for line in failures:
                say(f"compare: {line}")
            return 1 if failures else 0
        else:
            run_arm(settings, workload)
    except (SettingsError, LoadError) as error:
        say(f"compare: {error}")
        return 2 if isinstance(error, (SettingsError, UsageError)) else 1
    except OSError as error:
        say(f"compare: --run-dir {settings.run_dir}: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
