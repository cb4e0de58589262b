"""Fingerprints of a model and of LoRA adapters: KV is only as alike as what has computed it.

A path or a name says nothing: other weights may be written to it, and equal weights may lie elsewhere. What counts here
is content: the configuration as vLLM uses it, and of the weights each tensor's name, type, shape and samples of its
bytes, however they are spread over files. Reading takes milliseconds: the files have just been loaded.

What samples can miss: a change of a few rows of a large tensor. Such weights belong to a new path and an empty store.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lmcache.logging import init_logger

logger = init_logger(__name__)

PIECE = 4096  # bytes of a sample
PIECES = 8  # samples of a tensor, or of a file of another format
WHOLE = 1 << 20  # bytes; what is no larger is read whole
# Sampled more densely: the directory at a .bin file's end has a checksum of each tensor.
_FILE_PIECES = 64
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.tensors")
_NO_WEIGHTS = ("training_args", "optimizer", "scheduler", "rng_state")
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.*", "new_embeddings.*")
# Where a model comes from and who wrote its configuration: not what it computes.
_VOLATILE = frozenset(("_name_or_path", "name_or_path", "transformers_version", "_commit_hash"))


def digest(*parts: Any) -> str:
    """32 hexadecimal digits of anything that JSON can say; what it cannot say counts by its text."""
    text = json.dumps(parts, sort_keys=True, default=str, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def model_fingerprint(vllm_config: Any) -> str:
    """What KV depends on beside tokens, rank and KV dtype: 24 hexadecimal digits, equal on every machine.

    Args:
        vllm_config: vLLM's. The configuration counts with all overrides of the command line in it.
    """
    model, load = vllm_config.model_config, vllm_config.load_config
    load_format = str(getattr(load, "load_format", "auto"))
    if load_format == "dummy":
        weights = f"dummy, seed {model.seed}"
    else:
        weights = weights_digest(model.model, model.revision, getattr(load, "download_dir", None))
    return digest(
        _model_settings(model),
        _layout(vllm_config),
        weights,
        _draft(getattr(vllm_config, "speculative_config", None)),
    )[:24]


def _model_settings(model: Any) -> list[Any]:
    hf_config = model.hf_config
    settings = hf_config.to_dict() if hasattr(hf_config, "to_dict") else vars(hf_config)
    return [
        _settled(settings),
        str(model.dtype),
        model.quantization,
        model.revision,
        model.code_revision,
        getattr(getattr(model, "multimodal_config", None), "mm_processor_kwargs", None),
    ]


def _settled(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _settled(v) for k, v in value.items() if k not in _VOLATILE}
    if isinstance(value, (list, tuple)):
        return [_settled(v) for v in value]
    return value


def _layout(vllm_config: Any) -> list[Any]:
    """How KV is spread over ranks: LMCache's key has the number of ranks, not what they are."""
    parallel = vllm_config.parallel_config
    sizes = ("tensor", "pipeline", "prefill_context", "decode_context")
    return [[getattr(parallel, f"{name}_parallel_size", 1) for name in sizes], vllm_config.cache_config.cache_dtype]


def _draft(speculative: Any) -> Any:
    """A draft model whose layers lie in the same KV cache is part of every chunk; n-grams are not."""
    if speculative is None or not speculative.uses_draft_kv_cache():
        return None
    draft = speculative.draft_model_config
    return [_model_settings(draft), weights_digest(draft.model, draft.revision, None)]


def draft_layers(speculative: Any) -> int:
    """Layers that a draft model adds to the KV cache, as far as LMCache does not count them itself."""
    if speculative is None or getattr(speculative, "method", None) != "draft_model":
        return 0
    return speculative.draft_model_config.get_num_layers(speculative.draft_parallel_config)


# files


def weights_digest(model: str, revision: str | None, download_dir: str | None) -> str:
    """Of the weights' content; where no file can be read, of the name, with a warning."""
    path = Path(model).expanduser()
    if not path.exists():
        path = _downloaded(model, revision, download_dir) or path
    files = [path] if path.is_file() else sorted(_weight_files(path))
    if not files:
        logger.warning("No weights found for %s: KV is told apart by its name alone", path)
        return digest("name", model)
    try:
        tensors: list[list[Any]] = []
        for file in files:
            tensors += _tensors(file) if file.suffix == ".safetensors" else [[file.name, *_sampled_file(file)]]
        code = [[file.name, _whole_file(file)] for file in sorted(files[0].parent.glob("*.py"))]
    except (OSError, ValueError, struct.error) as error:
        logger.warning("Weights of %s cannot be read (%s): KV is told apart by its name", path, error)
        return digest("name", model)
    return digest(sorted(tensors, key=lambda tensor: str(tensor[0])), code)


