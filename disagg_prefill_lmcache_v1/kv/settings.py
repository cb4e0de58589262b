"""What the KV connector reads from the environment: ``DISAGG_KV_*``. Standard library alone.

Both servers' processes read it: the launcher sets these variables, and so may anybody who starts vLLM by hand.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from disagg_prefill_lmcache_v1.settings import resolve, setting

PREFIX = "DISAGG_KV_"
MODES = ("auto", "always", "never")


@dataclass(frozen=True)
class KVSettings:
    """Raises SettingsError, a ValueError that names the variable and what is allowed."""

    load: str = setting(
        "auto", "load KV that the store has, or compute it again; auto: what was quicker", choices=MODES, flag=False
    )
    async_load: str = setting(
        "auto",
        "load beside the engine's steps; auto: on cuda, and with asynchronous scheduling",
        choices=MODES,
        flag=False,
    )
    copy: str = setting(
        "auto",
        "who copies between KV cache and chunks: this project or LMCache (stock)",
        choices=("auto", "own", "stock"),
        flag=False,
    )
    copy_threads: int = setting(
        min(2, os.cpu_count() or 1),
        "copies at a time in host memory",
        low=1,
        high=256,
        shown="2, or 1 on one core",
        flag=False,
    )
    wait_timeout: float = setting(
        10.0, "seconds that a prefill answer waits for its KV", above=0, high=3600, flag=False
    )
    visibility: str = setting(
        "", "abstract Unix socket (@name) from engine to API server; empty: nothing waits", flag=False
    )


def from_environment() -> KVSettings:
    """The settings as the environment has them now."""
    return KVSettings(**resolve(KVSettings, {}, os.environ, prefix=PREFIX).values)
