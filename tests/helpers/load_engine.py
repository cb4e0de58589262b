"""One vLLM engine in this process that stores prompts and loads them again: load_engine.py MODEL, options below.

Prints one line of JSON: the answers computed first and those after a load, what was loaded, and how long each took.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from typing import Any

LENGTHS = (5, 31, 33, 64, 65, 128, 129, 200, 257, 300, 384, 500)  # around the borders of blocks (32) and chunks


def prompts(seed: int) -> list[dict[str, Any]]:
    chosen = random.Random(seed)
    return [{"prompt_token_ids": [chosen.randrange(5, 1000) for _ in range(length)]} for length in LENGTHS]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--module", default="disagg_prefill_lmcache_v1.kv.connector")
    parser.add_argument("--blocks", type=int, default=0, help="KV blocks of the engine; few of them make it preempt")
    options = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig

    transfer = KVTransferConfig(
        kv_connector="LMCacheDisaggConnectorV1", kv_connector_module_path=options.module, kv_role="kv_both",
        kv_load_failure_policy="recompute",
    )  # fmt: skip
    engine = LLM(
        options.model, dtype="float32", enforce_eager=True, max_model_len=1024, kv_transfer_config=transfer,
        disable_log_stats=False, **({"num_gpu_blocks_override": options.blocks} if options.blocks else {}),
    )  # fmt: skip
    sampling = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)

    def answers() -> tuple[list[list[int]], list[int], float]:
        begin = time.perf_counter()
        done = engine.generate(prompts(0), sampling, use_tqdm=False)
        took = time.perf_counter() - begin
        return [list(each.outputs[0].token_ids) for each in done], [each.num_cached_tokens or 0 for each in done], took

    computed, _, seconds = answers()
    time.sleep(1)  # puts are asynchronous, and nothing waits for them here
    result: dict[str, Any] = {"computed": computed, "seconds": [seconds], "loaded": [], "reused": []}
    for _ in range(3):
        assert engine.reset_prefix_cache()
        loaded, reused, seconds = answers()
        result["loaded"].append(loaded)
        result["reused"].append(reused)
        result["seconds"].append(seconds)
    counts = {metric.name: getattr(metric, "value", None) for metric in engine.get_metrics() if "disagg" in metric.name}
    print(json.dumps({**result, "metrics": counts}), flush=True)
    os._exit(0)  # LMCache's threads outlive it


if __name__ == "__main__":
    main()
