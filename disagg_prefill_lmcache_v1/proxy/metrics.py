"""Metrics of the proxy: plain numbers in shared memory, shown by the Prometheus client library.

Each worker process has one slot, a piece of memory that only it writes, so that counting takes no lock and no system
call. Whoever is asked for /metrics adds up the slots of all workers. A slot outlives its worker: when a worker crashes,
the one that takes its place counts on, and no total ever falls.

A slot has a header, two tables of series names and the values. The header tells which table holds and how long it is.
Names are left out by writing the other table and then the header, so that a reader sees one or the other.
"""

from __future__ import annotations

import json
import logging
import mmap
import os
import tempfile
from bisect import bisect_left
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

log = logging.getLogger("disagg_proxy")

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)

# name: (kind, help, label names). "max" gauges show the largest value over the workers, plain gauges the sum.
FAMILIES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "disagg_requests": ("counter", "Requests by route, stage and outcome", ("route", "stage", "outcome")),
    "disagg_retries": ("counter", "Requests tried again on another server", ("role",)),
    "disagg_prefill_skipped": ("counter", "Generating requests sent to the decoder alone", ("reason",)),
    "disagg_routes": ("counter", "Requests by the way that was chosen for them, and why", ("way", "reason")),
    "disagg_kv_state": ("counter", "Prefill answers by the state of their KV cache in the store", ("state",)),
    "disagg_prompt_tokens": ("counter", "Prompt tokens of the answers that told them", ()),
    "disagg_reused_tokens": ("counter", "Prompt tokens that the decoder took from the KV cache", ()),
    "disagg_usage_reports": ("counter", "Answers that told their prompt tokens", ()),
    "disagg_full_reuse_requests": ("counter", "Answers with all prompt tokens but at most one reused", ()),
    "disagg_streamed_bytes": ("counter", "Bytes of event streams sent to clients", ()),
    "disagg_log_lines_dropped": ("counter", "Access log lines dropped because the log was not read", ()),
    "disagg_metric_updates_dropped": ("counter", "Metric updates left out because there are too many series", ()),
    "disagg_prefill_seconds": ("histogram", "Prefill request, KV wait included", ()),
    "disagg_kv_wait_seconds": ("histogram", "Time the prefill answer was held for the KV cache", ()),
    "disagg_ttft_seconds": ("histogram", "Time to the first byte of a streamed answer, prefill included", ()),
    "disagg_ttft_part_seconds": ("histogram", "Parts of the time to the first byte, which sum to it", ("part",)),
    "disagg_itl_seconds": ("histogram", "Time between two parts of a streamed answer", ()),
    "disagg_e2e_seconds": ("histogram", "Whole request", ()),
    "disagg_in_flight": ("gauge", "Requests in progress by stage", ("stage",)),
    "disagg_kv_degraded": ("max", "1 while KV caches do not reach the store or the decode servers", ()),
    "disagg_upstream_up": ("max", "1 if the server answers", ("role", "upstream")),
    "disagg_upstream_in_flight": ("gauge", "Requests in progress by server", ("role", "upstream")),
    "disagg_upstream_idle_connections": ("gauge", "Connections kept for reuse", ("role", "upstream")),
}
_HISTOGRAM_SIZE = len(SECONDS) + 2  # one count per bucket, one above all, the sum

_NAMES = 1 << 18
_VALUES = 16384
_SPARE = _VALUES - _HISTOGRAM_SIZE  # values from here on take what there is no room for
_HEADER = 8
_SLOT_BYTES = _HEADER + 2 * _NAMES + 8 * _VALUES

Key = tuple[str, ...]
"""Name of the family and the values of its labels."""


def new_slots(count: int) -> list[int]:
    """Descriptors of memory for so many workers; it is gone with the last process that holds it."""
    return [_anonymous_file() for _ in range(count)]


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("disagg-proxy-metrics")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, _SLOT_BYTES)
    return descriptor


