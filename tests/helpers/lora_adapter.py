"""Small LoRA adapters for the tiny Llama, from a seed: each changes every answer."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

RANK = 8
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")


def write(model: Path, folder: Path, seed: int) -> Path:
    config = json.loads((model / "config.json").read_text())
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    narrow = hidden * config["num_key_value_heads"] // config["num_attention_heads"]
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(layers):
        for module in MODULES:
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            out = narrow if module in ("k_proj", "v_proj") else hidden
            tensors[f"{name}.lora_A.weight"] = torch.randn(RANK, hidden, generator=generator) * 0.05
            tensors[f"{name}.lora_B.weight"] = torch.randn(out, RANK, generator=generator) * 0.05
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    adapter = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": list(MODULES), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    return folder
