"""Loads in and beside the engine's steps, on a real engine: every third one fails, and every answer stays right.

About 40 s for each run on 2 cores.
"""

from __future__ import annotations

import json
import random

import pytest
from launch_harness import REPOSITORY

pytest.importorskip("vllm", reason="vLLM is not installed: the real engine is what is tested")
pytest.importorskip("lmcache", reason="LMCache is not installed: the real engine is what is tested")

from engine_runs import run_engine
from kv_stores import Server

from disagg_prefill_lmcache_v1.measure import tiny_model

MODEL = REPOSITORY / ".models" / "tiny-llama"
LENGTHS = (5, 31, 33, 64, 65, 128, 129, 200, 257, 300, 384, 500)  # around the borders of blocks (32) and chunks (256)


@pytest.fixture(scope="module")
def store():
    server = Server("shm", "256mb")
    yield server
    server.stop()


@pytest.mark.parametrize(("async_load", "failing"), [("always", ""), ("always", "part"), ("never", "whole")])
def test_answers_are_right_whatever_becomes_of_the_loads(store, tmp_path, async_load, failing):
    tiny_model.build(MODEL)
    rng = random.Random(f"{async_load} {failing}")
    requests = [{"prompt": [rng.randrange(300, 1000) for _ in range(length)]} for length in LENGTHS]
    connector = {
        "kv_connector": "LMCacheDisaggConnectorV1", "kv_role": "kv_both", "kv_load_failure_policy": "recompute",
        "kv_connector_module_path": "failing_connector" if failing else "disagg_prefill_lmcache_v1.kv.connector",
        "kv_connector_extra_config": {"discard_partial_chunks": False, "lmcache_rpc_port": tmp_path.name},
    }  # fmt: skip
    again = ["reset", requests, "reset", requests, "reset", *([request] for request in requests[-3:])]
    computed, *loads = run_engine(
        MODEL, store, tmp_path, ["--kv-transfer-config", json.dumps(connector)],
        {"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests/helpers'}", "DISAGG_KV_ASYNC_LOAD": async_load,
         "FAILING_LOADS": failing}, steps=[requests, *again],
    )  # fmt: skip
    (log,) = (path.read_text() for path in tmp_path.glob("*.log"))
    assert ("beside the engine's steps" in log) is (async_load == "always")
    assert len(computed.requests) == len(LENGTHS)
    answers = [answer.tokens for answer in computed.requests]
    assert [answer.tokens for answer in loads[0].requests] == answers
    assert [answer.tokens for answer in loads[1].requests] == answers
    assert [step.requests[0].tokens for step in loads[2:]] == answers[-3:]
    if failing:
        assert log.count("FAILED LOAD") >= 8
    else:
        assert [step.loaded for step in loads[:2]] == [sum(LENGTHS) - len(LENGTHS)] * 2
        assert [answer.cached for answer in loads[0].requests] == [length - 1 for length in LENGTHS]
