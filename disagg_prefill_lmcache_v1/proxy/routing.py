"""Which way a request takes: through a prefill server and its KV cache, or straight to a decode server.

Pure arithmetic on what the proxy has seen, without a clock or a socket, so that ``benchmarks/simulate_routing.py`` runs
this very code.
"""

from __future__ import annotations

from dataclasses import dataclass

ALWAYS, NEVER, AUTO = "always", "never", "auto"

_DECAY = 0.95  # weight that older observations keep with each new one
_STALE = 256  # decisions after which a line that nobody has fed is believed no more
_OVER_SHARE = 0.01  # share of the gaps between tokens that may be over the target: the 99th percentile meets it
_GAPS_KEPT = 20_000.0  # gaps after which older ones weigh half


class Line:
    """Running linear fit of seconds over tokens; the latest observations count most."""

    __slots__ = ("age", "w", "wx", "wxx", "wxy", "wy")

    def __init__(self) -> None:
        self.w = self.wx = self.wy = self.wxx = self.wxy = 0.0
        self.age = 0  # decisions since the last observation

    @property
    def known(self) -> bool:
        """Whether there is anything to predict from."""
        return self.w > 0 and self.age < _STALE

    def note(self, tokens: float, seconds: float) -> None:
        """One observation."""
        if self.w > 3:  # one that was held up for another reason counts as three times what was expected, no more
            seconds = min(seconds, 3 * self.expect(tokens))
        for name, value in (
            ("w", 1.0), ("wx", tokens), ("wy", seconds), ("wxx", tokens * tokens), ("wxy", tokens * seconds),
        ):  # fmt: skip
            setattr(self, name, getattr(self, name) * _DECAY + value)
        self.age = 0

    def expect(self, tokens: float) -> float:
        """Seconds for so many tokens; 0 if nothing is known."""
        if not self.w:
            return 0.0
        x, y = self.wx / self.w, self.wy / self.w
        spread = self.wxx / self.w - x * x
        if spread < 0.01 * x * x:  # lengths have been alike: in proportion
            return y * tokens / x if x else y
        slope = max((self.wxy / self.w - x * y) / spread, 0.0)
        start = y - slope * x
        if start < 0:
            return y * tokens / x
        return start + slope * tokens


class Load:
    """What one server has to compute, and how fast it has been."""

    __slots__ = ("line", "tokens")

    def __init__(self) -> None:
        self.tokens = 0.0  # of the prompts that it computes or that wait there
        self.line = Line()  # seconds until a prompt is computed, over its tokens and those before it

    def add(self, tokens: float) -> float:
        """One more prompt is sent there; returns the tokens to compute until it is done. To be taken off then."""
        self.tokens += tokens
        return self.tokens

    def expect(self, tokens: float, other: Line | None = None) -> float:
        """Seconds until a prompt of so many tokens would be computed here; by ``other`` while nothing is known."""
        line = self.line if self.line.known or other is None else other
        return line.expect(self.tokens + tokens)


@dataclass(frozen=True)
class Choice:
    """The way of one request, why, and in how many seconds its first token was expected (-1: no idea)."""

    direct: bool
    reason: str
    expected_s: float = -1.0


class Gaps:
    """Gaps between tokens: how many there were, how many over the target. Older ones fade."""

    __slots__ = ("all", "harm", "over")

    def __init__(self) -> None:
        self.all = self.over = 0.0
        self.harm = 0.0  # gaps that a prompt token, computed among answers, has put over the target in one of them

    def note(self, count: float, over: float) -> None:
        """So many more gaps, of them so many over the target."""
        keep = 0.5 ** (count / _GAPS_KEPT)
        self.all = self.all * keep + count
        self.over = self.over * keep + over

    def note_harm(self, tokens: float, answers: float, over: float) -> None:
        """A prompt of so many tokens was computed among ``answers``; meanwhile ``over`` gaps were over the target."""
        if tokens and answers:
            self.harm += 0.2 * (over / (tokens * answers) - self.harm)

    def used(self, tokens: float, answers: int) -> float:
        """Share of the gaps that may be over the target which are, were this prompt computed among so many answers."""
        if not answers:
            return 0.0
        over = self.over + self.harm * tokens * answers
        return over / (_OVER_SHARE * self.all) if self.all else float(over > 0)


class Router:
    """Decides for each request. ``threshold``: prompts of fewer tokens go straight to a decode server."""

    def __init__(self, mode: str, threshold: int = 0, ttft_target_s: float = 0.0) -> None:
        self.mode = mode
        self._threshold = threshold
        self._ttft_target_s = ttft_target_s
        self.handover = Line()  # from the prefill answer to the first token, over prompt tokens
        self.gaps = Gaps()

    def choose(self, tokens: float, cached: float, prefiller: Load, decoder: Load, answers: int) -> Choice:
        """The way of a prompt.

        Args:
            tokens: of the prompt.
            cached: of these, tokens whose KV the prefill server is thought to have.
            prefiller, decoder: the servers that it would go to.
            answers: requests that the decode server is answering.
        """
        if self.mode == NEVER:
            return Choice(True, "never")
        if self._threshold:
            return Choice(True, "short") if tokens < self._threshold else Choice(False, "long")
        if self.mode != AUTO:
            return Choice(False, "always")
        for line in (prefiller.line, decoder.line, self.handover):
            line.age += 1
        if not (prefiller.line.known and self.handover.known):
            return Choice(False, "learning")
        far = prefiller.expect(tokens - cached) + self.handover.expect(tokens)
        near = decoder.expect(tokens, prefiller.line)
        if far <= near:
            return Choice(False, "quicker", far)
        if 0 < far <= self._ttft_target_s:
            return Choice(False, "in_time", far)
        # The fewer gaps may still be over the target, the more must be gained by one more prompt among the answers.
        if far - near < self.gaps.used(tokens, answers) * far:
            return Choice(False, "itl", far)
        return Choice(True, "quicker", near)
