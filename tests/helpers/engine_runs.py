"""Runs one_engine.py against a KV store that is started here."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

from kv_stores import Server
from launch_harness import PACKAGE, REPOSITORY

RUN_S = 420.0
ARGUMENTS = ["--dtype", "float32", "--enforce-eager", "--max-num-batched-tokens", "2048", "--max-model-len", "4096"]


@dataclasses.dataclass
class Answer:
    """Of one request: ``cached`` as vLLM counts it."""

    tokens: list[int]
    cached: int


@dataclasses.dataclass
class Step:
    """``loaded``: tokens that the workers report as loaded from the store, of all requests of the step."""

    requests: list[Answer]
    loaded: int
    states: list[str]


class EngineError(Exception):
    """The engine did not run to its end; the text is its log."""


def run_engine(
    model: Path,
    server: Server,
    steps: list[Any],
    folder: Path,
    arguments: list[str] = (),  # type: ignore[assignment]
    environment: dict[str, str] | None = None,
) -> list[Step]:
    """Start an engine on ``model``, let it answer ``steps`` (see one_engine.py), end it.

    Raises:
        EngineError: it ended in another way, with its log as the text.
    """
    name = uuid.uuid4().hex[:8]
    connector = {
        "kv_connector": "LMCacheDisaggConnectorV1",
        "kv_connector_module_path": "disagg_prefill_lmcache_v1.kv.connector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"discard_partial_chunks": False, "lmcache_rpc_port": f"engine-{name}"},
    }
    words = ["--model", str(model), *ARGUMENTS, "--kv-transfer-config", json.dumps(connector), *arguments]
    spec, answers, log = (folder / f"{name}.{end}" for end in ("spec.json", "answers.json", "log"))
    spec.write_text(json.dumps({"arguments": words, "steps": steps}))
    config = PACKAGE / "configs" / f"lmcache-config-{server.kind}.yaml"
    settings = {
        "PYTHONPATH": str(REPOSITORY), "LMCACHE_CONFIG_FILE": str(config), "LMCACHE_MAX_LOCAL_CPU_SIZE": "0.5",
        "DISAGG_SHM_URL" if server.kind == "shm" else "LMCACHE_REMOTE_URL": server.url, "DISAGG_KV_LOAD": "always",
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1", "LMCACHE_TRACK_USAGE": "false",
    }  # fmt: skip
    command = [sys.executable, str(REPOSITORY / "tests/helpers/one_engine.py"), str(spec), str(answers)]
    with log.open("w") as out:
        child = subprocess.Popen(
            command, env={**os.environ, **settings, **(environment or {})}, stdout=out, stderr=out,
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            status = child.wait(RUN_S)
        except subprocess.TimeoutExpired:
            status = "no end"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, 9)
            child.wait()
    if status != 0 or not answers.exists():
        raise EngineError(f"status {status}\n" + log.read_text())
    said = json.loads(answers.read_text())
    return [Step([Answer(**r) for r in s["requests"]], s["loaded"], s["states"]) for s in said]
