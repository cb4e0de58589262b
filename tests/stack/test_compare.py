"""A step of a comparison on real servers: vLLM's own benchmark, joined with what the proxy tells."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from launch_harness import REPOSITORY
from stack_harness import MODEL, Stack

pytest.importorskip("vllm", reason="vLLM is not installed: its benchmark is what is tested")
pytest.importorskip("lmcache", reason="LMCache is not installed: the real stack is what is tested")


def test_vllms_benchmark_measures_the_pair(lm_stack: Stack, model_folder: Path) -> None:
    done = subprocess.run(
        [
            sys.executable, "-m", "disagg_prefill_lmcache_v1.measure.compare", "--step", "pair",
            f"--proxy-url=http://127.0.0.1:{lm_stack.proxy}", f"--run-dir={lm_stack.run_dir}", f"--model={MODEL}",
            f"--tokenizer={model_folder}", "--num-prompts=5", "--input-len=300", "--output-len=4",
            "--request-rate=5,10", f"--first-block={random.randrange(2**40)}", "--goodput", "ttft:600000",
        ],
        cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    arm = json.loads((lm_stack.run_dir / "compare" / "arm-pair.json").read_text())
    assert [point["request_rate"] for point in arm["points"]] == [5, 10]
    for point in arm["points"]:
        assert (point["completed"], point["failed"]) == (5, 0)
        assert point["goodput"] == pytest.approx(point["request_throughput"])
        for request in point["requests"]:
            assert (request["input_tokens"], request["output_tokens"]) == (300, 4)
            assert request["reused_tokens"] == 299  # prompts of its own at each rate, all by way of the store
            assert {"prefill", "client"} <= request["parts"].keys()
            assert sum(request["parts"].values()) == pytest.approx(request["ttft_ms"], rel=0.02)
