"""The correctness probe: disaggregated answers against those that the prefiller gives alone."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass
from typing import Any

import aiohttp

from disagg_prefill_lmcache_v1.measure.completion_client import complete
from disagg_prefill_lmcache_v1.measure.progress import with_progress
from disagg_prefill_lmcache_v1.measure.settings import Settings
from disagg_prefill_lmcache_v1.measure.target import counted_since, decoder_counters, random_words, without_reuse
from disagg_prefill_lmcache_v1.measure.types import Answer, ProbeResult, Target

# Sizes around the borders of KV blocks (16 to 128 tokens), of LMCache's chunks (256) and of a prefill step (2,048).
PROBE_SIZES = (
    *(2, 3, 5, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 258, 300, 511, 512, 513, 769),
    *(1023, 1024, 1025, 1500, 2047, 2048, 2049, 2500),
)
PROBE_SHARED_PREFIX = 600  # tokens that some prompts have in common: not a whole number of chunks
PROBE_CHAT_WORDS = (1, 40, 200)
PROBE_MAX_ERRORS = 3
TOP_LOGPROBS = 5


@dataclass
class Comparison:
    """`verdict`: "equal", "near-tie" or "different"; `detail` says where and how."""

    verdict: str
    detail: str = ""
    max_logprob_diff: float = 0.0


def compare_answers(answer: Answer, reference: Answer, settings: Settings) -> Comparison:
    """Is the disaggregated answer the one that the reference server gives by itself?"""
    ours, theirs = answer.tokens, reference.tokens
    if not theirs or not ours:
        if answer.text == reference.text and answer.text:
            return Comparison("equal")
        return Comparison("different", f"text {answer.text[:60]!r} instead of {reference.text[:60]!r}")
    pairs = zip(ours, theirs)  # noqa: B905 - lengths are compared below
    first = next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))
    diffs = [abs(a - b) for a, b in zip(answer.logprobs[:first], reference.logprobs[:first])]  # noqa: B905
    largest = max(diffs, default=0.0)
    if first == len(ours) == len(theirs):
        if settings.exact and not largest <= settings.logprob_tolerance:
            return Comparison(
                "different",
                f"tokens are equal, but a log-probability differs by {largest:.4f} "
                f"(allowed: {settings.logprob_tolerance:g})",
                largest,
            )
        return Comparison("equal", max_logprob_diff=largest)
    if first == len(ours) or first == len(theirs):
        return Comparison("different", f"{len(ours)} tokens instead of {len(theirs)}", largest)
    detail = f"token {first + 1} is {ours[first]} instead of {theirs[first]}"
    candidates = reference.top_logprobs[first] if first < len(reference.top_logprobs) else {}
    if ours[first] in candidates and first < len(reference.logprobs):
        gap = reference.logprobs[first] - candidates[ours[first]]
        detail += f" (log-probability gap {gap:.4f} in the reference)"
        if gap <= (settings.logprob_tolerance if settings.exact else settings.near_tie_tolerance):
            return Comparison("near-tie", detail, largest)
    return Comparison("different", detail, largest)


@dataclass
class ProbePrompt:
    """One prompt of the probe; `body` is what both servers get."""

    name: str
    body: dict[str, Any]


def probe_prompts(settings: Settings, target: Target, rng: random.Random) -> list[ProbePrompt]:
    """New prompts, so that nothing comes from an earlier run's cache: lone, repeated, with a shared prefix, chats."""
    room = (target.max_model_len or 10**9) - settings.probe_output_len

    def tokens(count: int) -> list[int]:
        return rng.choices(target.token_ids, k=count)

    def asking(prompt: list[int]) -> list[int]:
        """The prompt, ending with two tokens that stand in it before: what tiny-recall looks up."""
        if len(prompt) > 4:
            place = rng.randrange(2, len(prompt) - 1)
            prompt[-2:] = prompt[place - 2 : place]
        return prompt

    prompts: list[tuple[str, Any]] = [(f"{size} tokens", asking(tokens(size))) for size in PROBE_SIZES if size <= room]
    prefix = tokens(min(PROBE_SHARED_PREFIX, max(room - 20, 1)))
    prompts += [(f"shared prefix {tail}", asking((prefix + tokens(tail))[:room])) for tail in (1, 7, 20)]
    prompts += [(f"{name}, repeated", prompt) for name, prompt in prompts if name in ("17 tokens", "300 tokens")]
    out = [ProbePrompt(name, {"prompt": prompt, "logprobs": TOP_LOGPROBS}) for name, prompt in prompts]
    chat_logprobs = {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
    for words in PROBE_CHAT_WORDS:
        if words * 9 + 40 > room:  # at most 8 tokens a word, and the template's own
            continue
        turns = [{"role": "user", "content": random_words(rng, words)}]
        if words > 1:
            turns = [*turns, {"role": "assistant", "content": random_words(rng, 3)}, {"role": "user", "content": "go"}]
        out.append(ProbePrompt(f"chat of {words} words", {"messages": turns, **chat_logprobs}))
    common = {
        "model": target.model,
        "max_tokens": settings.probe_output_len,
        "temperature": 0,
        "ignore_eos": True,
        "return_tokens_as_token_ids": True,  # texts of different tokens can be the same
    }
    for index, prompt in enumerate(out):
        prompt.body |= common
        if index % 3 == 0:
            prompt.body |= {"stream": True, "stream_options": {"include_usage": True}}
    return out


async def probe(session: aiohttp.ClientSession, settings: Settings, target: Target, rng: random.Random) -> ProbeResult:
    """Compares disaggregated answers with those of the prefiller, computed without any reuse."""
    prompts = probe_prompts(settings, target, rng)
    result = ProbeResult(prompts=len(prompts))
    limit = asyncio.Semaphore(settings.probe_concurrency)
    done = 0

    async def ask(who: str, url: str, body: dict[str, Any], headers: dict[str, str] | None = None) -> Answer | None:
        nonlocal done
        async with limit:
            if len(result.errors) >= PROBE_MAX_ERRORS:
                return None
            answer = await complete(session, url, body, timeout_s=settings.request_timeout, headers=headers)
            done += 1
        if answer.error:
            result.errors.append(f"{who}: {answer.error}")
            return None
        return answer

    async def run() -> None:
        proxy, headers = settings.proxy_url, settings.proxy_headers
        answers = await asyncio.gather(*(ask("disaggregated", proxy, p.body, headers) for p in prompts))
        result.answers = [answer for answer in answers if answer]
        references = await asyncio.gather(
            *(ask("reference", settings.prefiller_url, p.body | without_reuse()) for p in prompts)
        )
        for prompt, answer, reference in zip(prompts, answers, references, strict=True):
            if not answer or not reference:
                continue
            result.compared += 1
            if reference.cached_tokens:
                result.differences.append(
                    f"{prompt.name}: the prefiller reused {reference.cached_tokens} tokens: no independent reference"
                )
            comparison = compare_answers(answer, reference, settings)
            result.max_logprob_diff = max(result.max_logprob_diff, comparison.max_logprob_diff)
            result.near_ties += comparison.verdict == "near-tie"
            if comparison.verdict == "different":
                result.differences.append(f"{prompt.name}: {comparison.detail}")

    before = await decoder_counters(session, settings)
    begin = time.perf_counter()
    await with_progress(run(), lambda: f"probe: {done} of {2 * len(prompts)} answers, {len(result.errors)} errors")
    result.duration_s = time.perf_counter() - begin
    result.decoder = await counted_since(session, settings, before)
    return result
