"""Load a prompt's KV cache from the store, or compute it again? The choice, and the measurements it is made from.

``LoadPolicy`` chooses: ``always`` and ``never`` as they say, ``auto`` whichever way has taken less time for prompts of
the request's size. ``LoadBook`` is the scheduler's side of it: it asks the policy once for every request, says with
each step what the workers have to measure, and turns what they measured (kv_meter.py) into the policy's estimates and
into totals for ``/metrics``.

Nothing here imports vLLM or torch.
"""

from __future__ import annotations

import os
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from disagg_prefill_lmcache_v1.launch import profiles

VARIABLE = "DISAGG_KV_LOAD"
MODES = ("auto", "always", "never")

# A step with fewer prompt tokens says more about its fixed cost than about the tokens.
MEASURED_FROM = 64
# Loads of a size that are awaited before the estimate counts: the first ones pay for connections and for memory.
LOADS_TRUSTED = 3
# Weight of a new measurement, and how much slower than the estimate it can count as: one hiccup must not decide.
WEIGHT = 0.3
CLIP = 2.0
# The other way is tried again after so many requests of a size, when that costs no more than this share of their time.
EXPLORE_AFTER = 64
EXPLORE_SHARE = 0.02
# Measurements of steps that not every rank has reported yet.
MOST_PENDING = 1024

# What is counted, by name: the totals in the messages between scheduler and API server, and the metrics' names.
TOTALS = (
    "loads",
    "recomputes",
    "loaded_tokens",
    "load_seconds",
    "recomputed_tokens",
    "compute_tokens",
    "compute_seconds",
)


def mode_from_environment() -> str:
    """``DISAGG_KV_LOAD``; where it is not set, the default of the profiles.

    Raises:
        ValueError: the variable has another value than the three.
    """
    mode = os.environ.get(VARIABLE) or profiles.read_file(profiles.FOLDER / "common.env")[0]["KV_LOAD"]
    if mode not in MODES:
        raise ValueError(f"{VARIABLE}={mode!r}: allowed: {', '.join(MODES)}")
    return mode


def size_class(tokens: int) -> int:
    """Sizes from a power of two to the next one are alike: 256 to 511 tokens are one class."""
    return max(tokens, 1).bit_length()


@dataclass
class _Estimate:
    """Of one way and one size class: seconds a token, and what has happened since it was measured last."""

    seconds: float = 0.0
    samples: float = 0.0
    others: int = 0  # times that the other way was chosen
    others_seconds: float = 0.0  # what those took, estimated

    def record(self, seconds: float, share: float) -> None:
        """``share``: part of a whole measurement that this is."""
        if self.samples:
            weight = 1 - (1 - WEIGHT) ** share
            self.seconds += weight * (min(seconds, CLIP * self.seconds) - self.seconds)
        else:
            self.seconds = seconds
        self.samples += share
        self.others, self.others_seconds = 0, 0.0


class LoadPolicy:
    """Loads where loading has been faster than computing, and where one of the two is not known yet."""

    def __init__(self, mode: str) -> None:
        if mode not in MODES:
            raise ValueError(f"KV load mode {mode!r}: allowed: {', '.join(MODES)}")
        self.mode = mode
        self._load: dict[int, _Estimate] = {}
        self._compute: dict[int, _Estimate] = {}

    def record_load(self, tokens: int, seconds: float) -> None:
        """``tokens`` were loaded in ``seconds``, from the start until the KV cache was in place."""
        self._record(self._load, tokens, seconds, tokens)

    def record_compute(self, tokens: int, seconds: float, of: int = 0) -> None:
        """``tokens`` were computed in ``seconds``: a whole prompt, or one step of a prompt of ``of`` tokens."""
        self._record(self._compute, tokens, seconds, of or tokens)

    @staticmethod
    def _record(estimates: dict[int, _Estimate], tokens: int, seconds: float, of: int) -> None:
        if tokens > 0 and seconds > 0:
            estimate = estimates.setdefault(size_class(of), _Estimate())
            estimate.record(seconds / tokens, min(tokens / of, 1.0))

    def load_seconds(self, tokens: int) -> float | None:
        """How long a load of ``tokens`` takes; None: not known."""
        estimate = self._load.get(size_class(tokens))
        return tokens * estimate.seconds if estimate and estimate.samples >= LOADS_TRUSTED else None

    def compute_seconds(self, tokens: int) -> float | None:
        """How long computing ``tokens`` takes, by prompts of the nearest size that was measured; None: not known."""
        wanted = size_class(tokens)
        known = [size for size, estimate in self._compute.items() if estimate.samples]
        nearest = min(known, key=lambda size: (abs(size - wanted), size), default=None)
        return None if nearest is None else tokens * self._compute[nearest].seconds

    def decide(self, tokens: int) -> bool:
        """Whether to load ``tokens`` that the store has (True) or to compute them."""
        if self.mode != "auto":
            return self.mode == "always"
        load_s, compute_s = self.load_seconds(tokens), self.compute_seconds(tokens)
        if load_s is None:
            return True
        load = compute_s is None or load_s <= compute_s
        size = size_class(tokens)
        other = (self._compute if load else self._load).setdefault(size, _Estimate())
        chosen_s = load_s if load else compute_s or 0.0
        extra_s = max((compute_s or 0.0) if load else load_s, chosen_s) - chosen_s
        if other.others >= EXPLORE_AFTER and other.others_seconds * EXPLORE_SHARE >= extra_s:
            other.others, other.others_seconds = 0, 0.0
            return not load
        other.others += 1
        other.others_seconds += chosen_s
        return load


