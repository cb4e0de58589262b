"""Does every request reuse its KV cache, and what does that promise cost?

    python benchmarks/kv_reuse.py [--requests 200] [--concurrency 8] [--lengths 500 2000] [--json FILE]

Against a running stack (disagg_example_gaudi_lm.sh --serve --kv-load always):

1. requests of 2 to 2,500 prompt tokens through the proxy: answered, fully reused, how long an answer was held for the
   KV cache to become visible, and how long the transfer itself took;
2. prefill throughput of the prefill server with N requests in flight, three ways in turn: KV not stored; stored, and
   answered at once (as without this project); stored, and answered when visible;
3. one request at a time, for each of --lengths: prefill without and with storing, and decode (one token) with loaded
   and with recomputed KV.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp

MODES: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "not stored": ({"x-kv-hold": "off"}, {"kv_transfer_params": {"lmcache.skip_save": True}}),
    "stored, answered at once": ({"x-kv-hold": "off"}, {}),
    "stored, answered when visible": ({}, {}),
}


def percentile(values: list[float], percent: int) -> float:
    """Nearest rank, of milliseconds."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)] if ordered else float("nan")


async def post(
    session: aiohttp.ClientSession, url: str, body: dict[str, Any], headers: dict[str, str] | None = None
) -> tuple[dict[str, Any], dict[str, str]]:
    async with session.post(f"{url}/v1/completions", json=body, headers=headers) as response:
        answer = await response.json()
        if response.status != 200:
            raise SystemExit(f"{url} answered {response.status}: {json.dumps(answer)[:300]}")
        return answer, {k.lower(): v for k, v in response.headers.items()}


class Prompts:
    """Random prompts of token ids that the model has (taken from its tokenizer), different on every run."""

    def __init__(self, ids: list[int], seed: int) -> None:
        self._ids, self._rng = ids, random.Random(seed)

    def __call__(self, shortest: int, longest: int) -> list[int]:
        return [self._rng.choice(self._ids) for _ in range(self._rng.randint(shortest, longest))]


