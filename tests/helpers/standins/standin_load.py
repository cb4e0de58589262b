#!/usr/bin/env python3
"""Stand-in for load_and_verify: waits STANDIN_LOAD_SECONDS, then exits with STANDIN_LOAD_STATUS."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

if record := os.environ.get("STANDIN_RECORD"):
    text = json.dumps({"argv": sys.argv[1:], "env": dict(os.environ), "pid": os.getpid()})
    partial = Path(record, ".load")
    partial.write_text(text)
    partial.rename(Path(record, "load.json"))
print("stand-in load runs", flush=True)
time.sleep(float(os.environ.get("STANDIN_LOAD_SECONDS", "0")))
sys.exit(int(os.environ.get("STANDIN_LOAD_STATUS", "0")))
