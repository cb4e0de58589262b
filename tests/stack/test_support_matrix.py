"""The support matrix of docs/support-matrix.md, row by row, on real engines: one stores, another one loads.

Small random models (tests/helpers/matrix_models.py); about 5 s a row on 2 cores.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import uuid
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

import pytest
from launch_harness import EXAMPLE, PACKAGE, REPOSITORY

pytest.importorskip("vllm", reason="vLLM is not installed: the real engine is what is tested")
pytest.importorskip("lmcache", reason="LMCache is not installed: the real engine is what is tested")

import matrix_models
from kv_stores import Server

START_S = 240.0
WORKS = "works"
RECURRENT = "models with Mamba or linear attention layers are not supported"
ENCODER = {"max-model-len": 448, "max-num-batched-tokens": 2048}
SHAPES = "layers of different shapes cannot be moved"
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}
DRAFT = {"method": "draft_model", "num_speculative_tokens": 2}
# Row of the page -> model, further arguments, outcome: WORKS, or what the server says when it does not start.
ROWS: dict[str, tuple[str, dict[str, Any], str]] = {
    "grouped-query attention, head size 64": ("gqa", {}, WORKS),
    "multi-query attention": ("mqa", {}, WORKS),
    **{f"head size {size}": (f"head{size}", {}, WORKS) for size in (80, 96, 128, 256)},
    "tied embeddings": ("tied", {}, WORKS),
    "mixture of experts": ("moe", {}, WORKS),
    "sliding window in all layers": ("sliding", {}, WORKS),
    "hybrid attention (sliding and full)": ("gemma3", {}, WORKS),
    "hybrid attention with sinks": ("gptoss", {}, WORKS),
    "n-gram speculation": ("gqa", {"speculative-config": NGRAM}, WORKS),
    "draft model on both servers": ("gqa", {"speculative-config": {**DRAFT, "model": "gqa"}}, WORKS),
    "draft model of another KV shape": ("gqa", {"speculative-config": {**DRAFT, "model": "mqa"}}, SHAPES),
    "layers of another KV shape than the configuration's": ("odd", {}, SHAPES),
    "int8 weights and activations (compressed-tensors)": ("w8a8", {}, WORKS),
    "AWQ, 4 bits": ("awq", {"dtype": "bfloat16"}, WORKS),
    "GPTQ, 4 bits": ("gptq", {"dtype": "bfloat16"}, WORKS),
    "images": ("idefics3", {}, WORKS),
    "fp8 KV cache": ("gqa", {"kv-cache-dtype": "fp8"}, "--kv-cache-dtype fp8 is not supported on cpu: use auto"),
    "MLA": ("mla", {}, "MLA models are not supported on cpu"),
    "Mamba": ("mamba", {}, RECURRENT),
    "linear attention beside full attention": ("linear", {}, RECURRENT),
    "encoder-decoder": ("encoder", ENCODER, "encoder-decoder models are not supported"),
}  # fmt: skip
# The same of the launcher, which refuses these before a server starts: arguments, outcome.
LAUNCHED: dict[str, tuple[list[str], str]] = {
    "pipeline parallel": (["--pipeline-parallel-size", "2"], "--pipeline-parallel-size 2 is not supported"),
    "data parallel": (["--data-parallel-size", "2"], "--data-parallel-size 2 is not supported"),
}
NEED_A_TOKENIZER = ("idefics3", "encoder")


class Engines:
    """Starts engines; see engine_host.py."""

    def __init__(self, folder: Path, store: Server) -> None:
        self._folder = folder
        settings = {
            "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests/helpers'}",
            "LMCACHE_CONFIG_FILE": str(PACKAGE / "configs/lmcache-config-lm.yaml"),
            "LMCACHE_REMOTE_URL": store.url, "LMCACHE_MAX_LOCAL_CPU_SIZE": "0.1", "LMCACHE_TRACK_USAGE": "false",
            "DISAGG_KV_LOAD": "always", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_HOST_IP": "127.0.0.1", "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        self._host = subprocess.Popen(
            [sys.executable, str(REPOSITORY / "tests/helpers/engine_host.py")], text=True, stdin=subprocess.PIPE,
            env={**os.environ, **settings}, stdout=subprocess.DEVNULL, stderr=(folder / "host.log").open("w"),
        )  # fmt: skip

    def start(self, kind: str, role: str, arguments: dict[str, Any]) -> tuple[Connection, str]:
        """An engine and why it does not start ("" if it does)."""
        name = uuid.uuid4().hex[:8]
        connector = {
            "kv_connector": "LMCacheDisaggConnectorV1", "kv_role": role, "kv_load_failure_policy": "recompute",
            "kv_connector_module_path": "disagg_prefill_lmcache_v1.kv.connector",
            "kv_connector_extra_config": {"discard_partial_chunks": False, "lmcache_rpc_port": name},
        }  # fmt: skip
        if "speculative-config" in arguments and "model" in arguments["speculative-config"]:
            speculative = arguments["speculative-config"]
            draft = {**speculative, "model": str(self._folder / speculative["model"])}
            arguments = {**arguments, "speculative-config": draft}
        log = self._folder / f"{name}.log"
        options = {
            "model": self._folder / kind, "dtype": "float32", "max-num-batched-tokens": 512, "max-model-len": 2048,
            "kv-cache-memory-bytes": 64 << 20, "block-size": 32, "kv-transfer-config": connector, **arguments,
        }  # fmt: skip
        words = ["--enforce-eager", *(["--skip-tokenizer-init"] if kind not in NEED_A_TOKENIZER else [])]
        for option, value in options.items():
            words += [f"--{option}", json.dumps(value) if isinstance(value, dict) else str(value)]
        with Listener(f"\0matrix-{name}", "AF_UNIX") as listener:
            spec = {"log": str(log), "address": f"\0matrix-{name}", "arguments": words, "kind": kind}
            self._host.stdin.write(json.dumps({**spec, "folder": str(self._folder / kind)}) + "\n")
            self._host.stdin.flush()
            listener._listener._socket.settimeout(START_S)
            connection = listener.accept()
        return connection, self.answer(connection, log)

    @staticmethod
    def answer(connection: Connection, log: Path | None = None) -> Any:
        assert connection.poll(START_S), "no answer" + (f"\n{log.read_text()[-3000:]}" if log else "")
        try:
            return connection.recv()
        except EOFError:
            raise AssertionError(
                "the engine's process has ended" + (f"\n{log.read_text()[-3000:]}" if log else "")
            ) from None

    def close(self) -> None:
        self._host.stdin.close()  # engines that are left end with it
        self._host.wait(60)


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    store = Server("lm", size="2gb")
    engines = Engines(tmp_path_factory.mktemp("matrix"), store)
    for kind in ("gqa", "mqa"):  # draft models, too
        connection, problem = engines.start(kind, "kv_producer", {})
        assert problem == ""
        connection.send("end")
    yield engines
    engines.close()
    store.stop()


def prompts(seed: int = 1) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    shorter, longer, longest = ([rng.randrange(300, 1000) for _ in range(n)] for n in (40, 300, 700))
    return [{"prompt": p} for p in (shorter, longer, longest, [7, *longest[1:500], *[5] * 60, *longest[560:]])]


def requests_to(kind: str) -> list[dict[str, Any]]:
    """Of a model that sees: one text with two images, another one, and one without."""
    asked = prompts()
    if kind != "idefics3":
        return asked
    before, after = asked[1]["prompt"][:100], asked[1]["prompt"][100:]
    asked[2]["prompt"][20] = matrix_models.IMAGE_TOKEN
    seen = [{"prompt": [*before, matrix_models.IMAGE_TOKEN, *after], "image": image} for image in (1, 2)]
    return [*seen, {**asked[2], "image": 1}, asked[1]]


def reusable(request: dict[str, Any]) -> int:
    more = matrix_models.IMAGE_TOKENS - 1 if "image" in request else 0
    return len(request["prompt"]) + more - 1


@pytest.mark.parametrize("row", ROWS)
def test_row(engines, row):
    kind, arguments, outcome = ROWS[row]
    first, problem = engines.start(kind, "kv_producer", arguments)
    with first:
        if outcome != WORKS:
            assert outcome in problem
            return
        assert problem == ""
        asked = requests_to(kind)
        first.send(asked)
        computed, states = engines.answer(first)
        assert states == ["stored"] * len(computed)
        assert len(set(map(tuple, computed))) == len(computed), "answers that do not depend on the prompt prove nothing"
        second, problem = engines.start(kind, "kv_consumer", arguments)
        with second:
            assert problem == ""
            second.send(asked)
            loaded, reused = engines.answer(second)
            if "dtype" in arguments:  # bfloat16: on some CPUs another batch may bring another token
                assert sum(one[0] == other[0] for one, other in zip(loaded, computed, strict=True)) >= len(asked) - 1
            else:
                assert loaded == computed
            assert reused == [reusable(request) for request in asked]
            second.send("end")
        first.send("end")


@pytest.mark.parametrize("row", LAUNCHED)
def test_row_of_the_launcher(row, tmp_path):
    words, outcome = LAUNCHED[row]
    command = ["bash", str(PACKAGE / EXAMPLE), "--device", "cpu", "--run-dir", str(tmp_path), "--", *words]
    environment = {**os.environ, "DISAGG_PYTHON": sys.executable}
    run = subprocess.run(command, capture_output=True, text=True, timeout=START_S, env=environment)
    assert run.returncode == 1
    assert outcome in run.stderr


def test_a_draft_model_on_the_decoder_alone_reuses_nothing_and_says_so(engines):
    """Its layers are part of each chunk, so keys hold it: what was stored without is not taken for it."""
    draft = {"speculative-config": {**DRAFT, "model": "gqa"}}
    answers, asked = [], prompts(seed=2)  # a row above has stored the others with a draft model
    for role, arguments in (("kv_producer", {}), ("kv_consumer", draft)):
        engine, problem = engines.start("gqa", role, arguments)
        with engine:
            assert problem == ""
            engine.send(asked)
            answers.append(engines.answer(engine))
            engine.send("end")
    assert answers[0][0] == answers[1][0]
    assert answers[1][1] == [0] * len(asked)


def test_the_page_has_these_rows():
    page = (REPOSITORY / "docs/support-matrix.md").read_text()
    rows = dict(re.findall(r"^\| ([^|]+?) \| (works|`[^`]+`)[^|]*\|", page, re.MULTILINE))
    outcomes = {row: outcome for row, (*_, outcome) in [*ROWS.items(), *LAUNCHED.items()]}
    assert rows == {row: outcome if outcome == WORKS else f"`{outcome}`" for row, outcome in outcomes.items()}
