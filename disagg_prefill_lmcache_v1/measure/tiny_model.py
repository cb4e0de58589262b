"""Builds a small Llama model locally: no download, the same bytes on every run, done in seconds.

    python -m disagg_prefill_lmcache_v1.measure.tiny_model [--weights random|recall] [--output DIR]

random: chosen so that greedy output depends on every entry of the KV cache: a wrong, missing or misplaced entry shows
as different tokens. The output layer can only choose printable text tokens, so an answer never ends early and every
token is a visible chunk of a stream. Its near ties make it useless in bfloat16: recall is for that (recall_model.py).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from disagg_prefill_lmcache_v1.measure import recall_model

# Raise this whenever a build would give other bytes: directories built by older versions are then built again.
VERSION = "2"
MARKER = ".tiny-model.json"
MODELS = Path(__file__).resolve().parents[2] / ".models"
NAMES = {"random": "tiny-llama", "recall": "tiny-recall"}  # weights -> name of the directory
DEFAULT_OUTPUT = MODELS / NAMES["random"]

SEED = 20260801
VOCAB_SIZE = 1024
HIDDEN_SIZE = 512
LAYERS = 8
ATTENTION_HEADS = 8
KV_HEADS = 4  # grouped-query attention, and still divisible by tensor parallel sizes 2 and 4
HEAD_SIZE = HIDDEN_SIZE // ATTENTION_HEADS
INTERMEDIATE_SIZE = 1376
MAX_POSITIONS = 16384
# With the customary 0.02 a random model repeats one token whatever its KV cache holds. The scales below are for the
# same purpose: each layer adds more than the one before, or the late layers' KV would hardly matter; attention is
# sharp enough to depend on keys, and not so strong that it drowns the current token.
INITIALIZER_RANGE = 0.06
EMBEDDING_SCALE = 20.0
QUERY_KEY_SCALE = 1.3
ATTENTION_OUTPUT_SCALE = 1.5
LAYER_GROWTH = 1.4

BOS, EOS, SYSTEM, USER, ASSISTANT = "<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = (BOS, EOS, SYSTEM, USER, ASSISTANT)
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


class BuildError(Exception):
    """The model cannot be built; the message says what to do."""


def training_text(lines: int = 4000) -> Iterator[str]:
    """Text made by code, for training the tokenizer: words of syllables, numbers and punctuation."""
    rng = random.Random(SEED)
    onsets = ("b", "c", "d", "f", "g", "l", "m", "n", "p", "r", "s", "t", "v", "st", "tr", "pl", "sh", "th")
    vowels = ("a", "e", "i", "o", "u", "ea", "io", "ou")
    codas = ("", "n", "r", "s", "t", "l", "nd", "ng", "st")
    words = ["the", "of", "and", "to", "in", "is", "for", "cache", "token", "model", "key", "value", "layer"]

    def word() -> str:
        if rng.random() < 0.25:
            return rng.choice(words)
        return "".join(rng.choice(onsets) + rng.choice(vowels) + rng.choice(codas) for _ in range(rng.randint(1, 3)))

    for _ in range(lines):
        line = " ".join(word() for _ in range(rng.randint(6, 16)))
        yield f"{line[0].upper()}{line[1:]} {rng.randint(0, 9999)}{rng.choice('.,;:?!')}"


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_tokenizer(directory: Path) -> list[int]:
    """Trains and writes the tokenizer; returns the ids of the tokens that are plain printable ASCII text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_text(), trainer)
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise BuildError(f"the tokenizer has {tokenizer.get_vocab_size()} tokens instead of {VOCAB_SIZE}")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    tokenizer.save(str(directory / "tokenizer.json"), pretty=False)
    texts = (tokenizer.decode([token], skip_special_tokens=True) for token in range(VOCAB_SIZE))
    return [token for token, text in enumerate(texts) if text and text.isascii() and text.isprintable()]


def _write_configs(directory: Path, rope_theta: float) -> None:
    """Writes what transformers and vLLM read beside tokenizer and weights."""
    bos_id, eos_id = SPECIAL_TOKENS.index(BOS), SPECIAL_TOKENS.index(EOS)  # the trainer gives them the first ids
    _write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": EOS,
            "additional_special_tokens": [SYSTEM, USER, ASSISTANT],
            "model_max_length": MAX_POSITIONS,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )
    _write_json(
        directory / "generation_config.json",
        {"bos_token_id": bos_id, "eos_token_id": eos_id, "do_sample": False},
    )
    _write_json(
        directory / "config.json",
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": VOCAB_SIZE,
            "hidden_size": HIDDEN_SIZE,
            "intermediate_size": INTERMEDIATE_SIZE,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": ATTENTION_HEADS,
            "num_key_value_heads": KV_HEADS,
            "head_dim": HEAD_SIZE,
            "hidden_act": "silu",
            "max_position_embeddings": MAX_POSITIONS,
            "initializer_range": INITIALIZER_RANGE,
            "rms_norm_eps": 1e-5,
            "rope_theta": rope_theta,
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
            "use_cache": True,
            "bos_token_id": bos_id,
            "eos_token_id": eos_id,
            "pad_token_id": eos_id,
            "torch_dtype": "bfloat16",
        },
    )


