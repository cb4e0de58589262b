"""What is supported of a server's configuration, and which ways are taken: decided at start, refused clearly."""

from __future__ import annotations

import importlib
from typing import Any

from lmcache.v1.storage_backend.local_cpu_backend import LocalCPUBackend
from vllm.config import VllmConfig

from disagg_prefill_lmcache_v1.kv.layout import UnsupportedKVLayout


def refuse_model(vllm_config: VllmConfig) -> None:
    """Raise ValueError if KV that is stored by token ids, of all layers, is not all that this server needs."""
    model = vllm_config.model_config
    if getattr(model, "enable_prompt_embeds", False):
        # LMCache would end the engine at the first one
        raise ValueError("--enable-prompt-embeds is not supported: KV is stored by token ids, embeddings have none")
    if getattr(model, "is_encoder_decoder", False) is True:
        raise UnsupportedKVLayout(
            "encoder-decoder models are not supported: their cross-attention KV belongs to the encoder's input, not to "
            "tokens; take a decoder-only model, or serve this one without a KV connector"
        )
    if getattr(model, "is_attention_free", False) is True or getattr(model, "has_inner_state", False) is True:
        raise UnsupportedKVLayout(
            "models with Mamba or linear attention layers are not supported: their state cannot be stored by tokens; "
            "take another model, or serve this one without a KV connector"
        )
    parallel = vllm_config.parallel_config
    stages = parallel.pipeline_parallel_size
    if stages > 1:
        raise ValueError(
            f"--pipeline-parallel-size {stages} is not supported: each stage has the KV of its own layers alone; take "
            "--tensor-parallel-size"
        )
    # vLLM starts the ranks of a dense model as engines of size 1, of which the later ones have a rank
    if parallel.data_parallel_size > 1 or parallel.data_parallel_rank_local:
        raise ValueError(
            "--data-parallel-size is not supported: LMCache takes another rank's device; start several servers, which "
            "the proxy spreads requests over"
        )


def choose_copy(vllm_config: VllmConfig, asked: str) -> str:
    """Who copies between the KV cache and chunks: "own", "stock" (LMCache) or "auto": own if the layout is learned.

    ``asked`` is ``DISAGG_KV_COPY``. By default ("auto") it is our own on CPU and CUDA and LMCache's on every other
    device; LMCache has none for CPU, and on CUDA without its kernels a wrong one.

    Raises:
        ValueError: "stock" is asked for where that cannot be.
        UnsupportedKVLayout: our own is the only one, and would move this KV cache wrongly.
    """
    device = vllm_config.device_config.device.type
    no_stock = device == "cpu" or (device == "cuda" and not lmcache_is_compiled())
    if asked == "stock" and no_stock:
        raise ValueError(f"DISAGG_KV_COPY=stock: LMCache cannot copy the KV cache on {device} here; use auto")
    if asked == "stock" or (asked == "auto" and device not in ("cpu", "cuda")):
        return "stock"
    problem = ""
    dtype = str(vllm_config.cache_config.cache_dtype)
    if vllm_config.model_config.use_mla:
        problem = f"MLA models are not supported on {device}: their KV cache holds no K and V per head"
    elif dtype not in ("auto", "float32", "float16", "bfloat16"):
        problem = f"--kv-cache-dtype {dtype} is not supported on {device}: use auto"
    if asked == "own" or no_stock:
        if problem:
            raise UnsupportedKVLayout(problem)
        return "own"
    return "stock" if problem else "auto"


def choose_async_load(vllm_config: VllmConfig, asked: str) -> bool:
    """Whether loads are asynchronous to vLLM: it computes other requests meanwhile, and recomputes what fails.

    ``asked`` is ``DISAGG_KV_ASYNC_LOAD``. In the step, a load holds all running requests, but on the CPU, where both
    share cores, it is quicker. With asynchronous scheduling only asynchronous loads are right: a failed synchronous one
    is answered from bad KV (vllm#49250).

    Raises:
        ValueError: "never" is asked for where only asynchronous loads are right.
    """
    overlapped = bool(vllm_config.scheduler_config.async_scheduling)
    if asked == "never" and overlapped:
        raise ValueError(
            "DISAGG_KV_ASYNC_LOAD=never needs --no-async-scheduling: with it vLLM answers a request from KV that "
            "could not be loaded (vllm#49250)"
        )
    return asked == "always" or (asked == "auto" and (overlapped or vllm_config.device_config.device.type == "cuda"))


def one_store_only(engine: Any) -> bool:
    """Whether LMCache is set up for what transfer.py does: whole requests, one store, no other place."""
    config = engine.config
    other_ways = (
        config.use_layerwise,
        config.enable_blending,
        config.local_cpu,
        config.enable_async_loading,
        config.enable_pd,
        config.enable_p2p,
        engine.save_only_first_rank,
        engine.kv_events_enabled,
        config.remote_serde != "naive",
    )
    stores = [b for b in engine.storage_manager.storage_backends.values() if not isinstance(b, LocalCPUBackend)]
    return not any(other_ways) and len(stores) == 1


def lmcache_is_compiled() -> bool:
    """Whether LMCache's CUDA kernels load.

    Without them it copies with torch operations that take the packed KV cache of vLLM's FlashAttention (since 0.26) for
    another layout, and stores other tokens' memory without an error.
    """
    try:
        importlib.import_module("lmcache.cuda_ops")
    except ImportError:
        return False
    return True
