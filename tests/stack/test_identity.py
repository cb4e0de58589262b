"""KV is taken only by those whose it is: adapters, salts, hostile requests and shared prefixes, on a real engine.

One engine stores and loads (tests/helpers/one_engine.py); what a request should answer is what the same engine computes
under a salt that nobody else has. Takes about 3 minutes on 2 cores.
"""

from __future__ import annotations

import itertools
import random
import shutil

import lora_adapter
import pytest
from launch_harness import REPOSITORY

pytest.importorskip("vllm", reason="vLLM is not installed: the real engine is what is tested")
pytest.importorskip("lmcache", reason="LMCache is not installed: the real engine is what is tested")

import torch
from engine_runs import Engine, run_engine
from hostile_params import HOSTILE
from kv_stores import Server
from safetensors.torch import load_file, save_file

from disagg_prefill_lmcache_v1.measure import tiny_model

MODEL = REPOSITORY / ".models" / "tiny-llama"
_alone = itertools.count()


def ids(rng, count):
    return [rng.randrange(300, 1000) for _ in range(count)]


def alone(request):
    """The same request, computed: nobody else has its salt."""
    return {**request, "salt": f"alone {next(_alone)}", "params": {"lmcache.skip_save": True}}


@pytest.fixture(scope="module")
def model():
    tiny_model.build(MODEL)
    return MODEL


@pytest.fixture(scope="module", params=["lm"])
def store(request):
    server = Server(request.param, size="2gb")  # nothing is evicted
    yield server
    server.stop()


@pytest.fixture(scope="module")
def engine(model, store, tmp_path_factory):
    arguments = ["--enable-lora", "--max-loras", "3", "--max-lora-rank", "8"]
    with Engine(model, store, tmp_path_factory.mktemp("engine"), arguments) as engine:
        yield lambda steps: engine.run(["reset", *steps])


def test_adapters_and_the_base_model_share_nothing(model, engine, tmp_path):
    prompt = ids(random.Random(1), 600)
    a, b = ([n, i, str(lora_adapter.write(model, tmp_path / n, i))] for i, n in enumerate("ab", 1))
    # the same weights as a, under another name, number and path
    twin = ["twin", 3, str(lora_adapter.write(model, tmp_path / "twin", 1))]
    one = {n: {"prompt": prompt, "lora": lora} for n, lora in (("a", a), ("b", b))} | {"base": {"prompt": prompt}}
    mixed = [one["a"], one["b"], one["base"]] * 2 + [one["a"], one["b"]]
    steps = [[alone(one[n])] for n in one]
    steps += [[one["a"]], "reset", [one["b"]], "reset", [one["base"]], "reset", [one["a"]], "reset", mixed, "reset"]
    steps += [[{"prompt": prompt, "lora": twin}]]
    answers = engine(steps)
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


def test_salts_share_nothing_and_each_reuses_its_own(engine):
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
    a, b, plain, again_a, again_b = engine(steps)
    assert [step.loaded for step in (a, b, plain)] == [0, 0, 0]
    assert [step.requests[0].cached for step in (a, b, plain)] == [0, 0, 0]
    assert [step.requests[0].cached for step in (again_a, again_b)] == [699, 699]
    assert min(again_a.loaded, again_b.loaded) >= 699
    assert len({tuple(step.requests[0].tokens) for step in (a, b, plain, again_a, again_b)}) == 1


