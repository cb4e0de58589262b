"""Stacks of real servers, which all tests of this folder share: starting one takes half a minute."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from launch_harness import REPOSITORY, free_ports, wait_until
from stack_harness import MAX_MODEL_LEN, MODEL, START_S, Answer, Redis, Stack, answers_health, ask_all, matrix, process


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Two servers of two ranks take 12 GB at their start: they go before the shared stacks, 7 GB each up to the end."""
    items.sort(key=lambda item: getattr(item, "originalname", "") != "test_the_example_passes")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / MODEL
    builder = "disagg_prefill_lmcache_v1.measure.tiny_model"
    subprocess.run([sys.executable, "-m", builder, "--output", str(folder)], check=True, cwd=REPOSITORY)
    return folder


@pytest.fixture(scope="session", autouse=True)
def coming_reference(request, tmp_path_factory) -> Iterator[Future[list[Answer]] | None]:
    """The reference, begun with the first test here: those before its first use keep one core busy, as it does."""
    if not any("reference" in getattr(item, "fixturenames", ()) for item in request.session.items):
        yield None
        return
    folder, log = request.getfixturevalue("model_folder"), tmp_path_factory.mktemp("plain") / "plain.log"
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(plain_answers, folder, log)


@pytest.fixture(scope="session")
def reference(coming_reference) -> list[Answer]:
    """What one plain vLLM server answers to the matrix."""
    return coming_reference.result()


def plain_answers(model_folder: Path, log: Path) -> list[Answer]:
    port = free_ports(1)[0]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model_folder),
        "--served-model-name", MODEL, "--port", str(port), "--host", "127.0.0.1", "--dtype", "float32",
        "--enforce-eager", "--max-model-len", str(MAX_MODEL_LEN), "--max-num-batched-tokens", str(MAX_MODEL_LEN),
    ]  # fmt: skip
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    with process(command, log, HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", **environment) as child:
        wait_until(
            lambda: child.poll() is not None or answers_health(port), f"plain vLLM answers (log: {log})", START_S
        )
        assert child.poll() is None, log.read_text()[-3000:]
        # One at a time, each in one step: a partly prefilled request with a seed ends a plain vLLM on the CPU.
        return ask_all(port, matrix(), 1)


@pytest.fixture(scope="session")
def serving(model_folder, tmp_path_factory) -> Iterator[Callable[..., Stack]]:
    """Gives the stack of a name: started with these flags when it is wanted first or was ended by a test."""
    stacks: dict[str, Stack] = {}
    with contextlib.ExitStack() as cleanup:

        def get(name: str, *flags: str) -> Stack:
            if name not in stacks or stacks[name].child.poll() is not None:
                stack = Stack(tmp_path_factory.mktemp(name), model_folder, *flags)
                stacks[name] = cleanup.enter_context(stack.serving())
            return stacks[name]

        yield get


@pytest.fixture
def lm_stack(serving) -> Stack:
    return serving("lm")


@pytest.fixture(scope="session")
def redis_store() -> Iterator[Redis]:
    if not shutil.which("redis-server"):
        pytest.skip("redis-server is not installed")
    redis = Redis()
    yield redis
    redis.kill()


@pytest.fixture
def redis_stack(serving, redis_store) -> Stack:
    return serving("redis", "--backend=redis", f"--redis-url=redis://:s3cret@127.0.0.1:{redis_store.port}")


@pytest.fixture(params=["lm", "redis"])
def stack(request) -> Stack:
    return request.getfixturevalue(f"{request.param}_stack")
