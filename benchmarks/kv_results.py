"""Results of kv_path.py: timed, printed, and drawn as SVG."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from html import escape
from typing import Any


class Bench:
    """Rows of results: (group, stage) -> seconds for one chunk, bytes of a chunk."""

    def __init__(self, chunk_bytes: int) -> None:
        self.chunk_bytes = chunk_bytes
        self.rows: list[dict[str, Any]] = []

    def add(self, group: str, stage: str, seconds: list[float], size: int | None = None) -> None:
        """``seconds`` for ``size`` bytes each (a chunk)."""
        size = size or self.chunk_bytes
        median = statistics.median(seconds)
        row = {
            "group": group,
            "stage": stage,
            "gb_per_s": size / median / 1e9,
            "ms_per_chunk": median * 1000 * self.chunk_bytes / size,
        }
        self.rows.append(row)
        print(f"  {group:8s} {stage:28s} {row['gb_per_s']:8.2f} GB/s {row['ms_per_chunk']:9.3f} ms", flush=True)

    def note(self, group: str, stage: str, seconds: list[float]) -> None:
        """A stage that moves no bytes."""
        ms = statistics.median(seconds) * 1000
        self.rows.append({"group": group, "stage": stage, "gb_per_s": None, "ms_per_chunk": ms})
        print(f"  {group:8s} {stage:28s} {'':8s}      {ms:9.3f} ms", flush=True)


def times(work: Callable[[int], None], count: int) -> list[float]:
    """Seconds of ``work(i)`` for each i, after one that does not count."""
    work(0)
    seconds = []
    for i in range(count):
        begin = time.perf_counter()
        work(i)
        seconds.append(time.perf_counter() - begin)
    return seconds


def plot(results: list[dict[str, Any]]) -> str:
    """Bars of GB/s, as SVG."""
    rows = [(r["shape"], row) for r in results for row in r["rows"] if row["gb_per_s"]]
    top = max(row["gb_per_s"] for _, row in rows)
    parts = []
    for i, (shape, row) in enumerate(rows):
        y, width = 20 * i + 8, 420 * row["gb_per_s"] / top
        colour = {"limit": "#999", "copy": "#48c"}.get(row["group"], "#c64" if "stock" in row["stage"] else "#4a6")
        label = escape(f"{shape} {row['group']} {row['stage']}")
        parts.append(f'<text x="315" y="{y + 11}" text-anchor="end">{label}</text>')
        parts.append(f'<rect x="320" y="{y}" width="{width:.1f}" height="14" fill="{colour}"/>')
        parts.append(f'<text x="{325 + width:.1f}" y="{y + 11}">{row["gb_per_s"]:.2f}</text>')
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="800" height="{20 * len(rows) + 16}" font-family="sans-serif"'
    )
    return f'{head} font-size="11"><rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>\n'
