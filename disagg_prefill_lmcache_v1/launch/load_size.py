"""Whether the KV server holds the KV cache of the whole load, and takes it in time; nothing of unknown models."""

from __future__ import annotations

import contextlib
import itertools
import json
from pathlib import Path
from typing import Any

from disagg_prefill_lmcache_v1.launch.backends import BACKENDS, make_backend
from disagg_prefill_lmcache_v1.launch.checks import hub_cache, vllm_words
from disagg_prefill_lmcache_v1.launch.plan import Plan
from disagg_prefill_lmcache_v1.memory import available_memory

ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
# Of models whose layers do not all keep K and V of every token.
OTHER_LAYERS = ("layers_block_type", "mamba_d_state", "ssm_state_size", "state_size", "linear_num_key_heads")


def load_warning(plan: Plan[Any], prompts: int, tokens: int) -> str:
    """One line where ``prompts`` prompts of ``tokens`` tokens are more than the backend holds; "" where not."""
    each, capacity = bytes_per_token(plan), None
    with contextlib.suppress(ValueError):  # a size that the server itself will refuse
        capacity = plan.backend.capacity
    if each is None or capacity is None or (need := each * prompts * tokens) <= capacity:
        return ""
    name = plan.settings.backend
    load = f"{prompts:,} prompts of {tokens:,} tokens, {each / 1024:,.0f} KiB a token"
    return (
        f"warning: the KV cache of the load is {_gib(need)} ({load}), --backend {name} holds {_gib(capacity)} "
        f"({BACKENDS[name].size_variable}): what was not used for longest is dropped; {_advice(plan, need)}"
    )


def rate_warning(plan: Plan[Any], rate: float, tokens: int) -> str:
    """One line where ``rate`` prompts a second of ``tokens`` tokens are more than the backend takes; "" where not."""
    each, most = bytes_per_token(plan), plan.backend.takes_per_s
    if each is None or most is None or (need := each * rate * tokens) <= most:
        return ""
    return (
        f"warning: the load brings {need / 1e9:,.1f} GB of KV cache a second, --backend {plan.settings.backend} takes "
        f"about {most / 1e9:g}: prompts will wait for it; on one machine --backend nixl or --backend shm takes more"
    )


def _advice(plan: Plan[Any], need: int) -> str:
    free = available_memory()
    if need > free:
        return f"this machine has {_gib(free)} free: take fewer or shorter prompts"
    sizes = {}
    for name, kind in BACKENDS.items():
        backend = make_backend(
            name, environ=plan.environ, profile=plan.profile.settings, host="127.0.0.1", port=None,
            ranks=plan.settings.tensor_parallel_size,
        )  # fmt: skip
        if kind.size_variable:
            sizes[name] = (backend.capacity or 0, kind.size_variable)
    enough = [f"--backend {name}" for name, (size, _) in sizes.items() if size >= need]
    if enough:
        return f"{' or '.join(enough)} holds it"
    return f"all can be told to hold more: {', '.join(f'{name} {variable}' for name, (_, variable) in sizes.items())}"


def _gib(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB"


def bytes_per_token(plan: Plan[Any]) -> int | None:
    """Of the KV cache in all layers and ranks, by the model's configuration; None where that is not known."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError):
        config = json.loads(_config_file(plan).read_text(encoding="utf-8"))
        config = config.get("text_config", config)
        if any(name in config for name in OTHER_LAYERS) or not set(config.get("layer_types") or ()) <= ATTENTION:
            return None
        layers, size = int(config["num_hidden_layers"]), _element_size(plan)
        if config.get("kv_lora_rank"):  # MLA
            return layers * size * int(config["kv_lora_rank"] + config["qk_rope_head_dim"])
        heads = int(config["num_attention_heads"])
        head_size = int(config.get("head_dim") or config["hidden_size"] // heads)
        kv_heads = int(config.get("num_key_value_heads") or heads)
        return layers * size * 2 * max(kv_heads, plan.settings.tensor_parallel_size) * head_size
    return None


def _config_file(plan: Plan[Any]) -> Path:
    """Raises OSError: it is not on this machine."""
    if plan.model.is_local:
        return Path(plan.model.name, "config.json")
    cache = hub_cache(plan)
    return cache / "snapshots" / (cache / "refs" / "main").read_text().strip() / "config.json"


def _element_size(plan: Plan[Any]) -> int:
    """Bytes of a number in the KV cache; vLLM's own choice is a type of two."""
    words = vllm_words(plan)
    values = {flag: value for flag, value in itertools.pairwise(words) if flag.startswith("--")}
    if values.get("--kv-cache-dtype", "auto") not in ("auto", "bfloat16", "float16"):
        return 1
    return 4 if values.get("--dtype") in ("float32", "float") else 2
