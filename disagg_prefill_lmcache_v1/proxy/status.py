"""The live status page at ``/`` (--status-page): one HTML file that asks for ``/status.json`` again and again.

The page itself tells nothing, so it needs no API key; what it shows does, and the page asks for the key. All of it
comes from the metrics: a request costs nothing more because of it.
"""

from __future__ import annotations

import base64
import hashlib
import re
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from disagg_prefill_lmcache_v1.proxy.metrics import SECONDS, Metrics
from disagg_prefill_lmcache_v1.proxy.timing import PARTS

PAGE, DATA = "/", "/status.json"
_FILE = Path(__file__).with_name("status.html")
_HISTOGRAMS = {"disagg_ttft_seconds": "ttft", "disagg_itl_seconds": "itl", "disagg_e2e_seconds": "e2e"}
_COUNTERS = {
    "disagg_requests": "requests",  # stage and outcome
    "disagg_retries": "retries",
    "disagg_prefill_skipped": "prefill_skipped",
    "disagg_kv_state": "kv_states",
}
_TOKENS = {"disagg_prompt_tokens": "prompt", "disagg_reused_tokens": "reused"}


def read_page() -> tuple[bytes, dict[str, str]]:
    """The page and the headers that go with it: its own script and style run, and nothing else."""
    text = _FILE.read_text(encoding="utf-8")
    hashes = {}
    for tag in ("script", "style"):
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in found]
        hashes[tag] = " ".join(f"'sha256-{digest}'" for digest in digests)
    policy = (
        f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text.encode(), {
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-store",
    }


def snapshot(metrics: Metrics, problems: Sequence[str] = ()) -> dict[str, Any]:
    """What the page shows, as totals: it takes the difference of two. ``problems``: sentences for whoever runs it."""
    found: dict[str, Any] = {
        "time": time.monotonic(),
        "bounds": SECONDS,
        "parts": {part: {"s": 0.0, "text": text} for part, text in PARTS.items()},
        "tokens": dict.fromkeys(_TOKENS.values(), 0.0),
        "in_flight": {},
        "kv_degraded": False,
        "problems": list(problems),
        **{name: {"counts": [0.0] * (len(SECONDS) + 1), "sum": 0.0} for name in _HISTOGRAMS.values()},
        **{name: defaultdict(float) for name in _COUNTERS.values()},
    }
    servers: defaultdict[tuple[str, str], dict[str, Any]] = defaultdict(dict)
    for (name, *labels), values in metrics.merged().items():
        if name in _HISTOGRAMS:
            found[_HISTOGRAMS[name]] = {"counts": values[:-1], "sum": values[-1]}
        elif name in _COUNTERS:
            found[_COUNTERS[name]][" ".join(labels[-2:])] += values[0]
        elif name in _TOKENS:
            found["tokens"][_TOKENS[name]] = values[0]
        elif name == "disagg_ttft_part_seconds":
            found["parts"][labels[0]]["s"] = values[-1]
        elif name == "disagg_in_flight":
            found["in_flight"][labels[0]] = values[0]
        elif name == "disagg_kv_degraded":
            found["kv_degraded"] = bool(values[0])
        elif name == "disagg_upstream_up":
            servers[labels[0], labels[1]]["up"] = bool(values[0])
        elif name == "disagg_upstream_in_flight":
            servers[labels[0], labels[1]]["in_flight"] = values[0]
    found["servers"] = [{"role": role, "server": server, **servers[role, server]} for role, server in sorted(servers)]
    return found