def _downloaded(model: str, revision: str | None, download_dir: str | None) -> Path | None:
    """Where Hugging Face's cache has the model; nothing is downloaded."""
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(model, revision=revision, cache_dir=download_dir, local_files_only=True))
    except Exception as error:  # of many kinds: not a repository's name, not in the cache
        logger.info("%s is not in Hugging Face's cache: %s", model, type(error).__name__)
        return None


def _weight_files(folder: Path) -> Iterable[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return {folder / name for name in json.loads(index.read_bytes())["weight_map"].values()}
    for pattern in _WEIGHTS:
        files = [file for file in folder.glob(pattern) if not file.name.startswith(_NO_WEIGHTS)]
        if files:
            return files
    return []


def _tensors(file: Path) -> Iterator[list[Any]]:
    """Name, type, shape and a digest of samples of each tensor of a safetensors file."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        if length > 1 << 30:
            raise ValueError(f"{file.name} is no safetensors file")
        header = json.loads(stream.read(length))
        for name, tensor in header.items():
            if name == "__metadata__":
                continue
            begin, end = tensor["data_offsets"]
            sampled = _sample(stream.fileno(), 8 + length + begin, end - begin, PIECES)
            yield [name, tensor["dtype"], tensor["shape"], sampled]


def _sampled_file(file: Path) -> tuple[int, str]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        return size, _sample(stream.fileno(), 0, size, _FILE_PIECES)


def _sample(descriptor: int, begin: int, size: int, pieces: int) -> str:
    """A digest of ``size`` bytes from ``begin`` on: of all, or of ``pieces`` evenly spread from end to end."""
    seen = hashlib.sha256()
    if size <= WHOLE:
        seen.update(os.pread(descriptor, size, begin))
    else:
        for i in range(pieces):
            seen.update(os.pread(descriptor, PIECE, begin + (size - PIECE) * i // (pieces - 1)))
    return seen.hexdigest()[:32]


def _whole_file(file: Path) -> str:
    seen = hashlib.sha256()
    with file.open("rb") as stream:
        while part := stream.read(1 << 20):
            seen.update(part)
    return seen.hexdigest()[:32]


class Adapters:
    """Digests of LoRA adapters, read once for each path.

    vLLM keeps the weights that it has loaded, and its own prefix cache goes by name and path: when the files of a path
    change, nobody can tell any more by which weights a block was computed. Such adapters have no digest from then on.
    """

    def __init__(self) -> None:
        self._known: dict[Path, tuple[Any, str | None]] = {}

    def digest(self, adapter: Any) -> str | None:
        """Of vLLM's ``LoRARequest``: 32 hexadecimal digits, or None if its content cannot be told."""
        if getattr(adapter, "load_inplace", False):
            self._tell_once(Path(adapter.lora_path), "it was loaded in place: load changed weights from a new path")
            return None
        path = Path(adapter.lora_path).expanduser()
        if not path.exists():
            path = _downloaded(adapter.lora_path, None, None) or path
        try:
            files = sorted(file for pattern in _ADAPTER_FILES for file in path.glob(pattern))
            state = [(file.name, *(lambda s: (s.st_size, s.st_mtime_ns, s.st_ino))(file.stat())) for file in files]
            if path not in self._known:
                if not any(file.name.startswith("adapter_model.") for file in files):
                    raise FileNotFoundError("adapter_model.* is not there")
                content = [[file.name, _whole_file(file)] for file in files]
                self._known[path] = state, digest(content, getattr(adapter, "is_3d_lora_weight", False))
        except OSError as error:
            self._tell_once(path, str(error))
            return None
        if self._known[path][0] != state:
            self._tell_once(path, "its files have changed: load changed weights from a new path")
        return self._known[path][1]

    def _tell_once(self, path: Path, cause: str) -> None:
        if self._known.get(path, ("", ""))[1] is not None:
            logger.warning("KV of LoRA adapter %s is neither stored nor loaded: %s", path, cause)
        self._known[path] = (None, None)
