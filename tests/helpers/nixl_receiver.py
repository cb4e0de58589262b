"""A decode server's side of kv/stores/nixl.py, by itself: nixl_receiver.py HOST PORT SIZE. It runs until killed."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]

from kv_stores import Staging  # noqa: E402

from disagg_prefill_lmcache_v1.kv.stores.nixl import NixlReceiver  # noqa: E402
from disagg_prefill_lmcache_v1.memory import parse_size  # noqa: E402

if __name__ == "__main__":
    loop = asyncio.new_event_loop()
    receiver = NixlReceiver(sys.argv[1], int(sys.argv[2]), loop, Staging(), parse_size(sys.argv[3]))
    loop.run_forever()
