"""The line before the load that the KV server cannot hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from launch_harness import EXAMPLE, Launch

from disagg_prefill_lmcache_v1.launch import load_size
from disagg_prefill_lmcache_v1.launch.plan import Plan, make_plan
from disagg_prefill_lmcache_v1.launch.settings import Settings, read_configuration
from disagg_prefill_lmcache_v1.memory import available_memory

# Llama 3.1 8B
LLAMA = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096}
KIB = 1 << 10
GIB = 1 << 30


def plan_of(folder: Path, config: dict[str, Any] | None, *flags: str, **environ: str) -> Plan[Settings]:
    """With a model's directory, or without one the device's model."""
    if config is not None:
        (folder / "model").mkdir(exist_ok=True)
        (folder / "model" / "config.json").write_text(json.dumps(config))
        flags = (f"--model={folder / 'model'}", *flags)
    argv = [f"--run-dir={folder}", *flags]
    return make_plan(read_configuration(Settings, argv, environ, prog="x", description="x"), environ)


@pytest.mark.parametrize(
    ("config", "flags", "size"),
    [
        (LLAMA, ["--device=cuda"], 128 * KIB),
        (LLAMA, ["--device=cpu"], 256 * KIB),  # its profile takes float32
        (LLAMA, ["--device=cpu", "--", "--dtype=bfloat16"], 128 * KIB),
        (LLAMA, ["--device=cuda", "--", "--kv-cache-dtype", "fp8"], 64 * KIB),
        ({**LLAMA, "num_key_value_heads": None}, ["--device=cuda"], 512 * KIB),
        ({**LLAMA, "head_dim": 64}, ["--device=cuda"], 64 * KIB),
        ({"text_config": LLAMA}, ["--device=cuda"], 128 * KIB),
        ({**LLAMA, "num_key_value_heads": 1}, ["--device=cpu", "--tensor-parallel-size=2"], 64 * KIB),
        ({**LLAMA, "kv_lora_rank": 512, "qk_rope_head_dim": 64}, ["--device=cuda"], 32 * 2 * 576),
        ({**LLAMA, "layer_types": ["full_attention", "sliding_attention"]}, ["--device=cuda"], 128 * KIB),
        ({**LLAMA, "layer_types": ["full_attention", "linear_attention"]}, ["--device=cuda"], None),
        ({**LLAMA, "mamba_d_state": 16}, ["--device=cuda"], None),
        ({"num_hidden_layers": 32}, ["--device=cuda"], None),
        ({**LLAMA, "num_hidden_layers": "many"}, ["--device=cuda"], None),
        ([], ["--device=cuda"], None),
    ],
)
def test_a_token_takes_what_the_models_configuration_says(
    tmp_path: Path, config: dict[str, Any], flags: list[str], size: int | None
) -> None:
    assert load_size.bytes_per_token(plan_of(tmp_path, config, *flags)) == size


def test_a_model_of_the_hub_counts_only_if_it_is_here(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, None, "--device=cuda", HF_HUB_CACHE=str(tmp_path))
    assert load_size.bytes_per_token(plan) is None
    assert load_size.load_warning(plan, 10**6, 8000) == ""
    cache = tmp_path / "models--meta-llama--Llama-3.1-8B-Instruct"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("abc")
    (cache / "snapshots" / "abc").mkdir(parents=True)
    (cache / "snapshots" / "abc" / "config.json").write_text(json.dumps(LLAMA))
    assert load_size.bytes_per_token(plan) == 128 * KIB


def test_the_load_of_a_card_and_the_backends_that_hold_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """100 prompts of 8,000 tokens are 97.7 GiB."""
    monkeypatch.setattr(load_size, "available_memory", lambda: 500 * GIB)

    def told(*flags: str, **environ: str) -> str:
        return load_size.load_warning(plan_of(tmp_path, LLAMA, "--device=cuda", *flags, **environ), 100, 8000)

    line = told(KV_LM_SIZE="64gb", REDIS_MAXMEMORY="100gb", KV_SHM_SIZE="98gb", KV_MP_SIZE="97gb")
    assert line.startswith(
        "warning: the KV cache of the load is 97.7 GiB (100 prompts of 8,000 tokens, 128 KiB a token)"
    )
    assert "--backend lm holds 64.0 GiB (KV_LM_SIZE): what was not used for longest is dropped" in line
    assert line.endswith("; --backend redis or --backend shm holds it")
    assert "\n" not in line
    assert told("--backend=redis", REDIS_MAXMEMORY="98gb") == ""
    assert "--backend shm holds 16.0 GiB (KV_SHM_SIZE)" in told("--backend=shm")
    assert "--backend mp holds 16.0 GiB (KV_MP_SIZE)" in told("--backend=mp")
    assert told("--backend=nixl") == "", "it keeps nothing"
    line = told(KV_LM_SIZE="64gb")
    assert line.endswith("all can be told to hold more: lm KV_LM_SIZE, redis REDIS_MAXMEMORY, shm KV_SHM_SIZE, mp "
                         "KV_MP_SIZE")  # fmt: skip
    assert told("--backend=redis", "--redis-url=redis://db:1") == "", "nobody knows how much that one holds"
    assert told(KV_LM_SIZE="much") == "", "the server will refuse it"
    monkeypatch.setattr(load_size, "available_memory", lambda: 90 * GIB)
    assert told(KV_LM_SIZE="64gb").endswith("; this machine has 90.0 GiB free: take fewer or shorter prompts")


def test_a_load_that_comes_faster_than_the_backend_takes_it(tmp_path: Path) -> None:
    """3.6 prompts a second of 8,000 tokens are 3.8 GB/s."""

    def told(rate: float, *flags: str) -> str:
        return load_size.rate_warning(plan_of(tmp_path, LLAMA, "--device=cuda", *flags), rate, 8000)

    line = told(3.6)
    assert line.startswith("warning: the load brings 3.8 GB of KV cache a second, --backend lm takes about 1.2: ")
    assert told(1.1) == ""
    assert told(1.9, "--backend=redis") == ""
    assert "--backend redis takes about 2: " in told(2, "--backend=redis")
    for backend in ("shm", "nixl"):
        assert told(100, f"--backend={backend}") == ""


def test_without_a_size_lm_holds_four_fifths_of_what_is_free(tmp_path: Path) -> None:
    capacity = plan_of(tmp_path, LLAMA, "--device=cpu").backend.capacity
    assert capacity == pytest.approx(available_memory() * 0.8, rel=0.3)


@pytest.mark.parametrize(("flags", "says"), [([], True), (["--input-len=100"], False), (["--num-prompts=0"], False)])
def test_the_example_tells_it_before_it_starts_anything(tmp_path: Path, flags: list[str], says: bool) -> None:
    launch = Launch(tmp_path)
    (launch.model / "config.json").write_text(json.dumps(LLAMA))
    arguments = launch.arguments("--backend=shm", "--num-prompts=8", "--input-len=4000", *flags)
    done = launch.run(EXAMPLE, *arguments, KV_SHM_SIZE="1gb")  # 256 KiB a token: 7.8 GiB
    assert done.returncode == 0, done.stderr
    line = "[disagg] warning: the KV cache of the load is 7.8 GiB"
    assert (line in done.stderr) == says
    if says:
        assert done.stderr.index(line) < done.stderr.index("starting kv-server")
