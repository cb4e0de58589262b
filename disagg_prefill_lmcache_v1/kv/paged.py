"""LMCache's seam to a device's KV cache, over a layout that was learned."""

from __future__ import annotations

from typing import Any

import torch
from lmcache.logging import init_logger
from lmcache.v1.gpu_connector.gpu_connectors import GPUConnectorInterface
from lmcache.v1.memory_management import MemoryObj
from vllm.config import VllmConfig

from disagg_prefill_lmcache_v1.kv.layout import BlockLayout, UnsupportedKVLayout
from disagg_prefill_lmcache_v1.kv.mover import KVMover

logger = init_logger(__name__)


class PagedKVConnector(GPUConnectorInterface):
    """LMCache's device seam over a KV cache layout that was learned; "gpu" is LMCache's word for the device.

    Args:
        heads, head_size: KV heads of this tensor parallel rank.
    """

    def __init__(self, vllm_config: VllmConfig, heads: int, head_size: int) -> None:
        self._vllm_config = vllm_config
        self._heads, self._head_size = heads, head_size
        self._mover: KVMover | None = None

    def register(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Learn the layout of the registered caches.

        Args:
            kv_caches: layer name to ``[num_blocks, ...]``, any order of heads, tokens and K/V within a block.

        Raises:
            UnsupportedKVLayout: it cannot be moved exactly.
        """
        layers = self._vllm_config.compilation_config.static_forward_context
        layouts: dict[tuple[Any, ...], BlockLayout] = {}
        learned = []
        for name, cache in kv_caches.items():
            layer = layers.get(name)
            impl = getattr(layer, "impl", None)
            if not isinstance(cache, torch.Tensor) or not hasattr(impl, "do_kv_cache_update"):
                raise UnsupportedKVLayout(f"layer {name}: {type(impl).__name__} has no KV cache update to learn from")
            isa = getattr(layer, "isa", getattr(impl, "isa", None))
            kind = (isa, type(impl), cache.shape[1:], cache.stride()[1:], cache.dtype)
            if kind not in layouts:
                layouts[kind] = self._learn(name, cache, layer, impl)
                logger.info("KV layout learned: %s, isa %s, %s", type(impl).__name__, isa, layouts[kind].summary)
            learned.append(layouts[kind])
        if any(layout is not learned[0] for layout in learned):
            raise UnsupportedKVLayout("layers with different KV cache layouts cannot be moved (hybrid model)")
        self._mover = KVMover(list(kv_caches.values()), learned[0])

    def _learn(self, name: str, cache: torch.Tensor, layer: Any, impl: Any) -> BlockLayout:
        def write(key: torch.Tensor, value: torch.Tensor, scratch: torch.Tensor, slots: torch.Tensor) -> None:
            impl.do_kv_cache_update(layer, key, value, scratch, slots)

        # Written as another shape than the layer's, a block is overrun: vLLM's kernels do not check.
        shape = tuple(getattr(impl, part, None) for part in ("num_kv_heads", "head_size"))
        if None not in shape and shape != (self._heads, self._head_size):
            raise UnsupportedKVLayout(
                f"layer {name} has {shape[0]} KV heads of {shape[1]}, the model's configuration says {self._heads} of "
                f"{self._head_size}: layers of different shapes cannot be moved"
            )
        # The attention kernel's block may be a part of the scheduler's: what counts is how many tokens a block holds.
        block_size = cache[0].numel() // (2 * self._heads * self._head_size)
        shape = (self._heads, block_size, self._head_size)
        try:
            return BlockLayout.learn(write, cache.shape[1:], *shape, cache.dtype, cache.device, cache.stride()[1:])
        except UnsupportedKVLayout as error:
            raise UnsupportedKVLayout(f"layer {name}: {error}") from None
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
            shown = f"KV cache of shape {tuple(cache.shape)}: {type(impl).__name__} cannot fill one block of it"
            raise UnsupportedKVLayout(f"layer {name}: {shown} ({error})") from error

    @property
    def mover(self) -> KVMover:
        if self._mover is None:
            raise RuntimeError("KV caches are not registered yet")
        return self._mover

    def from_gpu(self, memory_obj: MemoryObj, start: int, end: int, **kwargs: Any) -> None:
        self.mover.gather(memory_obj.tensor, kwargs["slot_mapping"][start:end])

    def to_gpu(self, memory_obj: MemoryObj, start: int, end: int, **kwargs: Any) -> None:
        # Blocks that vLLM had cached may be shared with running requests: only the tokens after them are written.
        first = max(start, int(kwargs.get("vllm_cached_tokens", 0)))
        if first < end:
            self.mover.scatter(memory_obj.tensor[:, :, first - start :], kwargs["slot_mapping"][first:end])

    def batched_from_gpu(self, memory_objs: Any, starts: list[int], ends: list[int], **kwargs: Any) -> None:
        for memory_obj, start, end in zip(memory_objs, starts, ends, strict=True):
            self.from_gpu(memory_obj, start, end, **kwargs)

    def batched_to_gpu(self, memory_objs: Any = None, starts: Any = None, ends: Any = None, **kwargs: Any) -> None:
        for memory_obj, start, end in zip(memory_objs, starts, ends, strict=True):
            self.to_gpu(memory_obj, start, end, **kwargs)

    def get_shape(self, num_tokens: int) -> torch.Size:
        return self.mover.shape(num_tokens)
