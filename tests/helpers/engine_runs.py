"""Runs one_engine.py on a KV store."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kv_stores import Server
from launch_harness import PACKAGE, REPOSITORY

RUN_S = 420.0
END_S = 60.0
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
    """The engine did not do what was asked; the text is its log."""


class Engine:
    """One engine on ``model`` that answers steps (see one_engine.py) until the ``with`` block ends.

    Args:
        folder: for its log and its answers.
        arguments: as for ``vllm serve``.
    """

    def __init__(
        self,
        model: Path,
        server: Server,
        folder: Path,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        name = uuid.uuid4().hex[:8]
        connector = {
            "kv_connector": "LMCacheDisaggConnectorV1",
            "kv_connector_module_path": "disagg_prefill_lmcache_v1.kv.connector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"discard_partial_chunks": False, "lmcache_rpc_port": f"engine-{name}"},
        }
        words = ["--model", str(model), *ARGUMENTS, "--kv-transfer-config", json.dumps(connector), *arguments]
        settings = {
            "PYTHONPATH": str(REPOSITORY), "LMCACHE_MAX_LOCAL_CPU_SIZE": "0.5", "DISAGG_KV_LOAD": "always",
            "LMCACHE_CONFIG_FILE": str(PACKAGE / "configs" / f"lmcache-config-{server.kind}.yaml"),
            "DISAGG_SHM_URL" if server.kind == "shm" else "LMCACHE_REMOTE_URL": server.url,
            "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1", "LMCACHE_TRACK_USAGE": "false",
        }  # fmt: skip
        self._folder, self._runs = folder, itertools.count()
        self._log = folder / f"{name}.log"
        with self._log.open("w") as out:
            self._child = subprocess.Popen(
                [sys.executable, str(REPOSITORY / "tests/helpers/one_engine.py"), *words], text=True,
                env={**os.environ, **settings, **(environment or {})}, stdin=subprocess.PIPE, stdout=out, stderr=out,
                start_new_session=True,
            )  # fmt: skip

    def run(self, steps: Sequence[Any]) -> list[Step]:
        """The answers to ``steps``.

        Raises:
            EngineError: it has ended, or does not answer in time.
        """
        assert self._child.stdin is not None
        file = self._folder / f"{self._log.stem}-{next(self._runs)}.json"
        with contextlib.suppress(BrokenPipeError):  # its end is told below
            self._child.stdin.write(json.dumps({"steps": steps, "answers": str(file)}) + "\n")
            self._child.stdin.flush()
        deadline = time.monotonic() + RUN_S
        while not file.exists():
            if self._child.poll() is not None or time.monotonic() > deadline:
                raise EngineError(f"status {self._child.poll()}\n" + self._log.read_text())
            time.sleep(0.02)
        said = json.loads(file.read_text())
        return [Step([Answer(**r) for r in s["requests"]], s["loaded"], s["states"]) for s in said]

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        """End it. Raises EngineError: it ended with an error."""
        assert self._child.stdin is not None
        try:
            self._child.stdin.close()
            status = self._child.wait(END_S)
        except subprocess.TimeoutExpired:
            status = "no end"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._child.pid, 9)
            self._child.wait()
        if status != 0:
            raise EngineError(f"status {status}\n" + self._log.read_text())


def run_engine(*arguments: Any, steps: Sequence[Any]) -> list[Step]:
    """The answers of an engine (see Engine) that is started for these steps alone."""
    with Engine(*arguments) as engine:
        return engine.run(steps)
