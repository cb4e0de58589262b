"""Tables, aims and charts of benchmarks/proxy_overhead.py."""

from __future__ import annotations

import contextlib
import os
import platform
import statistics
from pathlib import Path


def percentile(values: list[float], percent: float) -> float:
    """Percentile by nearest rank; NaN without values."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * percent / 100), len(ordered) - 1)]


def machine() -> str:
    """The machine in words."""
    model = platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return f"{model}, {os.cpu_count()} CPUs, Linux {platform.release()}, Python {platform.python_version()}"


def table(rows: dict[str, dict[str, list[float]]]) -> str:
    """All measures, one column for each contender."""
    names = list(rows)
    measures = list(dict.fromkeys(measure for row in rows.values() for measure in row))
    width = max(map(len, measures)) + 2
    lines = ["".ljust(width) + "".join(name.rjust(22) for name in names)]
    for measure in measures:
        cells = []
        for name in names:
            values = rows[name].get(measure)
            if not values:
                cells.append("-")
                continue
            spread = (max(values) - min(values)) / 2
            cells.append(f"{statistics.median(values):.4g}" + (f" +-{spread:.2g}" if len(values) > 1 else ""))
        lines.append(measure.ljust(width) + "".join(cell.rjust(22) for cell in cells))
    return "\n".join(lines)


def targets(rows: dict[str, dict[str, list[float]]]) -> str:
    """How the proxy stands against the aims."""

    def ratio(measure: str, rival: str = "vllm-router") -> float:
        try:
            return statistics.median(rows["ours"][measure]) / statistics.median(rows[rival][measure])
        except (KeyError, ZeroDivisionError, statistics.StatisticsError):
            return float("nan")

    lines = [
        f"requests/s at 64 clients against vllm-router: {ratio('unary 64: requests/s'):.2f} (aim: 1.25 or more)",
        f"CPU per request at 64 clients against vllm-router: {ratio('unary 64: CPU us/request'):.2f}",
        f"CPU per event at 64 streams against vllm-router: {ratio('stream 64: CPU us/event'):.2f} (aim: 0.90 or less)",
    ]
    for measure in ("unary 64: CPU us/request", "stream 64: CPU us/event"):
        lines.append(f"{measure} against nginx, one hop: {ratio(measure, 'nginx'):.1f} (the floor is 1)")
    for clients in (64, 512):
        found = ratio(f"stream {clients}: TTFT p99 ms")
        lines.append(f"TTFT p99 at {clients} streams against vllm-router: {found:.2f} (aim: 1.00 or less)")
    once = rows.get("read and write once", {})
    for measure, values in once.items():
        mine = rows.get("ours", {}).get(measure)
        if mine and statistics.median(values):
            found = statistics.median(mine) / statistics.median(values)
            lines.append(f"{measure} against reading and writing once: {found:.2f} (aim: 1.50 or less)")
    return "\n".join(lines)


def plot(rows: dict[str, dict[str, list[float]]], where: str, path: Path) -> bool:
    """Bar charts of the main measures; False if matplotlib is not there."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [name for name in rows if not name.startswith("oursx") and "unary 64: requests/s" in rows[name]]
    measures = ["unary 64: requests/s", "unary 64: CPU us/request", "stream 64: CPU us/event",
                "stream 64: TTFT p99 ms", "stream 512: TTFT p99 ms", "stream 512: event delay p99 ms"]  # fmt: skip
    figure, axes = pyplot.subplots(2, 3, figsize=(12, 6))
    for axis, measure in zip(axes.flat, measures, strict=True):
        values = [rows[name].get(measure, [0.0]) for name in names]
        middles = [statistics.median(v) for v in values]
        errors = [[m - min(v) for m, v in zip(middles, values, strict=True)],
                  [max(v) - m for m, v in zip(middles, values, strict=True)]]  # fmt: skip
        axis.bar(names, middles, yerr=errors, color=["#2a7", "#888", "#bbb", "#ddd"][: len(names)], capsize=4)
        axis.set_title(measure, fontsize=10)
    figure.suptitle(f"Proxy on one CPU, mock servers ({where})", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    return True
