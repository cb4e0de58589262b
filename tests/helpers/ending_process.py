"""A process as vLLM starts it for an engine, whose start fails while a thread that is no daemon goes on."""

from __future__ import annotations

import contextlib
import threading

from disagg_prefill_lmcache_v1.kv import ending


def fail_at_start(guarded: bool) -> None:
    ending.GRACE_S = 0.2
    threading.Thread(target=threading.Event().wait).start()
    with ending.process_ends_on_error() if guarded else contextlib.nullcontext():
        raise RuntimeError("the connector cannot start")
