"""What the modules of the load and the probe hand to each other."""

from __future__ import annotations

from dataclasses import dataclass, field


class LoadError(Exception):
    """The run cannot be made at all; the message is one line."""


class UsageError(LoadError):
    """Settings that do not fit together or do not fit the model."""


@dataclass
class Answer:
    """What came back. `error` is None for a complete answer, otherwise one line that names the cause."""

    error: str | None = None
    text: str = ""
    tokens: list[str] = field(default_factory=list)  # with logprobs requested: "token_id:<id>" per token
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[dict[str, float]] = field(default_factory=list)
    finish_reason: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int | None = None  # prompt tokens the answering server did not compute; None when it does not tell
    told_reused_tokens: int | None = None  # `x-reused-tokens`: those that the decoder's workers report as loaded
    kv_state: str | None = None  # `x-kv-state` of the proxy
    kv_wait_ms: float | None = None  # `x-kv-wait-ms` of the proxy
    ttft_ms: float | None = None  # request sent to first token; for an answer that is not streamed, to the whole of it
    itl_ms: list[float] = field(default_factory=list)  # gaps between the token chunks of a stream
    duration_ms: float = 0.0
    start_s: float = 0.0  # when it was sent, since the load began
    request_id: str = ""  # `x-request-id` of the proxy
    parts: dict[str, float] = field(default_factory=dict)  # of TTFT, milliseconds: `server-timing` of the proxy

    def reusable_tokens(self, block: int = 1) -> int:
        """Prompt tokens that can be reused at most: whole blocks, and never the last one, as it gives the next."""
        return max(min(self.prompt_tokens // block * block, self.prompt_tokens - 1), 0)


@dataclass(frozen=True)
class Target:
    """What the prefiller says about its model."""

    model: str
    max_model_len: int
    token_ids: tuple[int, ...]  # ordinary ids, to make prompts of
    vllm_version: str | None


@dataclass
class LoadResult:
    answers: list[Answer] = field(default_factory=list)
    duration_s: float = 0.0
    decoder: dict[str, float] = field(default_factory=dict)  # what it counted meanwhile: target.counted_since


@dataclass
class ProbeResult:
    prompts: int = 0
    compared: int = 0
    near_ties: int = 0
    max_logprob_diff: float = 0.0
    differences: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)  # the disaggregated ones that were complete
    decoder: dict[str, float] = field(default_factory=dict)  # as in LoadResult
    duration_s: float = 0.0

    @property
    def outputs_match(self) -> bool:
        return self.prompts > 0 and self.compared == self.prompts and not self.differences and not self.errors