@dataclass
class StepNote:
    """What the scheduler tells the workers with a step."""

    number: int
    compute_tokens: int = 0  # prompt tokens that the step computes; 0: too few to be measured
    released: list[str] = field(default_factory=list)  # requests whose KV was looked up and is not loaded


@dataclass
class _Choice:
    load: bool
    tokens: int


@dataclass
class _Prompt:
    length: int
    computed: int
    first: int  # tokens that were there when its computing began


class LoadBook:
    """The scheduler's account of loads and recomputes; every method is called by the scheduler's thread.

    Args:
        ranks: workers that measure; the slowest counts.
    """

    def __init__(self, policy: LoadPolicy, ranks: int = 1) -> None:
        self.policy = policy
        self._ranks = ranks
        self._choices: dict[str, _Choice] = {}
        self._counted: set[str] = set()
        self._released: list[str] = []
        self._prompts: dict[str, _Prompt] = {}
        self._number = 0
        self._steps: OrderedDict[int, list[tuple[int, int]]] = OrderedDict()  # (tokens, of) of each prompt
        self._pending: OrderedDict[tuple[str, Any], list[float]] = OrderedDict()
        self._totals: defaultdict[str, float] = defaultdict(float)

    def choose(self, request_id: str, tokens: int) -> bool:
        """Whether to load the ``tokens`` found for the request: asked again, the answer stays the same."""
        choice = self._choices.get(request_id)
        if choice is None:
            choice = self._choices[request_id] = _Choice(self.policy.decide(tokens), tokens)
        choice.tokens = tokens
        return choice.load

    def scheduled(self, request_id: str, tokens: int) -> None:
        """The request got its memory, and vLLM expects ``tokens`` of it to be loaded."""
        choice = self._choices.get(request_id)
        if choice is None:
            return
        if not tokens:
            self._released.append(request_id)
        if request_id in self._counted or (choice.load and not tokens):
            return
        self._counted.add(request_id)
        self._totals["loads" if choice.load else "recomputes"] += 1
        if not choice.load:
            self._totals["recomputed_tokens"] += choice.tokens

    def finished(self, request_id: str) -> None:
        self._choices.pop(request_id, None)
        self._counted.discard(request_id)
        self._prompts.pop(request_id, None)

    def step(self, begun: Iterable[tuple[str, int, int]], scheduled: Mapping[str, int]) -> StepNote:
        """Note what the next step computes.

        Args:
            begun: id, prompt tokens and tokens already there of requests that are new or come back in this step.
            scheduled: tokens of each request in this step.
        """
        for request_id, length, computed in begun:
            self._prompts[request_id] = _Prompt(length, computed, computed)
        parts = []
        for request_id in [r for r in self._prompts if r in scheduled]:
            prompt = self._prompts[request_id]
            tokens = min(scheduled[request_id], prompt.length - prompt.computed)
            prompt.computed += tokens
            if tokens > 0:
                parts.append((tokens, prompt.length - prompt.first))
            if prompt.computed >= prompt.length:
                del self._prompts[request_id]
        self._number += 1
        note = StepNote(self._number, sum(tokens for tokens, _ in parts), self._released)
        self._released = []
        if note.compute_tokens < MEASURED_FROM:
            note.compute_tokens = 0
        else:
            _put(self._steps, note.number, parts)
        return note

    def observe(self, measured: Mapping[str, Mapping[Any, list[float]]]) -> None:
        """Take what workers have measured.

        Args:
            measured: "step_times": number to [seconds, ranks]; "load_times": key to [seconds, ranks, tokens], 0 tokens
                for a load that was not complete. Each is used when all ranks have reported it.
        """
        for kind in ("step_times", "load_times"):
            for key, values in measured.get(kind, {}).items():
                seen = merge(self._pending.pop((kind, key), None), values)
                if seen[1] < self._ranks:
                    _put(self._pending, (kind, key), seen)
                elif kind == "step_times":
                    self._computed(self._steps.pop(key, []), seen[0])
                else:
                    self._loaded(int(seen[2]), seen[0])

    def _computed(self, parts: list[tuple[int, int]], seconds: float) -> None:
        total = sum(tokens for tokens, _ in parts)
        for tokens, of in parts:
            self.policy.record_compute(tokens, seconds * tokens / total, of)
        if total:
            self._totals["compute_tokens"] += total
            self._totals["compute_seconds"] += seconds

    def _loaded(self, tokens: int, seconds: float) -> None:
        self.policy.record_load(tokens, seconds)
        self._totals["loaded_tokens"] += tokens
        self._totals["load_seconds"] += seconds

    def take(self) -> dict[str, float]:
        """Totals (see TOTALS) since they were taken last."""
        totals, self._totals = self._totals, defaultdict(float)
        return dict(totals)


def merge(old: list[float] | None, new: list[float]) -> list[float]:
    """Measurements of the same thing by other ranks: the slowest counts, and tokens that every rank has."""
    if old is None:
        return list(new)
    return [max(old[0], new[0]), old[1] + new[1], *(min(a, b) for a, b in zip(old[2:], new[2:], strict=True))]


def _put(pending: OrderedDict[Any, Any], key: Any, value: Any) -> None:
    """A worker that never reports must not fill the memory."""
    pending[key] = value
    if len(pending) > MOST_PENDING:
        pending.popitem(last=False)