class Metrics:
    """Counters of one worker. ``values`` may be written directly at an index given by index()."""

    def __init__(self, descriptors: Sequence[int] = (), slot: int = 0) -> None:
        """``descriptors`` are the slots of all workers (see new_slots()), ``slot`` is the number of this one's."""
        memories = [mmap.mmap(d, _SLOT_BYTES) for d in descriptors] or [mmap.mmap(-1, _SLOT_BYTES)]
        self._slots = [memoryview(memory) for memory in memories]
        self._view = self._slots[slot]
        self.values = self._view[_HEADER + 2 * _NAMES :].cast("d")
        self._index: dict[Key, int] = {}
        self._free: list[int] = []
        self._used = 0
        crashed = _snapshot(self._view)[0]
        for key, index in crashed:
            self._index[key] = index
            self._used = max(self._used, index + _width(key[0]))
        # Whatever a crashed worker had in progress is gone.
        self.remove([key for key, _ in crashed if FAMILIES[key[0]][0] in ("gauge", "max")])
        self._dropped = self.index("disagg_metric_updates_dropped")

    def index(self, name: str, *labels: str) -> int:
        """Position of a series in ``values``; made on first use."""
        key = (name, *labels)
        found = self._index.get(key)
        return self._add(key) if found is None else found

    def _add(self, key: Key) -> int:
        width = _width(key[0])
        reused = width == 1 and bool(self._free)
        index = self._free[-1] if reused else self._used
        line = _line(key, index)
        generation, end = _header(self._view)
        if index + width > _SPARE or end + len(line) > _NAMES:
            if not self.values[self._dropped]:
                log.error("too many metric series: %s and all further ones are not counted", " ".join(key))
            self.values[self._dropped] += 1.0
            return _SPARE
        if reused:
            self._free.pop()
        else:
            self._used += width
        start = _HEADER + generation % 2 * _NAMES + end
        self._view[start : start + len(line)] = line
        self._set_header(generation, end + len(line))
        self._index[key] = index
        return index

    def remove(self, keys: Collection[Key]) -> None:
        """Forget gauges, those of servers that are gone, and use their room again."""
        known = [key for key in keys if key in self._index]
        if not known:
            return
        for key in known:
            index = self._index.pop(key)
            self.values[index] = 0.0
            self._free.append(index)
        names = b"".join(_line(key, index) for key, index in self._index.items())
        generation = _header(self._view)[0] + 1
        start = _HEADER + generation % 2 * _NAMES
        self._view[start : start + len(names)] = names
        self._set_header(generation, len(names))

    def _set_header(self, generation: int, end: int) -> None:
        self._view[:_HEADER] = (generation << 32 | end).to_bytes(_HEADER, "little")

    def add(self, name: str, *labels: str, by: float = 1.0) -> None:
        """Increase a counter or gauge."""
        self.values[self.index(name, *labels)] += by

    def set(self, name: str, *labels: str, to: float) -> None:
        """Set a gauge."""
        self.values[self.index(name, *labels)] = to

    def observe(self, index: int, seconds: float) -> None:
        """Add one value to the histogram at ``index``."""
        values = self.values
        values[index + bisect_left(SECONDS, seconds)] += 1.0
        values[index + _HISTOGRAM_SIZE - 1] += seconds

    def observe_each(self, indexes: Mapping[str, int], seconds: Mapping[str, float]) -> None:
        """Add one value to each of several histograms, by the names of ``indexes``."""
        values = self.values
        for name, value in seconds.items():
            index = indexes[name]
            values[index + bisect_left(SECONDS, value)] += 1.0
            values[index + _HISTOGRAM_SIZE - 1] += value

    def render(self) -> bytes:
        """All workers' metrics in the Prometheus text format."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Collector(self.merged()))
        return generate_latest(registry)

    def merged(self) -> dict[Key, list[float]]:
        merged: dict[Key, list[float]] = {}
        for view in self._slots:
            names, values = _snapshot(view)
            for key, index in names:
                found = list(values[index : index + _width(key[0])])
                before = merged.get(key)
                if before is None:
                    merged[key] = found
                elif FAMILIES[key[0]][0] == "max":
                    merged[key] = [max(before[0], found[0])]
                else:
                    merged[key] = [a + b for a, b in zip(before, found, strict=True)]
        return merged


def _width(name: str) -> int:
    return _HISTOGRAM_SIZE if FAMILIES[name][0] == "histogram" else 1


def _line(key: Key, index: int) -> bytes:
    return json.dumps([*key, index]).encode() + b"\n"


def _header(view: memoryview | bytes) -> tuple[int, int]:
    """How often names were left out, which tells the table that holds, and the table's length in bytes."""
    header = int.from_bytes(view[:_HEADER], "little")
    return header >> 32, header & 0xFFFFFFFF


def _read_names(slot: bytes) -> Iterator[tuple[Key, int]]:
    """Series and their positions from a copy of a slot."""
    generation, end = _header(slot)
    start = _HEADER + generation % 2 * _NAMES
    for line in slot[start : start + end].splitlines():
        *key, index = json.loads(line)
        yield tuple(key), index


def _snapshot(view: memoryview) -> tuple[list[tuple[Key, int]], memoryview]:
    """Names and values of a slot at one moment: once more if names were left out meanwhile."""
    while True:
        copy = bytes(view)
        if _header(copy)[0] == _header(view)[0]:
            return list(_read_names(copy)), memoryview(copy)[_HEADER + 2 * _NAMES :].cast("d")


class _Collector:
    def __init__(self, merged: dict[Key, list[float]]) -> None:
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
                    for bound, value in zip((*map(str, SECONDS), "+Inf"), values, strict=False):
                        count += value
                        buckets.append((bound, count))
                    family.add_metric(key[1:], buckets, values[-1])
                else:
                    family.add_metric(key[1:], values[0])
            yield family
