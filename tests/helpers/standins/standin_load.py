#!/usr/bin/env python3
"""Stand-in for load_and_verify, and (with --step) for a step of a comparison.

It waits STANDIN_LOAD_SECONDS, then exits with STANDIN_LOAD_STATUS; "compare-pair:60" is for that step alone.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

name = f"compare-{sys.argv[sys.argv.index('--step') + 1]}" if "--step" in sys.argv else "load"


def told(variable: str) -> str:
    only, _, value = os.environ.get(variable, "0").rpartition(":")
    return value if only in ("", name) else "0"


print(f"stand-in {name} runs", flush=True)
if record := os.environ.get("STANDIN_RECORD"):
    text = json.dumps({"argv": sys.argv[1:], "env": dict(os.environ), "pid": os.getpid()})
    partial = Path(record, f".{name}")
    partial.write_text(text)
    partial.rename(Path(record, f"{name}.json"))
time.sleep(float(told("STANDIN_LOAD_SECONDS")))
sys.exit(int(told("STANDIN_LOAD_STATUS")))
