"""Load a prompt's KV cache from the store, or compute it again? The choice, from measured times.

``always`` and ``never`` do as they say, ``auto`` whichever way has taken less time for prompts of the request's size.
Nothing here imports vLLM or torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from disagg_prefill_lmcache_v1.kv.settings import MODES

# A step with fewer prompt tokens says more about its fixed cost than about the tokens.
MEASURED_FROM = 64
# Loads of a size that are awaited before the estimate counts: the first ones pay for connections and for memory.
LOADS_TRUSTED = 3
# Weight of a new measurement, and how much slower than the estimate it can count as: one hiccup must not decide.
WEIGHT = 0.3
CLIP = 2.0
# A load beside the engine's steps holds nobody, computing holds every running request: it may take so much longer.
# Two H100, 8B shape, prompts of 2,000 tokens at 10 a second: with 1, half of them were computed again, and the p99 of
# the time between two tokens was 77 ms.
BESIDE_MAY_TAKE = 3.0
# The other way is tried again after so many requests of a size, when that costs no more than this share of their time.
EXPLORE_AFTER = 64
EXPLORE_SHARE = 0.02


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
    """Loads where loading has been faster than computing, and where one of the two is not known yet.

    Args:
        beside: whether loads run beside the engine's steps.
    """

    def __init__(self, mode: str, beside: bool = False) -> None:
        if mode not in MODES:
            raise ValueError(f"KV load mode {mode!r}: allowed: {', '.join(MODES)}")
        self.mode = mode
        self._may_take = BESIDE_MAY_TAKE if beside else 1.0
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
        load = compute_s is None or load_s <= compute_s * self._may_take
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
