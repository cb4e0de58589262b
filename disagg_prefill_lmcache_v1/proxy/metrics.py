"""Metrics of the proxy: plain numbers in shared memory, shown by the Prometheus client library.

Each worker process has one slot, a memory-mapped file that only it writes, so that counting takes no lock and no system
call. Whoever is asked for /metrics adds up the slots of all workers. A slot outlives its worker: when a worker crashes,
the one that takes its place counts on, and no total ever falls.
"""

from __future__ import annotations

import json
import mmap
import os
from bisect import bisect_left
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)

# name: (kind, help, label names). "max" gauges show the largest value over the workers, plain gauges the sum.
FAMILIES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "disagg_requests": ("counter", "Requests by route, stage and outcome", ("route", "stage", "outcome")),
    "disagg_retries": ("counter", "Requests tried again on another server", ("role",)),
    "disagg_prefill_skipped": ("counter", "Generating requests sent to the decoder alone", ("reason",)),
    "disagg_kv_state": ("counter", "Prefill answers by the state of their KV cache in the store", ("state",)),
    "disagg_prompt_tokens": ("counter", "Prompt tokens of the answers that told them", ()),
    "disagg_reused_tokens": ("counter", "Prompt tokens that the decoder took from the KV cache", ()),
    "disagg_usage_reports": ("counter", "Answers that told their prompt tokens", ()),
    "disagg_full_reuse_requests": ("counter", "Answers with all prompt tokens but at most one reused", ()),
    "disagg_streamed_bytes": ("counter", "Bytes of event streams sent to clients", ()),
    "disagg_log_lines_dropped": ("counter", "Access log lines dropped because the log was not read", ()),
    "disagg_prefill_seconds": ("histogram", "Prefill request, KV wait included", ()),
    "disagg_kv_wait_seconds": ("histogram", "Time the prefill answer was held for the KV cache", ()),
    "disagg_ttft_seconds": ("histogram", "Time to the first byte of a streamed answer, prefill included", ()),
    "disagg_itl_seconds": ("histogram", "Time between two parts of a streamed answer", ()),
    "disagg_e2e_seconds": ("histogram", "Whole request", ()),
    "disagg_in_flight": ("gauge", "Requests in progress by stage", ("stage",)),
    "disagg_kv_degraded": ("max", "1 while KV caches do not reach the store", ()),
    "disagg_upstream_up": ("max", "1 if the server answers", ("role", "upstream")),
    "disagg_upstream_in_flight": ("gauge", "Requests in progress by server", ("role", "upstream")),
    "disagg_upstream_idle_connections": ("gauge", "Connections kept for reuse", ("role", "upstream")),
}
_HISTOGRAM_SIZE = len(_SECONDS) + 2  # one count per bucket, one above all, the sum

_NAMES = 1 << 18
_VALUES = 16384
_HEADER = 8
_SLOT_BYTES = _HEADER + _NAMES + 8 * _VALUES


