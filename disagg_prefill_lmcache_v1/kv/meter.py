"""Measures, in each worker, how long loads and the computing of prompts take, and tells the scheduler and ``/metrics``.

The way is vLLM's own: what ``Meter.take`` gives goes with the step's output to the scheduler (load_scheduler.py), whose
totals go on to the API server, where ``LoadMetrics`` counts them. A model runner that does not hand on a
connector's statistics leaves the policy without estimates: it loads everything then.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from typing import Any

import torch
from lmcache.logging import init_logger
from prometheus_client import REGISTRY, Counter
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from disagg_prefill_lmcache_v1.kv.load_scheduler import TOTALS, StepMetadata, merge

logger = init_logger(__name__)

MEASURED = ("step_times", "load_times", "used_tokens")
NAMES = {
    "loads": "disagg_kv_load_decisions",
    "recomputes": "disagg_kv_load_decisions",
    "loaded_tokens": "disagg_kv_loaded_tokens",
    "load_seconds": "disagg_kv_load_seconds",
    "recomputed_tokens": "disagg_kv_recomputed_tokens",
    "compute_tokens": "disagg_kv_compute_tokens",
    "compute_seconds": "disagg_kv_compute_seconds",
}
TEXTS = {
    "disagg_kv_load_decisions": "Requests whose KV the store had, by what was chosen: load or recompute.",
    "disagg_kv_loaded_tokens": "Tokens loaded from the KV store.",
    "disagg_kv_load_seconds": "Time that loads took, seconds.",
    "disagg_kv_recomputed_tokens": "Tokens that the KV store had and that were computed by choice.",
    "disagg_kv_compute_tokens": "Prompt tokens computed in steps that were measured.",
    "disagg_kv_compute_seconds": "Time that these steps took, loads excluded, seconds.",
}


class LoadStats(KVConnectorStats):
    """Measurements on their way to the scheduler (MEASURED), or totals on their way to the API server (TOTALS)."""

    def reset(self) -> None:
        self.data.clear()

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        for kind in MEASURED:
            for key, values in other.data.get(kind, {}).items():
                mine = self.data.setdefault(kind, {})
                mine[key] = merge(mine.get(key), values)
        for name in TOTALS:
            if name in other.data:
                self.data[name] = self.data.get(name, 0) + other.data[name]
        return self

    def reduce(self) -> dict[str, int | float]:
        return {name: round(self.data[name], 4) for name in TOTALS if name in self.data}

    def is_empty(self) -> bool:
        return not self.data


class LoadMetrics(KVConnectorPromMetrics):
    """The totals as counters, for each engine."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        for collector in list(REGISTRY._collector_to_names):  # of an earlier engine in this process
            if getattr(collector, "_name", None) in TEXTS:
                with contextlib.suppress(KeyError):
                    REGISTRY.unregister(collector)
        choice = {"loads": ("load",), "recomputes": ("recompute",)}
        families = {
            name: self._counter_cls(
                name=name,
                documentation=text,
                labelnames=[*self._labelnames, *(["choice"] if name == NAMES["loads"] else [])],
            )
            for name, text in TEXTS.items()
        }
        self._counters: dict[int, dict[str, Counter]] = {
            engine: {total: families[name].labels(*values, *choice.get(total, ())) for total, name in NAMES.items()}
            for engine, values in self.per_engine_labelvalues.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for total, counter in self._counters.get(engine_idx, {}).items():
            counter.inc(transfer_stats_data.get(total, 0))


class _HostClock:
    """Where vLLM's process computes itself: a mark is the time."""

    def mark(self) -> Any:
        return time.perf_counter()

    def seconds(self, begin: Any, end: Any) -> float | None:
        return end - begin


class _StreamClock:
    """Where a card computes: a mark is an event in the stream, known when the card has come to it.

    Nothing waits for a card here. What counts is the time between two events of vLLM's own stream: loads that vLLM
    overlaps with other work cost only the rest.
    """

    def __init__(self, device: Any) -> None:
        self._device = device

    def mark(self) -> Any:
        event = self._device.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, begin: Any, end: Any) -> float | None:
        return begin.elapsed_time(end) / 1000 if end.query() else None


