"""One arm of a comparison under load: vLLM's own benchmark sends it, and the proxy's access log tells where TTFT went.

The benchmark runs in a process of its own (vllm_benchmark.py): it gets the requests as a file of Mooncake's format.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from disagg_prefill_lmcache_v1.measure.compare_settings import CompareSettings
from disagg_prefill_lmcache_v1.measure.priority import go_first
from disagg_prefill_lmcache_v1.measure.progress import say, with_progress
from disagg_prefill_lmcache_v1.measure.types import LoadError
from disagg_prefill_lmcache_v1.measure.workloads import Workload, warm_up_like, write_trace

PROGRAM = "disagg_prefill_lmcache_v1.vllm_benchmark"
WARM_UP = 2  # requests for each server
START_S = 300.0  # until the benchmark is loaded
LOG_S = 5.0  # until the access log has the last request
SWEPT = 5  # rates of a sweep
LATENCIES = ("ttft", "tpot", "itl", "e2el")
SHARES = ("p50", "p90", "p99", "mean")
PROXY_LOGS = {"plain": "plain_proxy.log", "pair": "proxy.log"}


class Benchmark:
    """The benchmark's process. ``log`` has what it prints."""

    def __init__(self, settings: CompareSettings, arm: str, workload: Workload) -> None:
        self.settings = settings
        self.arm = arm
        self.workload = workload
        self.log = settings.folder / f"{arm}.log"
        self._next_block = settings.first_block
        self._count = 0
        self._process: asyncio.subprocess.Process

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """As long as it is needed."""
        host = urlsplit(self.settings.proxy_url).hostname or ""
        # Prompts are made by hash(): the same in both arms only with the same seed of it.
        environment = {**os.environ, "PYTHONHASHSEED": "0", "NO_PROXY": host, "no_proxy": host}
        if self.settings.api_key:
            environment["OPENAI_API_KEY"] = self.settings.api_key
        with self.log.open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", PROGRAM, env=environment, stderr=log,
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            )  # fmt: skip
        go_first(self._process.pid)
        try:
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()

    async def run(self, workload: Workload, rate: float, *, title: str = "", serial: bool = False) -> dict[str, Any]:
        """A point of compare.json. ``rate`` 0: all at once, or (``serial``) each one after the one before.

        Raises:
            LoadError: the benchmark failed or was late.
        """
        name = f"{self.arm}-{self._count}"
        self._count += 1
        trace, result = (self.settings.folder / f"{name}.{kind}" for kind in ("jsonl", "json"))
        self._next_block = write_trace(trace, workload, rate, self._next_block)
        result.unlink(missing_ok=True)
        words = arguments(self.settings, workload, trace, result, f"{name}-") + (["--max-concurrency", "1"] * serial)
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(words).encode() + b"\n")
        last_s = workload.requests[-1].start / rate if rate else 0.0
        title = title or (f"{rate:g} requests/s" if rate else "one at a time" if serial else "all at once")
        try:
            limit_s = START_S + last_s + self.settings.timeout
            reply = await with_progress(
                asyncio.wait_for(self._process.stdout.readline(), limit_s), lambda: f"{self.arm}: {title}"
            )
        except asyncio.TimeoutError:
            raise LoadError(
                f"{title}: not all requests were answered within {limit_s:.0f} s (log: {self.log})"
            ) from None
        if not reply or not result.is_file():
            raise LoadError(f"vLLM's benchmark failed (log: {self.log})")
        measured = json.loads(result.read_text(encoding="utf-8"))
        if not measured["completed"]:
            raise LoadError(f"{title}: no request was answered, the first one: {measured['errors'][0].strip()[-300:]}")
        ids = [f"{name}-{index}" for index in range(len(measured["errors"]))]
        told = await access_log(self.settings.run_dir / PROXY_LOGS[self.arm], ids)
        return {"request_rate": rate, "serial": serial, **point_of(measured, [told.get(each, {}) for each in ids], ids)}