class Metrics:
    """Counters of one worker. ``values`` may be written directly at an index given by index()."""

    def __init__(self, directory: str = "", slot: int = 0) -> None:
        self._directory = directory
        self._path = os.path.join(directory, f"worker-{slot}.metrics") if directory else ""
        self._memory = _map(self._path)
        self._view = memoryview(self._memory)
        self.values = self._view[_HEADER + _NAMES :].cast("d")
        self._index: dict[tuple[str, ...], int] = {}
        self._used = 0
        self._names_end = 0
        for key, index in _read_names(self._view):
            self._index[key] = index
            self._used = index + _width(key[0])
            if FAMILIES[key[0]][0] in ("gauge", "max"):
                self.values[index] = 0.0  # whatever the crashed worker had in progress is gone
        self._names_end = int.from_bytes(self._view[:_HEADER], "little")

    def index(self, name: str, *labels: str) -> int:
        """Position of a series in ``values``; made on first use."""
        key = (name, *labels)
        found = self._index.get(key)
        return self._add(key) if found is None else found

    def _add(self, key: tuple[str, ...]) -> int:
        width = _width(key[0])
        line = json.dumps([*key, self._used]).encode() + b"\n"
        if self._used + width > _VALUES or self._names_end + len(line) > _NAMES:
            raise RuntimeError("too many metric series")
        index = self._used
        start = _HEADER + self._names_end
        self._view[start : start + len(line)] = line
        self._names_end += len(line)
        self._view[:_HEADER] = self._names_end.to_bytes(_HEADER, "little")
        self._used += width
        self._index[key] = index
        return index

    def add(self, name: str, *labels: str, by: float = 1.0) -> None:
        """Increase a counter or gauge."""
        self.values[self.index(name, *labels)] += by

    def set(self, name: str, *labels: str, to: float) -> None:
        """Set a gauge."""
        self.values[self.index(name, *labels)] = to

    def observe(self, index: int, seconds: float) -> None:
        """Add one value to the histogram at ``index``."""
        values = self.values
        values[index + bisect_left(_SECONDS, seconds)] += 1.0
        values[index + _HISTOGRAM_SIZE - 1] += seconds

    def render(self) -> bytes:
        """All workers' metrics in the Prometheus text format."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Collector(self._merged()))
        return generate_latest(registry)

    def total(self, name: str, *labels: str) -> float:
        """Sum of a counter over all workers and all series whose labels begin with ``labels``."""
        return sum(v[0] for key, v in self._merged().items() if key[0] == name and key[1 : 1 + len(labels)] == labels)

    def _merged(self) -> dict[tuple[str, ...], list[float]]:
        views = [self._view]
        if self._directory:
            for entry in sorted(os.listdir(self._directory)):
                path = os.path.join(self._directory, entry)
                if entry.endswith(".metrics") and path != self._path and os.path.getsize(path) == _SLOT_BYTES:
                    with open(path, "rb") as file:
                        views.append(memoryview(file.read()))
        merged: dict[tuple[str, ...], list[float]] = {}
        for view in views:
            values = view[_HEADER + _NAMES :].cast("d")
            for key, index in _read_names(view):
                found = list(values[index : index + _width(key[0])])
                before = merged.get(key)
                if before is None:
                    merged[key] = found
                elif FAMILIES[key[0]][0] == "max":
                    merged[key] = [max(before[0], found[0])]
                else:
                    merged[key] = [a + b for a, b in zip(before, found, strict=True)]
        return merged


def _map(path: str) -> mmap.mmap:
    if not path:
        return mmap.mmap(-1, _SLOT_BYTES)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        os.ftruncate(descriptor, _SLOT_BYTES)
        return mmap.mmap(descriptor, _SLOT_BYTES)
    finally:
        os.close(descriptor)


def _width(name: str) -> int:
    return _HISTOGRAM_SIZE if FAMILIES[name][0] == "histogram" else 1


def _read_names(view: memoryview) -> Iterator[tuple[tuple[str, ...], int]]:
    end = int.from_bytes(view[:_HEADER], "little")
    for line in bytes(view[_HEADER : _HEADER + end]).splitlines():
        *key, index = json.loads(line)
        yield tuple(key), index


class _Collector:
    def __init__(self, merged: dict[tuple[str, ...], list[float]]) -> None:
        self._merged = merged

    def collect(self) -> Iterator[Metric]:
        for name, (kind, text, labels) in FAMILIES.items():
            makers: dict[str, Any] = {"counter": CounterMetricFamily, "histogram": HistogramMetricFamily}
            family = makers.get(kind, GaugeMetricFamily)(name, text, labels=labels)
            for key, values in self._merged.items():
                if key[0] != name:
                    continue
                if kind == "histogram":
                    count, buckets = 0.0, []
                    for bound, value in zip((*map(str, _SECONDS), "+Inf"), values, strict=False):
                        count += value
                        buckets.append((bound, count))
                    family.add_metric(key[1:], buckets, values[-1])
                else:
                    family.add_metric(key[1:], values[0])
            yield family