async def in_flight(works: list[Any], limit: int) -> list[Any]:
    """Results of all, at most ``limit`` at a time; tells every 5 s how many are done."""
    gate = asyncio.Semaphore(limit)
    done, begin = 0, time.perf_counter()

    async def one(work: Any) -> Any:
        nonlocal done
        async with gate:
            result = await work
        done += 1
        return result

    async def tell() -> None:
        while True:
            await asyncio.sleep(5)
            print(f"{done} of {len(works)} requests, {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)

    telling = asyncio.create_task(tell())
    try:
        return await asyncio.gather(*(one(work) for work in works))
    finally:
        telling.cancel()


async def reuse(session: aiohttp.ClientSession, args: argparse.Namespace, model: str, prompts: Prompts) -> dict:
    async def one(prompt: list[int]) -> dict[str, Any]:
        body = {"model": model, "prompt": prompt, "max_tokens": 4, "temperature": 0, "ignore_eos": True}
        begin = time.perf_counter()
        answer, headers = await post(session, args.proxy_url, body)
        usage = answer["usage"]
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        reused = int(headers.get("x-reused-tokens", cached))  # what was loaded; vLLM counts what was to be loaded
        total = usage["prompt_tokens"]
        return {
            "full": reused >= min(total // args.block * args.block, total - 1),
            "prompt_tokens": usage["prompt_tokens"],
            "reused": reused,
            "state": headers.get("x-kv-state", "unknown"),
            "wait_ms": float(headers.get("x-kv-wait-ms", "nan")),
            "transfer_ms": float(headers.get("x-kv-transfer-ms", "nan")),
            "total_ms": (time.perf_counter() - begin) * 1000,
        }

    sizes = [prompts(args.shortest, args.longest) for _ in range(args.requests)]
    begin = time.perf_counter()
    rows = await in_flight([one(p) for p in sizes], args.concurrency)
    result: dict[str, Any] = {
        "requests": len(rows),
        "full_reuse": sum(r["full"] for r in rows),
        "states": {s: sum(r["state"] == s for r in rows) for s in {r["state"] for r in rows}},
        "prompt_tokens": sum(r["prompt_tokens"] for r in rows),
        "seconds": round(time.perf_counter() - begin, 2),
    }
    for name in ("wait_ms", "transfer_ms", "total_ms"):
        values = [r[name] for r in rows]
        result[name] = {"p50": round(percentile(values, 50), 1), "p99": round(percentile(values, 99), 1)}
    return result


async def throughput(session: aiohttp.ClientSession, args: argparse.Namespace, model: str, prompts: Prompts) -> dict:
    async def one(mode: str, prompt: list[int]) -> int:
        headers, more = MODES[mode]
        body = {"model": model, "prompt": prompt, "max_tokens": 1, "temperature": 0, "cache_salt": uuid.uuid4().hex}
        await post(session, args.prefiller_url, {**body, **more}, {**headers, "x-request-id": uuid.uuid4().hex})
        return len(prompt)

    async def drain() -> None:
        """Let puts that an earlier mode left on the way arrive: they would slow the next one down."""
        for _ in range(200):
            body = {"model": model, "prompt": prompts(2, 2), "max_tokens": 1, "cache_salt": uuid.uuid4().hex}
            _, headers = await post(session, args.prefiller_url, body, {"x-request-id": uuid.uuid4().hex})
            if float(headers.get("x-kv-transfer-ms", 0)) < 50:
                return

    rates: dict[str, list[float]] = {mode: [] for mode in MODES}
    length = args.prefill_len
    await in_flight([one(mode, prompts(length, length)) for mode in MODES for _ in range(2)], args.concurrency)
    for _ in range(args.rounds):
        for mode in MODES:
            works = [one(mode, prompts(length, length)) for _ in range(args.per_round)]
            begin = time.perf_counter()
            tokens = await in_flight(works, args.concurrency)
            rates[mode].append(sum(tokens) / (time.perf_counter() - begin))
            await drain()
    base = statistics.median(rates["not stored"])
    return {
        mode: {
            "tokens_per_s": round(statistics.median(values), 1),
            "lowest": round(min(values), 1),
            "highest": round(max(values), 1),
            "time_ratio": round(base / statistics.median(values), 3),
        }
        for mode, values in rates.items()
    }


async def one_at_a_time(
    session: aiohttp.ClientSession, args: argparse.Namespace, model: str, prompts: Prompts
) -> list[dict[str, Any]]:
    async def timed(url: str, prompt: list[int], more: dict[str, Any], headers: dict[str, str]) -> tuple[float, int]:
        body = {"model": model, "prompt": prompt, "max_tokens": 1, "temperature": 0, **more}
        begin = time.perf_counter()
        answer, _ = await post(session, url, body, {"x-request-id": uuid.uuid4().hex, **headers})
        seconds = time.perf_counter() - begin
        return seconds, (answer["usage"].get("prompt_tokens_details") or {}).get("cached_tokens") or 0

    rows = []
    for length in args.lengths:
        seconds: dict[str, list[float]] = {
            "prefill": [],
            "prefill_stored": [],
            "decode_loaded": [],
            "decode_recomputed": [],
        }
        reused = []
        for round_number in range(args.rounds + 1):
            prompt = prompts(length, length)
            headers, more = MODES["not stored"]
            took = [(await timed(args.prefiller_url, prompts(length, length), more, headers))[0]]
            took.append((await timed(args.prefiller_url, prompt, {}, {}))[0])
            loaded, cached = await timed(args.decoder_url, prompt, {}, {})
            took += [loaded, (await timed(args.decoder_url, prompts(length, length), {}, {}))[0]]
            if round_number:  # the first one warms up
                reused.append(cached)
                for values, value in zip(seconds.values(), took, strict=True):
                    values.append(value)
        row = {
            "tokens": length,
            "reused": min(reused),
            **{k: round(statistics.median(v), 4) for k, v in seconds.items()},
        }
        row["store_ratio"] = round(row["prefill_stored"] / row["prefill"], 3)
        row["load_ratio"] = round(row["decode_loaded"] / row["decode_recomputed"], 3)
        rows.append(row)
    return rows


async def run(args: argparse.Namespace) -> dict[str, Any]:
    timeout = aiohttp.ClientTimeout(total=args.timeout)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        async with session.get(f"{args.prefiller_url}/v1/models") as response:
            model = (await response.json())["data"][0]["id"]
        text = "The quick brown fox jumps over the lazy dog, 0123456789 times! "
        async with session.post(f"{args.prefiller_url}/tokenize", json={"model": model, "prompt": text}) as response:
            prompts = Prompts((await response.json())["tokens"][1:], args.seed)
        result: dict[str, Any] = {"model": model, "concurrency": args.concurrency, "prefill_len": args.prefill_len}
        if args.requests:
            result["reuse"] = await reuse(session, args, model, prompts)
            print_reuse(result["reuse"], args)
        if args.per_round:
            result["prefill"] = await throughput(session, args, model, prompts)
            print_throughput(result["prefill"], args)
        if args.lengths:
            result["one_at_a_time"] = await one_at_a_time(session, args, model, prompts)
            print_one_at_a_time(result["one_at_a_time"], args)
        return result


def print_reuse(r: dict[str, Any], args: argparse.Namespace) -> None:
    print(f"{r['requests']} requests of {args.shortest} to {args.longest} tokens, {args.concurrency} in flight:")
    print(f"  fully reused        {r['full_reuse']} of {r['requests']}   (states {r['states']}, {r['seconds']} s)")
    for name, title in (("wait_ms", "held"), ("transfer_ms", "transfer"), ("total_ms", "whole request")):
        print(f"  {title:18s}  median {r[name]['p50']} ms, p99 {r[name]['p99']} ms")


def print_throughput(rows: dict[str, Any], args: argparse.Namespace) -> None:
    print(f"prefill of {args.prefill_len} tokens, {args.concurrency} in flight, median of {args.rounds} rounds:")
    for mode, row in rows.items():
        spread = f"{row['lowest']:.0f} to {row['highest']:.0f}"
        print(f"  {mode:30s} {row['tokens_per_s']:10.0f} tokens/s ({spread}), {row['time_ratio']:.2f} x the time")


def print_one_at_a_time(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    print(f"one request at a time, seconds, median of {args.rounds}:")
    print("   tokens   prefill  + storing   ratio    decode: loaded  recomputed   ratio   reused")
    for r in rows:
        left = f"{r['tokens']:9d} {r['prefill']:9.4f} {r['prefill_stored']:10.4f} {r['store_ratio']:7.2f}"
        print(
            f"{left} {r['decode_loaded']:17.4f} {r['decode_recomputed']:11.4f} {r['load_ratio']:7.2f} {r['reused']:8d}"
        )


def at_least(low: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(f"{text!r}: allowed: a whole number from {low} on")
        return int(text)

    return parse


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--proxy-url", default="http://127.0.0.1:8000")
    parser.add_argument("--prefiller-url", default="http://127.0.0.1:8100")
    parser.add_argument("--decoder-url", default="http://127.0.0.1:8200", help="for --lengths")
    parser.add_argument("--requests", type=at_least(0), default=200, help="0 leaves the first part out")
    parser.add_argument("--shortest", type=at_least(1), default=2, help="prompt tokens")
    parser.add_argument("--longest", type=at_least(1), default=2500, help="prompt tokens")
    parser.add_argument("--concurrency", type=at_least(1), default=8)
    parser.add_argument("--rounds", type=at_least(1), default=5, help="of the second and third part")
    parser.add_argument(
        "--per-round", type=at_least(0), default=48, help="prefills of a round; 0 leaves the second part out"
    )
    parser.add_argument("--prefill-len", type=at_least(1), default=1000, help="prompt tokens of the second part")
    parser.add_argument("--lengths", type=at_least(1), nargs="*", default=[], help="prompt tokens of the third part")
    parser.add_argument("--block", type=at_least(1), default=1, help="tokens that the store keeps together (mp: 32)")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for one request")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**9))
    parser.add_argument("--json", type=Path, help="write the numbers there")
    args = parser.parse_args()
    if args.shortest > args.longest:
        parser.error(f"--shortest {args.shortest} is more than --longest {args.longest}")
    try:
        result = asyncio.run(run(args))
    except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
        print(f"kv_reuse: the stack does not answer: {error or type(error).__name__}", file=sys.stderr)
        return 1
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if not args.requests or result["reuse"]["full_reuse"] == args.requests else 1


if __name__ == "__main__":
    sys.exit(main())