def test_new_weights_on_a_kept_store_take_nothing(model, store, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    prompts = [{"prompt": ids(random.Random(3), n)} for n in (300, 700)]
    steps = [[prompt] for prompt in prompts]
    before = run_engine(folder, store, tmp_path, steps=steps)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    noise = torch.Generator().manual_seed(7)
    for name, tensor in tensors.items():
        if "layers" in name and tensor.dim() == 2:
            tensor += 0.1 * tensor.std() * torch.randn(tensor.shape, generator=noise)
    save_file(tensors, file, metadata={"format": "pt"})
    again = [*steps, "reset", *steps, "reset", [alone(p) for p in prompts]]
    after = run_engine(folder, store, tmp_path, steps=again)
    new, again, (computed,) = after[:2], after[2:4], after[4:]
    assert [step.loaded for step in new] == [0, 0]
    assert [step.requests[0].cached for step in again] == [299, 699]
    for i, request in enumerate(computed.requests):
        assert new[i].requests[0].tokens == again[i].requests[0].tokens == request.tokens
        assert before[i].requests[0].tokens != request.tokens, "weights that change nothing prove nothing"


def test_what_clients_send_ends_nothing(engine):
    prompt, given = ids(random.Random(4), 300), [params for params in HOSTILE if isinstance(params, dict)]
    requests = [{"prompt": [*prompt[:-1], 300 + i], "params": params} for i, params in enumerate(given)]
    computed = [alone(request) for request in requests]
    first, second, expected = engine([requests, "reset", requests, "reset", computed])
    assert [r.tokens for r in first.requests] == [r.tokens for r in expected.requests]
    assert [r.tokens for r in second.requests] == [r.tokens for r in expected.requests]
    unstored = sum("lmcache.skip_save" in params for params in given)
    for step in (first, second):
        assert sorted(step.states) == ["none"] * unstored + ["stored"] * (len(given) - unstored)
    assert set(expected.states) == {"none"}


BORDERS = (1, 31, 32, 33, 129, 255, 256, 257, 288, 300, 511, 512, 513, 600)


def test_prefixes_that_end_anywhere(engine):
    """A prompt shares a beginning with another: what of it vLLM's own cache has, and what the store has, ends anywhere.

    LMCache does not store part-filled chunks by default, for a corruption where vLLM's cache ends inside one.
    """
    rng = random.Random(5)
    base, steps, asked = ids(rng, 700), [], []

    def ask(name, prompt, **more):
        steps.append([{"prompt": prompt, "max_tokens": 6, **more}])
        asked.append((name, prompt))

    ask("the prompt that is shared", base)
    for k in BORDERS:
        longer, alike = base[:k] + ids(rng, 61), base[:k] + ids(rng, 150)
        steps.append("reset")
        ask(f"{k} of a longer one in the store", longer)
        ask(f"{k} in both, the rest nowhere", alike)
        steps.append("reset")
        ask(f"the first {k} are asked for", [*base[:k], 7])
        ask(f"{k} in the cache, all in the store", longer)
        ask(f"{k} in the cache, all of the first in the store", base)
        steps.append("reset")
        fresh = ids(rng, 640)
        ask(f"{k} stored as a whole prompt", [*fresh[:k], 7])
        steps.append("reset")
        ask(f"{k}, then more, in the store", [*fresh[:k], 7, *fresh[k:]])
        steps.append("reset")
        apart = ids(rng, 640)
        ask(f"{k} in the cache alone", [*apart[:k], 7], params={"lmcache.skip_save": True})
        ask(f"{k} in the cache alone, stored with the rest", [*apart[:k], 7, *apart[k:]])
        steps.append("reset")
        ask(f"what was stored from cache and step, {k}", [*apart[:k], 7, *apart[k:]])
    expected = [
        [alone({"prompt": prompt, "max_tokens": 6}) for _, prompt in asked[i : i + 8]] for i in range(0, len(asked), 8)
    ]
    answers = engine([*steps, *expected])
    right = [request.tokens for step in answers[len(asked) :] for request in step.requests]
    told = list(zip(asked, answers, strict=False))
    wrong = [name for ((name, _), step), tokens in zip(told, right, strict=True) if step.requests[0].tokens != tokens]
    assert wrong == []
    reused = {name: step.requests[0].cached for (name, _), step in told}
    assert all(reused[f"what was stored from cache and step, {k}"] == 640 for k in BORDERS)
    assert all(reused[f"{k} in the cache, all in the store"] == k + 60 for k in BORDERS)
