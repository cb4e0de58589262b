#!/usr/bin/env python3
"""KV cache sharing between vLLM instances at tensor parallel size 2: one stores, the other retrieves. See --help."""

from disagg_prefill_lmcache_v1.launch.kv_sharing_run import main

if __name__ == "__main__":
    raise SystemExit(main(tensor_parallel_size=2))
