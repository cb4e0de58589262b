"""The servers under test: the prefiller's model, the decoder's counters, and its calibration."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
import uuid
from typing import Any

import aiohttp

from disagg_prefill_lmcache_v1.measure.completion_client import complete, get_json, get_text
from disagg_prefill_lmcache_v1.measure.settings import Settings
from disagg_prefill_lmcache_v1.measure.types import LoadError, Target, UsageError

# The decoder's counters, by the name that they have here: metric, label.
DECODER_COUNTERS = {
    "external_hits": ("vllm:external_prefix_cache_hits_total", ""),
    "load_requests": ("disagg_kv_load_decisions_total", 'choice="load"'),
    "recompute_requests": ("disagg_kv_load_decisions_total", 'choice="recompute"'),
    "loaded_tokens": ("disagg_kv_loaded_tokens_total", ""),
    "recomputed_tokens": ("disagg_kv_recomputed_tokens_total", ""),
    "load_s": ("disagg_kv_load_seconds_total", ""),
    "compute_tokens": ("disagg_kv_compute_tokens_total", ""),
    "compute_s": ("disagg_kv_compute_seconds_total", ""),
}
MEASURED_BY_WORKERS = ("loaded_tokens", "load_s", "compute_tokens", "compute_s")
WORKERS_REPORT_S = 3.0
CALIBRATION_SHORT = 256  # tokens


def random_words(rng: random.Random, count: int) -> str:
    """Text of any tokenizer's everyday tokens."""
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
        text = random_words(random.Random(0), 1500)
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
    """DECODER_COUNTERS since the start, of all decoders together; what they do not tell is left out."""
    counters: dict[str, float] = {}
    deadline = min(settings.request_timeout, 10.0)
    try:
        texts = [await get_text(session, f"{url}/metrics", timeout_s=deadline) for url in settings.decoder_url]
        for line in "\n".join(texts).splitlines():
            labelled, _, value = line.rpartition(" ")
            for name, (metric, label) in DECODER_COUNTERS.items():
                if labelled.partition("{")[0] == metric and label in labelled:
                    counters[name] = counters.get(name, 0.0) + float(value)
        return counters
    except (ConnectionError, ValueError):
        return {}


async def counted_since(
    session: aiohttp.ClientSession, settings: Settings, before: dict[str, float]
) -> dict[str, float]:
    """What the decoder has counted since `before`, of the counters that it told both times.

    `not_loaded_tokens`, where it can be known, are those that vLLM counts as cached because the store had them, and
    that no worker has reported as loaded: they were computed. vLLM counts when it schedules a load and does not take
    back what failed. Workers report a step later, which is waited for.
    """
    deadline = time.monotonic() + WORKERS_REPORT_S
    while True:
        after = await decoder_counters(session, settings)
        counts = {name: after[name] - before[name] for name in before if name in after}
        # On some devices vLLM hands on nothing of what workers measure: their counters stay 0 whatever happens.
        if "external_hits" in counts and any(after.get(name) for name in MEASURED_BY_WORKERS):
            counts["not_loaded_tokens"] = max(counts["external_hits"] - counts.get("loaded_tokens", 0), 0)
        if not counts.get("not_loaded_tokens") or time.monotonic() > deadline:
            return counts
        await asyncio.sleep(0.2)


def without_reuse() -> dict[str, Any]:
    """Request fields with which a server computes the whole prompt and leaves no trace in the KV store.

    The salt keeps the request away from vLLM's cached blocks and from the store's chunks: it is part of their keys.
    """
    return {"cache_salt": uuid.uuid4().hex, "kv_transfer_params": {"lmcache.skip_save": True}}


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
        for url in settings.decoder_url:
            body |= {"temperature": 0, **without_reuse()}
            answer = await complete(session, url, body, timeout_s=settings.request_timeout)
            if answer.error:
                raise LoadError(f"calibration: {answer.error}")
    measured = await counted_since(session, settings, before)
    return rate(measured, "compute_tokens", "compute_s")


def rate(counts: dict[str, float], tokens: str, seconds: str) -> float | None:
    """Tokens a second; None when one of the two counters was not told, or nothing took time."""
    return round(counts[tokens] / counts[seconds], 1) if counts.get(seconds) and tokens in counts else None
