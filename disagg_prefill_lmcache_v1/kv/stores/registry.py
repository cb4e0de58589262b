"""Finds the client of a KV store by the scheme of its URL, and imports it only then."""

from __future__ import annotations

import asyncio
import importlib
from typing import Any

from disagg_prefill_lmcache_v1.kv.stores.base import Store

# URL prefix -> module here; its connect(url, loop, local_cpu_backend) makes the client. LMCache's plugin seam says
# "plugin://NAME", with the address in its configuration.
STORES = {
    "lm://": "lm",
    "redis://": "redis",
    "rediss://": "redis",
    "unix://": "redis",
    "shm://": "shm",
    "plugin://shm": "shm",
}


def connect(url: str, loop: asyncio.AbstractEventLoop, local_cpu_backend: Any) -> Store | None:
    """Our client for ``url``, or None where only LMCache's own will do (other stores).

    Raises:
        StoreUnavailable: the store does not answer, or refuses us.
        ValueError: an address that is not understood.
    """
    name = next((name for prefix, name in STORES.items() if url.startswith(prefix)), None)
    if name is None:
        return None
    return importlib.import_module(f"{__package__}.{name}").connect(url, loop, local_cpu_backend)
