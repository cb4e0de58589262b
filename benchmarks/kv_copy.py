"""How fast does the CPU KV connector copy between vLLM's KV cache and chunks, beside a plain copy of the same bytes?

    python benchmarks/kv_copy.py [--threads 1 2] [--json FILE]

"store" gathers a chunk from the packed cache, "load" scatters it back; "copy" is torch.copy_ of the same bytes, source
and target larger than the caches of the CPU, in turn with the other two. GB/s of KV bytes, median of the repeats.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from disagg_prefill_lmcache_v1.kv.layout import BlockLayout
from disagg_prefill_lmcache_v1.kv.mover import KVMover

# name, layers, KV heads, head size, dtype, block size
SHAPES = [
    ("tiny, float32", 8, 4, 64, torch.float32, 128),
    ("Llama 8B, bfloat16", 32, 8, 128, torch.bfloat16, 128),
    ("Llama 8B, float32", 32, 8, 128, torch.float32, 128),
]
BYTES = 512 << 20  # walk over this much KV, so that nothing stays in the CPU's caches
ROUNDS = 24


def rates(works: dict[str, Callable[[int], object]], rounds: int, count: int, size: int) -> dict[str, float]:
    """GB/s of each ``work(i)``, i below ``count``, each moving ``size`` bytes; median.

    The works take turns, on data far apart, so that a busy moment of the machine slows all of them alike. With one
    thread its CPU time counts: what other processes take of the core does not.
    """
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for i in range(-len(works), rounds):
        for turn, (name, work) in enumerate(works.items()):
            begin = clock()
            work((i + turn * count // len(works)) % count)
            if i >= 0:
                seconds[name].append(clock() - begin)
    return {name: size / statistics.median(taken) / 1e9 for name, taken in seconds.items()}


def measure(isa: str, layers: int, heads: int, head_size: int, dtype: torch.dtype, block: int, tokens: int) -> dict:
    from vllm import _custom_ops as ops

    def write(key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
        keys, values = cache.view(cache.shape[0], heads, 2 * block, -1).chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(key, value, keys, values, slots, isa)

    layout = BlockLayout.learn(write, (heads, block, 2 * head_size), heads, block, head_size, dtype)
    per_chunk = 2 * layers * tokens * heads * head_size * dtype.itemsize
    count = max(2, BYTES // per_chunk)
    per_chunk_blocks = -(-tokens // block)
    blocks = count * per_chunk_blocks
    mover = KVMover([torch.zeros(blocks, heads, block, 2 * head_size, dtype=dtype) for _ in range(layers)], layout)
    order = torch.randperm(blocks).view(count, per_chunk_blocks)
    slots = [(order[i][:, None] * block + torch.arange(block)).flatten()[:tokens] for i in range(count)]
    chunks = [torch.zeros(mover.shape(tokens), dtype=dtype) for _ in range(count)]
    others = [torch.zeros_like(chunk) for chunk in chunks]
    works: dict[str, Callable[[int], object]] = {
        "store": lambda i: mover.gather(chunks[i], slots[i]),
        "load": lambda i: mover.scatter(chunks[i], slots[i]),
        "copy": lambda i: others[i].copy_(chunks[i]),
    }
    row = rates(works, max(ROUNDS, count), count, per_chunk)
    ratios = {"store_ratio": row["store"] / row["copy"], "load_ratio": row["load"] / row["copy"]}
    return {**row, **ratios, "chunk_mb": per_chunk / 1e6}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 100], help="tokens of a chunk")
    parser.add_argument("--isa", nargs="+", default=["vec", "amx"], help="packings of vLLM's CPU attention")
    parser.add_argument("--only", default="", help="KV caches whose name contains this")
    parser.add_argument("--json", type=Path, help="write the numbers there")
    args = parser.parse_args()
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        print("kv_copy: needs vLLM's CPU build (its KV cache is packed; other devices' is not)", file=sys.stderr)
        return 1
    current_platform.import_kernels()
    rows = []
    rates_of = f"{'store':>7s} {'load':>7s} {'copy':>7s}  store/copy  load/copy"
    print(f"{'KV cache':20s} {'isa':5s} {'tokens':>6s} {'threads':>7s} {rates_of}   (GB/s)")
    for threads in args.threads:
        torch.set_num_threads(threads)
        for name, *shape in (shape for shape in SHAPES if args.only in shape[0]):
            for isa in args.isa:
                for tokens in args.tokens:
                    row = measure(isa, *shape, tokens)
                    rows.append({"kv": name, "isa": isa, "tokens": tokens, "threads": threads, **row})
                    speeds = f"{row['store']:7.2f} {row['load']:7.2f} {row['copy']:7.2f}"
                    speeds += f" {row['store_ratio']:11.0%} {row['load_ratio']:10.0%}"
                    print(f"{name:20s} {isa:5s} {tokens:6d} {threads:7d} {speeds}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