def _random_weights(printable: list[int]) -> dict[str, Any]:
    """All weights by name, bfloat16."""
    import numpy as np
    import torch

    # NumPy's generator gives the same numbers on every machine; torch's depends on the instruction set.
    rng = np.random.Generator(np.random.PCG64(SEED))

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        values = rng.standard_normal(shape, dtype=np.float32) * np.float32(INITIALIZER_RANGE * scale)
        return torch.from_numpy(values).to(torch.bfloat16)

    kv_size = KV_HEADS * HEAD_SIZE
    tensors = {"model.embed_tokens.weight": normal(VOCAB_SIZE, HIDDEN_SIZE, scale=EMBEDDING_SCALE)}
    for layer in range(LAYERS):
        prefix, growth = f"model.layers.{layer}", LAYER_GROWTH**layer
        attention_scale = ATTENTION_OUTPUT_SCALE * growth
        tensors |= {
            f"{prefix}.self_attn.q_proj.weight": normal(HIDDEN_SIZE, HIDDEN_SIZE, scale=QUERY_KEY_SCALE),
            f"{prefix}.self_attn.k_proj.weight": normal(kv_size, HIDDEN_SIZE, scale=QUERY_KEY_SCALE),
            f"{prefix}.self_attn.v_proj.weight": normal(kv_size, HIDDEN_SIZE),
            f"{prefix}.self_attn.o_proj.weight": normal(HIDDEN_SIZE, HIDDEN_SIZE, scale=attention_scale),
            f"{prefix}.mlp.gate_proj.weight": normal(INTERMEDIATE_SIZE, HIDDEN_SIZE),
            f"{prefix}.mlp.up_proj.weight": normal(INTERMEDIATE_SIZE, HIDDEN_SIZE),
            f"{prefix}.mlp.down_proj.weight": normal(HIDDEN_SIZE, INTERMEDIATE_SIZE, scale=growth),
            f"{prefix}.input_layernorm.weight": torch.ones(HIDDEN_SIZE, dtype=torch.bfloat16),
            f"{prefix}.post_attention_layernorm.weight": torch.ones(HIDDEN_SIZE, dtype=torch.bfloat16),
        }
    tensors["model.norm.weight"] = torch.ones(HIDDEN_SIZE, dtype=torch.bfloat16)
    lm_head = torch.zeros(VOCAB_SIZE, HIDDEN_SIZE, dtype=torch.bfloat16)
    lm_head[printable] = normal(len(printable), HIDDEN_SIZE)
    tensors["lm_head.weight"] = lm_head
    return tensors


def _recall_weights() -> dict[str, Any]:
    """All weights by name, bfloat16."""
    import numpy as np
    import torch

    arrays = recall_model.tensors(VOCAB_SIZE, INTERMEDIATE_SIZE, np.random.Generator(np.random.PCG64(SEED)))
    return {name: torch.from_numpy(array).to(torch.bfloat16) for name, array in arrays.items()}


def _write_weights(directory: Path, tensors: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    path = directory / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)  # written readable by its owner only


def is_built(directory: Path, weights: str = "random") -> bool:
    """True when `directory` holds a complete build of this version (file sizes are compared, not contents)."""
    try:
        marker = json.loads((directory / MARKER).read_text(encoding="utf-8"))
        return (marker["version"], marker.get("weights", "random")) == (VERSION, weights) and all(
            (directory / name).stat().st_size == size for name, size in marker["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def build(directory: Path = DEFAULT_OUTPUT, weights: str = "random") -> bool:
    """Makes `directory` hold the model; returns False when it already did.

    The build happens in a temporary directory beside it and is renamed into place, so an interrupted or a
    concurrent build never leaves half a model.

    Raises:
        BuildError: `directory` holds something that was not built by this module, or cannot be written.
    """
    directory = directory.absolute()
    if is_built(directory, weights):
        return False
    if directory.exists() and not (
        directory.is_dir() and ((directory / MARKER).exists() or not any(directory.iterdir()))
    ):
        raise BuildError(f"{directory} exists and was not built by this program: remove it or choose another --output")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    except OSError as error:
        raise BuildError(f"cannot write beside {directory}: {error.strerror}") from error
    try:
        temporary.chmod(0o755)
        printable = _write_tokenizer(temporary)
        _write_weights(temporary, _random_weights(printable) if weights == "random" else _recall_weights())
        _write_configs(temporary, 10000.0 if weights == "random" else recall_model.ROPE_THETA)
        sizes = {path.name: path.stat().st_size for path in sorted(temporary.iterdir())}
        _write_json(temporary / MARKER, {"version": VERSION, "weights": weights, "files": sizes})
        if is_built(directory, weights):  # a concurrent build was faster
            return False
        if directory.exists():  # empty, or an older build
            os.rename(directory, temporary / "replaced")
        try:
            os.rename(temporary, directory)
        except OSError:
            if not is_built(directory, weights):  # a concurrent build again
                raise
        shutil.rmtree(directory / "replaced", ignore_errors=True)
    except OSError as error:
        raise BuildError(f"cannot write {directory}: {error.strerror}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return True


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="tiny_model", description="Build a small Llama model for machines without an accelerator."
    )
    parser.add_argument("--weights", choices=tuple(NAMES), default="random", help="what it does (default: %(default)s)")
    parser.add_argument("--output", type=Path, help=f"directory (default: {MODELS}/, {' or '.join(NAMES.values())})")
    options = parser.parse_args(arguments)
    output = options.output or MODELS / NAMES[options.weights]
    try:
        built = build(output, options.weights)
    except BuildError as error:
        print(f"tiny_model: {error}", file=sys.stderr)
        return 1
    print(f"{output}: {'built' if built else 'already there'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
