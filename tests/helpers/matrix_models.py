"""Small random models, one for each kind of KV cache that the support matrix has a row for.

Two layers, built in a second: nothing is downloaded. With transformers' usual spread of weights a random model repeats
one token whatever its KV cache holds; with this one every answer depends on the whole prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

VOCABULARY = 1024
SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096, "initializer_range": 0.12,
    "head_dim": 64, "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip


def _of(name: str, **settings: Any) -> Callable[[], Any]:
    def make() -> Any:
        import transformers

        return getattr(transformers, name)(**{**SMALL, **settings})

    return make


CONFIGS: dict[str, Callable[[], Any]] = {
    "gqa": _of("LlamaConfig"),
    "mqa": _of("LlamaConfig", num_key_value_heads=1),
    **{f"head{size}": _of("LlamaConfig", head_dim=size) for size in (80, 96, 128, 256)},
    "tied": _of("Qwen3Config", tie_word_embeddings=True),
    "moe": _of("MixtralConfig", num_local_experts=4, num_experts_per_tok=2),
    "sliding": _of("MistralConfig", sliding_window=128),
    "gemma3": _of("Gemma3TextConfig", sliding_window=128, query_pre_attn_scalar=64, num_hidden_layers=6),
    "gptoss": _of("GptOssConfig", sliding_window=128, num_local_experts=2, num_experts_per_tok=1),
    "mla": _of("DeepseekV2Config", num_key_value_heads=4, q_lora_rank=None, kv_lora_rank=512, qk_rope_head_dim=64,
               qk_nope_head_dim=128, v_head_dim=128, n_routed_experts=2, first_k_dense_replace=2),
    "mamba": _of("MambaConfig", state_size=16),
    "linear": _of("Qwen3NextConfig", layer_types=["linear_attention", "full_attention"], num_experts=2,
                  num_experts_per_tok=1, moe_intermediate_size=128, shared_expert_intermediate_size=128,
                  linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=64, linear_value_head_dim=64),
    # says 2 KV heads, as do the others, and has 4
    "odd": _of("GPT2Config", n_embd=256, n_head=4, n_layer=2, n_positions=4096, n_inner=512),
}  # fmt: skip


def build(kind: str, folder: str) -> None:
    """Write the model of a kind, if it is not there yet."""
    import torch
    import transformers

    if not Path(folder, "config.json").exists():
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(CONFIGS[kind]()).float().save_pretrained(folder)