def make_clock(device: str) -> _HostClock | _StreamClock | None:
    """For "cpu", "cuda", "hpu"; None where a card's time cannot be told."""
    if device == "cpu":
        return _HostClock()
    clock = _StreamClock(getattr(torch, device, None))
    try:
        clock.seconds(clock.mark(), clock.mark())
    except (AttributeError, TypeError, RuntimeError, NotImplementedError) as error:
        logger.warning("KV loads and computing are not measured: no timed events on %s (%s)", device, error)
        return None
    return clock


class Meter:
    """One worker's measurements. Called by the worker's thread, a step at a time.

    ``step_begin``, any number of ``load_begin`` and ``load_end``, ``step_end``, ``take``.
    """

    def __init__(self, device: str) -> None:
        self._clock = make_clock(device)
        self._step: StepMetadata | None = None
        self._begin: Any = None
        self._step_loads: list[tuple[Any, Any]] = []
        self._beside: deque[tuple[str, list[float]]] = deque()  # other threads add to these two
        self._used: deque[tuple[str, list[float]]] = deque()
        # kind, key, tokens, (begin, end), marks of loads in between
        self._open: deque[tuple[str, Any, int, tuple[Any, Any], list[tuple[Any, Any]]]] = deque()

    def step_begin(self, step: StepMetadata | None) -> None:
        """A step begins: before its loads and before its forward pass."""
        self._step, self._step_loads = step, []
        self._begin = self._clock.mark() if self._clock and step and step.compute_tokens else None

    def load_begin(self) -> Any:
        """A load begins; give the result to ``load_end``."""
        return self._clock.mark() if self._clock else None

    def load_end(self, begin: Any, request_id: str, tokens: int) -> None:
        """Its KV cache is in place. ``tokens``: how many were loaded; 0 when not all of them arrived."""
        if self._clock is None or self._step is None:
            return
        span = (begin, self._clock.mark())
        self._step_loads.append(span)
        self._open.append(("load_times", f"{self._step.number}:{request_id}", tokens, span, []))

    def loaded(self, request_id: str, step: int, tokens: int, seconds: float) -> None:
        """A load beside the steps has ended; ``step`` began it. ``tokens`` as for ``load_end``."""
        if self._clock is not None:
            self._beside.append((f"{step}:{request_id}", [seconds, 1, tokens]))

    def used(self, request_id: str, tokens: int, seconds: float = 0.0) -> None:
        """Of a load that took so long: ``tokens`` that vLLM goes on with (see reuse.used_tokens)."""
        self._used.append((request_id, [seconds, 1, tokens]))

    def step_end(self) -> None:
        """The forward pass is over (on a card: has been handed over)."""
        if self._clock is not None and self._step is not None and self._begin is not None:
            span = (self._begin, self._clock.mark())
            self._open.append(("step_times", self._step.number, 0, span, self._step_loads))
        self._step, self._begin, self._step_loads = None, None, []

    def take(self) -> LoadStats | None:
        """What is known by now; None when that is nothing."""
        data: dict[str, dict[Any, list[float]]] = {}
        while self._used:
            request_id, measured = self._used.popleft()
            data.setdefault("used_tokens", {})[request_id] = measured
        while self._beside:
            key, measured = self._beside.popleft()
            data.setdefault("load_times", {})[key] = measured
        while self._clock is not None and self._open:
            kind, key, tokens, span, between = self._open[0]
            seconds = self._clock.seconds(*span)
            if seconds is None:
                break
            self._open.popleft()
            seconds -= sum(self._clock.seconds(*load) or 0.0 for load in between)
            # One rank has spoken; see LoadScheduler.observe.
            data.setdefault(kind, {})[key] = [max(seconds, 0.0), 1, *([tokens] if kind == "load_times" else [])]
        return LoadStats(data=data) if data else None
