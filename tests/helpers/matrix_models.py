"""Small random models, one for each kind of KV cache that the support matrix has a row for.

Two layers, built in a second: nothing is downloaded. With transformers' usual spread of weights a random model repeats
one token whatever its KV cache holds; with this one every answer depends on the whole prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

VOCABULARY = 1024
IMAGE_TOKEN = 3
IMAGE_TOKENS = 7  # that one image becomes in a prompt
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
    "encoder": _of("WhisperConfig", d_model=128, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
                   decoder_attention_heads=2, encoder_ffn_dim=256, decoder_ffn_dim=256, max_target_positions=448),
    # says 2 KV heads, as do the others, and has 4
    "odd": _of("GPT2Config", n_embd=256, n_head=4, n_layer=2, n_positions=4096, n_inner=512),
}  # fmt: skip


def build(kind: str, folder: str) -> None:
    """Write the model of a kind, if it is not there yet."""
    import torch
    import transformers

    if Path(folder, "config.json").exists():
        return
    torch.manual_seed(0)
    if kind in QUANTISED:
        _quantised(Path(folder), QUANTISED[kind])
    elif kind == "idefics3":
        _idefics3(folder)
    else:
        auto = transformers.AutoModelForSpeechSeq2Seq if kind == "encoder" else transformers.AutoModelForCausalLM
        auto.from_config(CONFIGS[kind]()).float().save_pretrained(folder)
    if kind == "encoder":
        transformers.WhisperProcessor(
            transformers.WhisperFeatureExtractor(), transformers.WhisperTokenizer()
        ).save_pretrained(folder)


# Settings of quantised Linear layers, as a model's config.json has them.
_INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
QUANTISED: dict[str, dict[str, Any]] = {
    "w8a8": {
        "quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {
            "targets": ["Linear"], "weights": {**_INT8, "strategy": "channel", "dynamic": False},
            "input_activations": {**_INT8, "strategy": "token", "dynamic": True},
        }},
    },
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False, "sym": True},
}  # fmt: skip


def _quantised(folder: Path, settings: dict[str, Any]) -> None:
    """A Llama of random int8 or int4 weights; the int4 ones are drawn as they are packed, eight to an int32."""
    import torch
    import transformers
    from safetensors.torch import save_file

    config = CONFIGS["gqa"]()
    tensors: dict[str, Any] = {}
    for name, weight in transformers.LlamaForCausalLM(config).state_dict().items():
        layer = name.removesuffix(".weight")
        if not name.endswith("_proj.weight"):
            tensors[name] = weight.clone()
        elif settings["quant_method"] == "compressed-tensors":
            scale = weight.abs().amax(1, keepdim=True) / 127
            tensors[name] = (weight / scale).round().to(torch.int8)
            tensors[f"{layer}.weight_scale"] = scale
        else:
            tensors |= {f"{layer}.{part}": value for part, value in _int4(weight, settings).items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.architectures, config.quantization_config = ["LlamaForCausalLM"], settings
    config.save_pretrained(folder)


def _int4(weight: Any, settings: dict[str, Any]) -> dict[str, Any]:
    import torch

    outputs, inputs = weight.shape
    groups = inputs // settings["group_size"]
    spread = weight.std() / 4.6  # that of the numbers 0 to 15
    awq = settings["quant_method"] == "awq"

    def any_int32(*shape: int) -> Any:
        return torch.randint(-(1 << 31), 1 << 31, shape, dtype=torch.int64).to(torch.int32)

    middle = torch.full((groups, outputs // 8), int("8" * 8 if awq else "7" * 8, 16) - (1 << 32 if awq else 0))
    packed = {
        "qweight": any_int32(*((inputs, outputs // 8) if awq else (inputs // 8, outputs))),
        "qzeros": middle.to(torch.int32),
        "scales": torch.full((groups, outputs), float(spread), dtype=torch.bfloat16),
    }
    return packed if awq else {**packed, "g_idx": (torch.arange(inputs) // settings["group_size"]).to(torch.int32)}


def _idefics3(folder: str) -> None:
    """A Llama that sees images of 64 x 64 pixels as tokens, and the processor that prepares them.

    Of the kinds of vision-language models that vLLM has, one that it runs without torchvision.
    """
    import tokenizers
    import transformers
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    names = ["<s>", "</s>", "<unk>", "<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
    names += [f"t{i}" for i in range(len(names), VOCABULARY)]
    words = tokenizers.models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(words), bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        pad_token="</s>", additional_special_tokens=names[3:7],
    )  # fmt: skip
    size = {"longest_edge": 64}
    images = Idefics3ImageProcessorPil(size=size, max_image_size=size, do_image_splitting=False)
    vision = {
        "model_type": "idefics3_vision", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": 64, "patch_size": 16, "initializer_range": 0.12,
    }  # fmt: skip
    config = transformers.Idefics3Config(
        vision_config=vision, text_config={"model_type": "llama", **SMALL}, image_token_id=IMAGE_TOKEN, scale_factor=2,
        bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    transformers.Idefics3ForConditionalGeneration(config).float().save_pretrained(folder)
    transformers.Idefics3Processor(images, tokenizer, image_seq_len=4).save_pretrained(folder)
