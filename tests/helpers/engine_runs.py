"""Runs steps of requests (one_engine.py) on engines of engine_host.py and a KV store."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import json
import os
import subprocess
import sys
import uuid
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Listener
from pathlib import Path
from typing import Any

from kv_stores import Server
from launch_harness import PACKAGE, REPOSITORY

START_S = 240.0
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


@functools.cache
def host() -> subprocess.Popen[str]:
    """The process that engines are forks of; it ends, and they with it, when its stdin is closed."""
    settings = {
        "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests/helpers'}", "LMCACHE_TRACK_USAGE": "false",
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_HOST_IP": "127.0.0.1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, str(REPOSITORY / "tests/helpers/engine_host.py")], text=True, stdin=subprocess.PIPE,
        env={**os.environ, **settings}, stdout=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    atexit.register(process.communicate)
    return process


class Engine:
    """One engine on ``model`` that answers steps (see one_engine.py) until the ``with`` block ends.

    Args:
        folder: for its log.
        arguments: as for ``vllm serve``.

    Raises:
        EngineError: it does not start.
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
        settings = {
            "LMCACHE_MAX_LOCAL_CPU_SIZE": "0.5", "DISAGG_KV_LOAD": "always",
            "LMCACHE_CONFIG_FILE": str(PACKAGE / "configs" / f"lmcache-config-{server.kind}.yaml"),
            "DISAGG_SHM_URL" if server.kind == "shm" else "LMCACHE_REMOTE_URL": server.url,
        }  # fmt: skip
        self._log = folder / f"{name}.log"
        self._log.touch()
        spec = {
            "log": str(self._log), "address": f"\0engine-{name}", "environment": {**settings, **(environment or {})},
            "arguments": ["--model", str(model), *ARGUMENTS, "--kv-transfer-config", json.dumps(connector), *arguments],
        }  # fmt: skip
        with Listener(spec["address"], "AF_UNIX") as listener:
            stdin = host().stdin
            assert stdin is not None
            stdin.write(json.dumps(spec) + "\n")
            stdin.flush()
            listener._listener._socket.settimeout(START_S)
            self._connection = listener.accept()
        self._process = self._answer(START_S)

    def _answer(self, seconds: float) -> Any:
        """What it says next. Raises EngineError: it has ended, or says nothing in time."""
        try:
            if self._connection.poll(seconds):
                return self._connection.recv()
            ended = f"no answer within {seconds} s"
        except EOFError:
            ended = "it has ended"
        raise EngineError(f"{ended}\n{self._log.read_text()}")

    def run(self, steps: Sequence[Any]) -> list[Step]:
        """The answers to ``steps``.

        Raises:
            EngineError: it has ended, or does not answer in time.
        """
        with contextlib.suppress(BrokenPipeError):  # its end is told below
            self._connection.send(list(steps))
        said = self._answer(RUN_S)
        return [Step([Answer(**r) for r in s["requests"]], s["loaded"], s["states"]) for s in said]

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        """End it. Raises EngineError: it ended with an error."""
        try:
            with contextlib.suppress(BrokenPipeError):
                self._connection.send("end")
            assert self._answer(END_S) == "ended"
        finally:
            self._connection.close()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process, 9)


def run_engine(*arguments: Any, steps: Sequence[Any]) -> list[Step]:
    """The answers of an engine (see Engine) that is started for these steps alone."""
    with Engine(*arguments) as engine:
        return engine.run(steps)
