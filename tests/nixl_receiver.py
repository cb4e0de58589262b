"""A decode server's side of kv_nixl.py, by itself: nixl_receiver.py HOST PORT SIZE. It runs until killed."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from test_kv_store import Staging

from disagg_prefill_lmcache_v1.kv_nixl import NixlReceiver
from disagg_prefill_lmcache_v1.kv_shm_server import parse_size

if __name__ == "__main__":
    loop = asyncio.new_event_loop()
    receiver = NixlReceiver(sys.argv[1], int(sys.argv[2]), loop, Staging(), parse_size(sys.argv[3]))
    loop.run_forever()
