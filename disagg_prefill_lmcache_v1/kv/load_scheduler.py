"""The scheduler's side of loading: asks the policy once for every request, says with each step what the workers have to
measure, and turns what they measured (meter.py) into the policy's estimates and into totals for ``/metrics``.

Nothing here imports vLLM or torch.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from disagg_prefill_lmcache_v1.kv.policy import MEASURED_FROM, LoadPolicy

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


@dataclass
class LoadRequest:
    """KV to be loaded beside the engine's steps.

    Attributes:
        token_ids: that the store has, from the first on; their chunks' keys come from them.
        block_ids: vLLM's blocks of the first ``end`` tokens.
        cached: tokens that vLLM has, in whole blocks that others may use.
        cached_blocks: these are so many.
        end: tokens that count as computed when they are loaded. The prompt's last one may have no block yet.
        step: number of the step that began it.
    """

    request_id: str
    token_ids: list[int]
    block_ids: list[int]
    cached: int
    cached_blocks: int
    end: int
    request_configs: dict[str, Any] | None = None
    step: int = 0

    @property
    def loaded_blocks(self) -> list[int]:
        """The blocks that are written to: nobody else's."""
        return self.block_ids[self.cached_blocks :]


@dataclass
class StepMetadata:
    """What the scheduler tells the workers with a step."""

    number: int
    compute_tokens: int = 0  # prompt tokens that the step computes; 0: too few to be measured
    released: list[str] = field(default_factory=list)  # requests whose KV was looked up and is not loaded
    loads: list[LoadRequest] = field(default_factory=list)  # to be begun with this step


@dataclass
class LoadChoice:
    load: bool
    tokens: int


@dataclass
class PromptProgress:
    length: int
    computed: int
    first: int  # tokens that were there when its computing began


class LoadScheduler:
    """The scheduler's account of loads and recomputes; every method is called by the scheduler's thread.

    Args:
        ranks: workers that measure; the slowest counts.
    """

    def __init__(self, policy: LoadPolicy, ranks: int = 1) -> None:
        self.policy = policy
        self.ranks = ranks
        self._choices: dict[str, LoadChoice] = {}
        self._counted: set[str] = set()
        self._released: list[str] = []
        self._prompts: dict[str, PromptProgress] = {}
        self._number = 0
        self._steps: OrderedDict[int, list[tuple[int, int]]] = OrderedDict()  # (tokens, of) of each prompt
        self._pending: OrderedDict[tuple[str, Any], list[float]] = OrderedDict()
        self._totals: defaultdict[str, float] = defaultdict(float)

    def choose(self, request_id: str, tokens: int) -> bool:
        """Whether to load the ``tokens`` found for the request: asked again, the answer stays the same."""
        choice = self._choices.get(request_id)
        if choice is None:
            choice = self._choices[request_id] = LoadChoice(self.policy.decide(tokens), tokens)
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

    def step(self, begun: Iterable[tuple[str, int, int]], scheduled: Mapping[str, int]) -> StepMetadata:
        """Note what the next step computes.

        Args:
            begun: id, prompt tokens and tokens already there of requests that are new or come back in this step.
            scheduled: tokens of each request in this step.
        """
        for request_id, length, computed in begun:
            self._prompts[request_id] = PromptProgress(length, computed, computed)
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
        step = StepMetadata(self._number, sum(tokens for tokens, _ in parts), self._released)
        self._released = []
        if step.compute_tokens < MEASURED_FROM:
            step.compute_tokens = 0
        else:
            put_bounded(self._steps, step.number, parts)
        return step

    def observe(self, measured: Mapping[str, Mapping[Any, list[float]]]) -> None:
        """Take what workers have measured.

        Args:
            measured: "step_times": number to [seconds, ranks]; "load_times": key to [seconds, ranks, tokens], 0 tokens
                for a load that was not complete. Each is used when all ranks have reported it.
        """
        for kind in ("step_times", "load_times"):
            for key, values in measured.get(kind, {}).items():
                seen = merge(self._pending.pop((kind, key), None), values)
                if seen[1] < self.ranks:
                    put_bounded(self._pending, (kind, key), seen)
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


def put_bounded(pending: OrderedDict[Any, Any], key: Any, value: Any) -> None:
    """A worker that never reports must not fill the memory."""
    pending[key] = value
    if len(pending) > MOST_PENDING:
        pending.popitem(last=False)
