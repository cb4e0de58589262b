"""The locally built model: the same bytes every time, and greedy output that depends on every KV entry."""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from plain_llama import PlainLlama

from disagg_prefill_lmcache_v1.measure import tiny_model

ROOT = Path(__file__).resolve().parents[2]


def hashes(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


def run_builder(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "disagg_prefill_lmcache_v1.measure.tiny_model", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model") / "tiny-llama"
    assert tiny_model.build(directory)
    return directory


def test_processes_build_the_same_bytes_even_at_once(model: Path, tmp_path: Path) -> None:
    with concurrent.futures.ThreadPoolExecutor() as pool:
        variables = ({"PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "1"}, {"PYTHONHASHSEED": "8"})
        builds = [pool.submit(run_builder, "--output", str(tmp_path / "again"), **some) for some in variables]
    for build in builds:
        assert build.result().returncode == 0, build.result().stderr
    assert hashes(tmp_path / "again") == hashes(model)
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= hashes(model).keys()
    assert [path.name for path in tmp_path.iterdir()] == ["again"], "a temporary directory was left"


def test_a_build_that_is_there_is_left_alone(model: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in model.iterdir()}
    assert not tiny_model.build(model)
    assert before == {path: path.stat().st_mtime_ns for path in model.iterdir()}
    done = run_builder("--output", str(model))
    assert (done.returncode, done.stdout.strip()) == (0, f"{model}: already there")


def copy_of(model: Path, directory: Path) -> Path:
    directory.mkdir()
    for path in model.iterdir():
        os.link(path, directory / path.name)
    return directory


def replace_file(path: Path, content: bytes) -> None:
    path.unlink()  # a hard link: its other name must keep its content
    path.write_bytes(content)


@pytest.mark.parametrize("damage", ["none", "truncated", "missing", "older version", "marker unreadable", "no marker"])
def test_only_a_complete_build_of_this_version_counts(model: Path, tmp_path: Path, damage: str) -> None:
    directory = copy_of(model, tmp_path / "copy")
    marker = directory / tiny_model.MARKER
    if damage == "truncated":
        replace_file(directory / "tokenizer.json", (directory / "tokenizer.json").read_bytes()[:-1])
    elif damage == "missing":
        (directory / "config.json").unlink()
    elif damage == "older version":
        replace_file(marker, json.dumps({**json.loads(marker.read_text()), "version": "0"}).encode())
    elif damage == "marker unreadable":
        replace_file(marker, b"[1")
    elif damage == "no marker":
        marker.unlink()
    assert tiny_model.is_built(directory) is (damage == "none")


def test_an_incomplete_build_is_replaced(model: Path, tmp_path: Path) -> None:
    directory = copy_of(model, tmp_path / "copy")
    replace_file(directory / "model.safetensors", b"half")
    assert tiny_model.build(directory)
    assert hashes(directory) == hashes(model)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"], "a temporary directory was left"


def test_a_directory_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    done = run_builder("--output", str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "--output" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_an_unwritable_place_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = run_builder("--output", str(tmp_path / "file" / "model"))
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1, done.stderr


def test_importing_it_imports_nothing_heavy() -> None:
    code = (
        "import sys, disagg_prefill_lmcache_v1.measure.tiny_model\n"
        "print({'torch', 'numpy', 'tokenizers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "set()", done.stderr


def test_shape_and_generation_settings(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    assert config["num_attention_heads"] > config["num_key_value_heads"], "grouped-query attention is wanted"
    for size in (2, 4):
        assert config["num_key_value_heads"] % size == 0, f"tensor parallel size {size} is wanted"
    generation = json.loads((model / "generation_config.json").read_text())
    assert not {"temperature", "top_p", "top_k", "repetition_penalty"} & generation.keys()


def test_the_chat_template_and_the_tokenizer(model: Path) -> None:
    jinja2 = pytest.importorskip("jinja2")
    tokenizers = pytest.importorskip("tokenizers")
    config = json.loads((model / "tokenizer_config.json").read_text())
    text = jinja2.Template(config["chat_template"]).render(
        messages=[{"role": "user", "content": "Hi"}], add_generation_prompt=True, bos_token="<B>", eos_token="<E>"
    )
    assert text == "<B><|user|>Hi<E><|assistant|>"
    tokenizer = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
    assert tokenizer.encode("a").ids[0] == tokenizer.token_to_id(tiny_model.BOS)
    for sample in ("plain words", "Grüße, 世界 \n\t ok"):
        assert tokenizer.decode(tokenizer.encode(sample).ids) == sample
    for special in tiny_model.SPECIAL_TOKENS:
        assert len(tokenizer.encode(special, add_special_tokens=False).ids) == 1


@pytest.mark.usefixtures("one_torch_thread")
def test_greedy_output_depends_on_every_kv_entry(model: Path) -> None:
    import torch

    length, answer_length = 40, 64
    rng = random.Random(3)
    places = [(layer, position) for layer in range(tiny_model.LAYERS) for position in (0, length - 2)]
    places += [(layer, rng.randrange(1, length - 2)) for layer in range(tiny_model.LAYERS)]
    unseen = [(layer, position, which) for layer, position in places for which in ("K", "V")]
    plain = PlainLlama(model)
    reference, used = [], set()
    with torch.inference_mode():
        prompt = torch.tensor([[rng.randrange(5, tiny_model.VOCAB_SIZE) for _ in range(length)]])
        cache: list = []
        plain.forward(prompt[:, :-1], 0, cache)
        # One sequence with its cache as it is, and one more for each entry that is set to zero.
        cache = [tuple(entry.repeat(len(unseen) + 1, 1, 1, 1) for entry in pair) for pair in cache]
        for index, (layer, position, which) in enumerate(unseen, start=1):
            cache[layer][which == "V"][index, :, position] = 0
        last = prompt[:, -1:].repeat(len(unseen) + 1, 1)
        for step in range(answer_length):
            last = plain.forward(last, length - 1 + step, cache)[:, -1:].argmax(-1)
            reference.append(int(last[0]))
            used |= set(last.flatten().tolist())
            same = last.flatten() == last[0]  # the others have been noticed, and are finished
            unseen = [case for case, equal in zip(unseen, same[1:].tolist(), strict=True) if equal]
            last, cache = last[same], [tuple(entry[same] for entry in pair) for pair in cache]
    assert not unseen, f"(layer, position, K or V) without effect on {answer_length} tokens: {unseen}"
    assert len(set(reference)) > answer_length // 4, "the answer repeats itself"
    tokenizer = pytest.importorskip("tokenizers").Tokenizer.from_file(str(model / "tokenizer.json"))
    for token in used:
        text = tokenizer.decode([token])
        assert text, f"token {token} is not text"
        assert text.isascii(), f"token {token} is not plain text"
        assert text.isprintable(), f"token {token} is not printable"
