"""The load: streamed completions through the proxy, at their times."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from typing import Any

import aiohttp

from disagg_prefill_lmcache_v1.measure.completion_client import complete
from disagg_prefill_lmcache_v1.measure.progress import with_progress
from disagg_prefill_lmcache_v1.measure.settings import Settings
from disagg_prefill_lmcache_v1.measure.target import counted_since, decoder_counters
from disagg_prefill_lmcache_v1.measure.types import Answer, LoadResult, Target


def arrival_times(count: int, rate: float, arrival: str, rng: random.Random) -> list[float]:
    """Seconds from the begin of the load at which each request starts."""
    if rate == 0:
        return [0.0] * count
    gaps = [rng.expovariate(rate) if arrival == "poisson" else 1 / rate for _ in range(count)]
    return list(itertools.accumulate(gaps[:-1], initial=0.0))[:count]


def load_body(settings: Settings, target: Target, prompt: list[int]) -> dict[str, Any]:
    """One request of the load: streamed, of exactly as many tokens as wanted."""
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
        url, headers = settings.proxy_url, settings.proxy_headers
        return await complete(session, url, body, timeout_s=settings.request_timeout, headers=headers)

    async def warm_up() -> None:
        for body in bodies[: settings.warm_up]:
            await send(body)  # what fails here fails in the load too, and is counted there

    await with_progress(warm_up(), lambda: "warming up")
    before = await decoder_counters(session, settings)
    if settings.ready_file:
        settings.ready_file.touch()
    begin = time.perf_counter()

    async def one(body: dict[str, Any], start: float) -> None:
        await asyncio.sleep(begin + start - time.perf_counter())
        sent = time.perf_counter()
        answer = await send(body)
        answer.start_s = sent - begin
        answers.append(answer)

    def status() -> str:
        errors = sum(answer.error is not None for answer in answers)
        return f"load: {len(answers)} of {settings.num_prompts} requests done, {errors} errors"

    requests = (one(body, start) for body, start in zip(bodies[settings.warm_up :], starts, strict=True))
    await with_progress(asyncio.gather(*requests), status)
    result.duration_s = time.perf_counter() - begin
    result.decoder = await counted_since(session, settings, before)
    return result
