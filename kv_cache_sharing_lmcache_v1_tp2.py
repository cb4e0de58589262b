#!/usr/bin/env python3
"""KV cache sharing between vLLM instances at tensor parallel size 2: one stores, the other retrieves. See --help."""

import sys

if sys.version_info < (3, 10):  # noqa: UP036 - an older one may be what runs this
    sys.exit("[kv-sharing] failed: this needs Python 3.10 or newer")

from disagg_prefill_lmcache_v1.launch.kv_sharing_run import main

if __name__ == "__main__":
    raise SystemExit(main(tensor_parallel_size=2))
