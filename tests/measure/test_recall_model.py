"""The model for low precision: it recalls, by a margin that bfloat16 does not reach, and only from a right KV cache."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from plain_llama import PlainLlama

from disagg_prefill_lmcache_v1.measure import recall_model, tiny_model

pytestmark = pytest.mark.usefixtures("one_torch_thread")
ANSWER = 16


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model") / "tiny-recall"
    assert tiny_model.build(directory, "recall")
    assert not tiny_model.build(directory, "recall")
    assert not tiny_model.is_built(directory, "random")
    return directory


def test_code_words_are_far_apart() -> None:
    words = recall_model.golay_words()
    products = words @ words[:64].T
    products[range(64), range(64)] = 0
    assert products.max() == 8
    tokens = {(group, *digits) for group, digits in map(recall_model.digits_of, range(tiny_model.VOCAB_SIZE))}
    assert len(tokens) == tiny_model.VOCAB_SIZE


def prompt_of(rng: random.Random, length: int) -> tuple[list[int], int]:
    """Random tokens that end with two that stood before, and the place after those."""
    tokens = rng.choices(range(5, tiny_model.VOCAB_SIZE), k=length)
    place = rng.randrange(2, length - ANSWER)
    tokens[-2:] = tokens[place - 2 : place]
    return tokens, place


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_recalls_what_followed_with_a_wide_margin(model: Path, dtype: str) -> None:
    import torch

    plain, rng = PlainLlama(model, dtype), random.Random(5)
    for length in (20, 300, 1200):
        tokens, place = prompt_of(rng, length)
        cache: list = []
        with torch.inference_mode():
            logits = plain.forward(torch.tensor([tokens]), 0, cache)[:, -1]
            for step in range(ANSWER):
                best = logits.float().topk(2)
                assert best.indices[0, 0] == (tokens + tokens)[place + step], (length, step)
                assert best.values[0, 0] - best.values[0, 1] > 6, (length, step)
                logits = plain.forward(best.indices[:, :1], length + step, cache)[:, -1]


def test_a_wrong_entry_is_another_token(model: Path) -> None:
    """K and V of each layer, at the place that is looked up (layer 0: at the last one), zeroed for one KV head.

    Each may go unnoticed by chance: the place that is found instead has the same digit, or is the right one after all.
    """
    import torch

    plain, rng = PlainLlama(model), random.Random(6)
    noticed = dict.fromkeys(((layer, which) for layer in range(tiny_model.LAYERS) for which in "KV"), 0)
    for _ in range(4):
        tokens, place = prompt_of(rng, 200)
        for decoy in range(20, 120, 10):  # the last token alone stands in many places
            tokens[decoy + 50 * (place - 40 < decoy < place + 40)] = tokens[-1]
        cache: list = []
        with torch.inference_mode():
            plain.forward(torch.tensor([tokens[:-1]]), 0, cache)
            head = tokens[place] % tiny_model.KV_HEADS
            for layer in range(tiny_model.LAYERS):
                for which in "KV":
                    damaged = [tuple(entry.clone() for entry in pair) for pair in cache]
                    damaged[layer][which == "V"][0, head, place if layer else -1] = 0
                    logits = plain.forward(torch.tensor([tokens[-1:]]), len(tokens) - 1, damaged)[0, -1]
                    best = logits.topk(2)
                    noticed[layer, which] += bool(
                        best.indices[0] != tokens[place] or best.values[0] - best.values[1] < 6
                    )
    assert all(count >= (2 if layer else 1) for (layer, _), count in noticed.items()), noticed
