"""The tiny models in a few lines of torch, to look into what no server shows."""

from __future__ import annotations

import json
from pathlib import Path

from disagg_prefill_lmcache_v1.measure import tiny_model


class PlainLlama:
    """The model in a few lines of torch: a batch of sequences with a KV cache each."""

    def __init__(self, directory: Path, dtype: str = "float32") -> None:
        import torch
        from safetensors.torch import load_file

        tensors = load_file(directory / "model.safetensors")
        self.weights = {name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors.items()}
        self.rope_theta = json.loads((directory / "config.json").read_text())["rope_theta"]

    def linear(self, x, layer: int, name: str):
        return x @ self.weights[f"model.layers.{layer}.{name}_proj.weight"].T

    def heads(self, x, count: int, positions):
        import torch

        x = x.unflatten(-1, (count, tiny_model.HEAD_SIZE)).transpose(1, 2)
        if positions is None:
            return x
        exponents = torch.arange(0, tiny_model.HEAD_SIZE, 2) / tiny_model.HEAD_SIZE
        angles = (positions[:, None] * self.rope_theta**-exponents).repeat(1, 2)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        left, right = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-right, left], dim=-1) * sin

    def forward(self, tokens, begin: int, cache: list):
        """Logits for `tokens` (batch, length) at positions from `begin`; `cache` gets their K and V."""
        import torch
        from torch.nn import functional

        positions = torch.arange(begin, begin + tokens.shape[1])
        norm = lambda x: functional.rms_norm(x, x.shape[-1:], eps=1e-5)  # noqa: E731
        x = self.weights["model.embed_tokens.weight"][tokens]
        for layer in range(tiny_model.LAYERS):
            hidden = norm(x)
            query = self.heads(self.linear(hidden, layer, "self_attn.q"), tiny_model.ATTENTION_HEADS, positions)
            key = self.heads(self.linear(hidden, layer, "self_attn.k"), tiny_model.KV_HEADS, positions)
            value = self.heads(self.linear(hidden, layer, "self_attn.v"), tiny_model.KV_HEADS, None)
            if len(cache) > layer:
                key, value = (torch.cat(pair, dim=2) for pair in zip(cache[layer], (key, value), strict=True))
                cache[layer] = (key, value)
            else:
                cache.append((key, value))
            group = tiny_model.ATTENTION_HEADS // tiny_model.KV_HEADS
            mask = torch.arange(key.shape[2]) <= positions[:, None]
            mixed = functional.scaled_dot_product_attention(
                query, key.repeat_interleave(group, 1), value.repeat_interleave(group, 1), attn_mask=mask
            )
            x = x + self.linear(mixed.transpose(1, 2).flatten(2), layer, "self_attn.o")
            hidden = norm(x)
            gate = functional.silu(self.linear(hidden, layer, "mlp.gate"))
            x = x + self.linear(gate * self.linear(hidden, layer, "mlp.up"), layer, "mlp.down")
        return norm(x) @ self.weights["lm_head.weight"].T
