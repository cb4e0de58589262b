"""LMCache's engine, made before LMCache makes it: with our copy, and with errors that end the start.

LMCache takes an engine that is already there, and turns an error of its own into a server without reuse.
"""

from __future__ import annotations

from lmcache.integration.vllm.utils import ENGINE_NAME, lmcache_get_or_create_config, vllm_layout_hints
from lmcache.integration.vllm.vllm_service_factory import VllmServiceFactory
from lmcache.utils import EngineType
from lmcache.v1.cache_engine import LMCacheEngineBuilder
from lmcache.v1.gpu_connector import CreateGPUConnector
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import get_tp_group

from disagg_prefill_lmcache_v1.kv import patches
from disagg_prefill_lmcache_v1.kv.fingerprint import draft_layers, model_fingerprint
from disagg_prefill_lmcache_v1.kv.identity import IdentifiedTokens, model_key
from disagg_prefill_lmcache_v1.kv.paged import PagedKVConnector


def make_engine(vllm_config: VllmConfig, copy: str) -> PagedKVConnector | None:
    """Create LMCache's engine.

    Args:
        copy: who copies between KV cache and chunks; see support.choose_copy.

    Returns:
        Our copy, whose layout is still to be learned; None where LMCache's is used.
    """
    config = lmcache_get_or_create_config()
    metadata = VllmServiceFactory(config, vllm_config, "worker").get_or_create_metadata()
    metadata.model_name = model_key(metadata.model_name, model_fingerprint(vllm_config))
    layers, *others = metadata.kv_shape
    metadata.kv_shape = (layers + draft_layers(vllm_config.speculative_config), *others)
    if vllm_config.device_config.device.type == "cpu":
        patches.survive_seeded_requests()
    paged = PagedKVConnector(vllm_config, *metadata.kv_shape[3:5]) if copy != "stock" else None
    if copy == "own":
        device_connector = paged
    else:
        hints = vllm_layout_hints(vllm_config)
        device_connector = CreateGPUConnector(config, metadata, EngineType.VLLM, layout_hints=hints)
        patches.order_streams(device_connector)
    group = get_tp_group()
    patches.leave_out_offload_server()
    engine = LMCacheEngineBuilder.get_or_create(
        ENGINE_NAME, config, metadata, device_connector, group.broadcast, group.broadcast_object
    )
    patches.wrap_token_database(engine, IdentifiedTokens)
    return paged
