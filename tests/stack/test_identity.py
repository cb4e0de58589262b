"""KV is taken only by those whose it is: adapters, salts, hostile requests and shared prefixes, on a real engine.

One engine stores and loads (tests/helpers/one_engine.py); what a request should answer is what the same engine computes
under a salt that nobody else has. Takes about 4 minutes on 2 cores.
"""

from __future__ import annotations

import itertools
import random

import lora_adapter
import pytest
from launch_harness import REPOSITORY

pytest.importorskip("vllm", reason="vLLM is not installed: the real engine is what is tested")
pytest.importorskip("lmcache", reason="LMCache is not installed: the real engine is what is tested")

from engine_runs import run_engine
from kv_stores import Server

from disagg_prefill_lmcache_v1.measure import tiny_model

MODEL = REPOSITORY / ".models" / "tiny-llama"
_alone = itertools.count()


def ids(rng, count):
    return [rng.randrange(300, 1000) for _ in range(count)]


def alone(request):
    """The same request, computed: nobody else has its salt."""
    return {**request, "salt": f"alone {next(_alone)}"}


@pytest.fixture(scope="module")
def model():
    tiny_model.build(MODEL)
    return MODEL


@pytest.fixture(scope="module", params=["lm"])
def store(request):
    server = Server(request.param)
    yield server
    server.stop()


def test_adapters_and_the_base_model_share_nothing(model, store, tmp_path):
    prompt = ids(random.Random(1), 600)
    a, b = ([n, i, str(lora_adapter.write(model, tmp_path / n, i))] for i, n in enumerate("ab", 1))
    # the same weights as a, under another name, number and path
    twin = ["twin", 3, str(lora_adapter.write(model, tmp_path / "twin", 1))]
    one = {n: {"prompt": prompt, "lora": lora} for n, lora in (("a", a), ("b", b))} | {"base": {"prompt": prompt}}
    arguments = ["--enable-lora", "--max-loras", "3", "--max-lora-rank", "8"]
    mixed = [one["a"], one["b"], one["base"]] * 2 + [one["a"], one["b"]]
    steps = [[alone(one[n])] for n in one]
    steps += [[one["a"]], "reset", [one["b"]], "reset", [one["base"]], "reset", [one["a"]], "reset", mixed, "reset"]
    steps += [[{"prompt": prompt, "lora": twin}]]
    answers = run_engine(model, store, steps, tmp_path, arguments)
    expected = {n: step.requests[0].tokens for n, step in zip(one, answers, strict=False)}
    assert len({tuple(t) for t in expected.values()}) == 3, "adapters that change nothing prove nothing"
    first_a, first_b, first_base, second_a, together, as_twin = answers[3:]
    for name, step in (("a", first_a), ("b", first_b), ("base", first_base), ("a", second_a)):
        assert step.requests[0].tokens == expected[name], name
    assert [step.loaded for step in (first_a, first_b, first_base)] == [0, 0, 0]
    assert second_a.loaded >= 599
    names = ["a", "b", "base"] * 2 + ["a", "b"]
    assert [r.tokens for r in together.requests] == [expected[n] for n in names]
    assert (as_twin.requests[0].tokens, as_twin.requests[0].cached) == (expected["a"], 599), "adapters count by content"


def test_salts_share_nothing_and_each_reuses_its_own(model, store, tmp_path):
    prompt = ids(random.Random(2), 700)
    salted = [{"prompt": prompt, "salt": salt} for salt in "AB"]
    steps = [
        [salted[0]],
        "reset",
        [salted[1]],
        "reset",
        [{"prompt": prompt}],
        "reset",
        [salted[0]],
        "reset",
        [salted[1]],
    ]
    a, b, plain, again_a, again_b = run_engine(model, store, steps, tmp_path)
    assert [step.loaded for step in (a, b, plain)] == [0, 0, 0]
    assert [step.requests[0].cached for step in (a, b, plain)] == [0, 0, 0]
    assert [step.requests[0].cached for step in (again_a, again_b)] == [699, 699]
    assert min(again_a.loaded, again_b.loaded) >= 699
    assert len({tuple(step.requests[0].tokens) for step in (a, b, plain, again_a, again_b)}) == 1
