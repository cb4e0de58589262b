"""Backend mp on the real stack: LMCache's multi-process server freezes in the middle of a load.

Takes about 3 minutes on 2 cores: python -m pytest tests/stack/test_mp.py
"""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

import pytest
from launch_harness import wait_until
from stack_harness import Answer, Load, Stack

pytest.importorskip("vllm", reason="vLLM is not installed: the real stack is what is tested")
pytest.importorskip("lmcache", reason="LMCache is not installed: its server is what freezes")

BACK_WITHIN_S = 60.0


def kv_server_group(stack: Stack) -> int:
    """Process group of the stack's KV server."""
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        words = []
        with contextlib.suppress(OSError):  # it may just have ended
            words = entry.read_bytes().split(b"\0")
        if b"disagg_prefill_lmcache_v1.kv.mp_server" in words and str(stack.kv).encode() in words:
            return os.getpgid(int(entry.parent.name))
    raise AssertionError("no KV server")


def test_a_frozen_kv_server_costs_reuse_and_nothing_else(model_folder, tmp_path, reference):
    with Stack(tmp_path, model_folder, "--backend=mp").serving() as stack:
        freeze(stack, reference)
        assert stack.child.poll() is None


def freeze(stack: Stack, reference: list[Answer]) -> None:
    group = kv_server_group(stack)
    with Load(stack, reference) as load:
        load.wait_for(8)
        wait_until(lambda: stack.metric("disagg_kv_degraded") == 0, "all of the server's start is over", 60)
        os.killpg(group, signal.SIGSTOP)
        try:
            wait_until(lambda: stack.metric("disagg_kv_degraded") == 1, "the gauge shows the frozen server", 60)
            load.wait_for(8)
        finally:
            os.killpg(group, signal.SIGCONT)
        wait_until(lambda: stack.metric("disagg_kv_degraded") == 0, "the gauge shows its return", BACK_WITHIN_S)
        # The gauge tells of the prefiller; the decoder finds the server by a heartbeat of its own. And by now it has
        # the load's prompts in its own prefix cache: only a fresh one has to be loaded.
        loaded = stack.metric("disagg_kv_loaded_tokens_total", stack.decoder)

        def loads_again() -> bool:
            load.fresh()
            return stack.metric("disagg_kv_loaded_tokens_total", stack.decoder) > loaded

        wait_until(loads_again, "the decoder loads again", BACK_WITHIN_S)
    assert load.wrong == []