def arguments(settings: CompareSettings, workload: Workload, trace: Path, result: Path, prefix: str) -> list[str]:
    """Of vLLM's benchmark for one run. It asks for exactly the trace's answer tokens."""
    values = {
        "backend": "openai", "base-url": settings.proxy_url.rstrip("/"), "endpoint": "/v1/completions",
        "model": settings.model, "tokenizer": settings.tokenizer or settings.model,
        "dataset-name": "timed_trace", "dataset-path": trace, "num-prompts": len(workload.requests),
        "timed-trace-chunk-hash-size": workload.block, "timed-trace-sec-multiplier": "0.001",
        "temperature": 0, "request-id-prefix": prefix, "result-dir": result.parent, "result-filename": result.name,
        "percentile-metrics": ",".join(LATENCIES), "metric-percentiles": "50,90,99",
        # Its own check would send the first prompt, which would then be known when it is measured.
        "ready-check-timeout-sec": 0,
    }  # fmt: skip
    words = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    words += ["--save-result", "--save-detailed", "--disable-tqdm"]
    return words + (["--goodput", *settings.goodput] if settings.goodput else [])


async def access_log(path: Path, ids: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Lines of the proxy's access log by request id, of these requests; it is a moment late."""
    wanted, deadline = set(ids), time.monotonic() + LOG_S
    while True:
        found: dict[str, dict[str, Any]] = {}
        with contextlib.suppress(OSError), path.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                with contextlib.suppress(ValueError, TypeError):
                    entry = json.loads(line) if line.startswith("{") else {}
                    if entry.get("request_id") in wanted:
                        found[entry["request_id"]] = entry
        if len(found) == len(wanted) or time.monotonic() > deadline:
            return found
        await asyncio.sleep(0.2)


def point_of(measured: Mapping[str, Any], told: Iterable[Mapping[str, Any]], ids: Iterable[str]) -> dict[str, Any]:
    """The benchmark's result with what the access log tells of each request; its lists are in seconds."""
    requests = []
    for index, (entry, name) in enumerate(zip(told, ids, strict=True)):
        error = measured["errors"][index] or ""
        ttft_ms = None if error else round(measured["ttfts"][index] * 1000, 3)
        parts = entry.get("ttft_parts_ms")
        if parts is not None and ttft_ms is not None:
            parts = {**parts, "client": round(max(ttft_ms - sum(parts.values()), 0.0), 2)}
        requests.append({
            "id": name,
            "start_s": round(measured["start_times"][index] - min(measured["start_times"]), 4),
            "input_tokens": measured["input_lens"][index],
            "output_tokens": measured["output_lens"][index],
            "ttft_ms": ttft_ms,
            "itls_ms": [round(gap * 1000, 3) for gap in measured["itls"][index]],
            "e2el_ms": None if error else round(measured["latencies"][index] * 1000, 3),
            "error": error.strip().splitlines()[-1] if error.strip() else "",
            "reused_tokens": entry.get("reused_tokens") if entry.get("reused_tokens", -1) >= 0 else None,
            "parts": parts,
            "text": measured["generated_texts"][index],
        })  # fmt: skip
    figures = ("completed", "failed", "request_throughput", "output_throughput", "total_token_throughput")
    return {
        "duration_s": measured["duration"],
        **{name: measured[name] for name in figures},
        "goodput": measured.get("request_goodput"),
        **{f"{name}_ms": {share: measured[f"{share}_{name}_ms"] for share in SHARES} for name in LATENCIES},
        "requests": requests,
    }


def rates_between(serial: float, batch: float) -> list[float]:
    """Of a sweep: from one request after the other to all at once, in equal ratios (requests per second)."""
    low = min(serial, batch / 2)
    return [float(f"{low * (batch / low) ** (index / (SWEPT - 1)):.3g}") for index in range(SWEPT)]


async def measure_arm(
    settings: CompareSettings, arm: str, workload: Workload, rates: list[float] | None
) -> dict[str, Any]:
    """An arm of compare.json. ``rates`` None: those of a sweep, whose ends are measured here. Raises LoadError."""
    benchmark = Benchmark(settings, arm, workload)
    async with benchmark.running():
        await benchmark.run(warm_up_like(workload, WARM_UP * settings.servers), 0, title="warming up")
        serial = await benchmark.run(workload, 0, serial=True) if settings.sweep else None
        batch = [await benchmark.run(workload, 0)] if settings.sweep else []
        if rates is None:
            assert serial
            rates = rates_between(serial["request_throughput"], batch[0]["request_throughput"])
        points = []
        for rate in rates:
            points.append(await benchmark.run(workload, rate))
            last = points[-1]
            say(f"{arm}: {rate:g} requests/s: {last['completed']} answered, {last['failed']} failed")
    return {"rates": rates, "serial": serial, "points": points + batch}
