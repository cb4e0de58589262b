"""Copies tokens between vLLM's paged KV caches and chunks, by a layout that was learned (layout.py)."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch

from disagg_prefill_lmcache_v1.kv.host_copy import HostCopies
from disagg_prefill_lmcache_v1.kv.layout import BlockLayout, UnsupportedKVLayout, is_dense


class KVMover:
    """Copies tokens between a server's paged KV caches and chunk tensors.

    On the CPU host_copy.py does it; elsewhere all tokens move by index on the device, a whole chunk at a time, and
    cross to or from the host in one copy. All of it is exact, no loop runs over tokens.

    Args:
        caches: the layers' KV caches, each ``[num_blocks, ...]``; one block fills a piece of memory, in any order.
        layout: layout of one block, the same in every layer.

    Raises:
        UnsupportedKVLayout: caches of different shape or dtype, or blocks with gaps.
    """

    def __init__(self, caches: Sequence[torch.Tensor], layout: BlockLayout) -> None:
        first = caches[0]
        for cache in caches:
            alike = (cache.shape, cache.stride(), cache.dtype, cache.device)
            if alike != (first.shape, first.stride(), first.dtype, first.device):
                raise UnsupportedKVLayout("layers with different KV caches cannot be moved (hybrid model)")
            if not is_dense(cache.shape[1:], cache.stride()[1:]):
                raise UnsupportedKVLayout("a KV cache block is not contiguous in memory")
        self.layout = layout
        self.caches = list(caches)
        self.dtype = first.dtype
        self.device = first.device
        self._host = threading.local()  # each thread that copies has scratch memory of its own
        if self.device.type == "cpu":
            self._host.copies = HostCopies(caches, layout)  # errors come now, not with the first request
        # for the index: each layer as rows of `run` elements, and where the rows of a token begin
        run = layout.run
        if any(c.stride(0) % run or c.storage_offset() % run for c in caches):
            run = 1
        self._rows = [
            c.as_strided((((c.shape[0] - 1) * c.stride(0) + layout.elements) // run, run), (run, 1)) for c in caches
        ]
        self._row_stride = first.stride(0) // run
        self._run = run
        # the same rows in the widest elements that fit: fewer of them to move
        self._wide = next(
            (
                wide
                for wide in (torch.int64, torch.int32)
                if wide.itemsize > self.dtype.itemsize
                and run * self.dtype.itemsize % wide.itemsize == 0
                and all(c.data_ptr() % wide.itemsize == 0 for c in caches)
            ),
            None,
        )
        self._wide_rows = [r.view(self._wide) if self._wide is not None else r for r in self._rows]
        starts = layout.position.view(2, layout.block_size, -1, run)[..., 0] // run
        self._row_of = starts.to(self.device)  # [2, block_size, heads * head_size / run]

    def shape(self, tokens: int) -> torch.Size:
        """Shape of a chunk of ``tokens`` tokens: ``[2, layers, tokens, heads * head_size]``."""
        return torch.Size((2, len(self.caches), tokens, self.layout.heads * self.layout.head_size))

    def gather(self, chunk: torch.Tensor, slots: torch.Tensor) -> None:
        """Copy the tokens at ``slots`` (``[tokens]`` int64) from all layers into ``chunk`` (``shape(tokens)``)."""
        self._move(chunk, slots, to_cache=False)

    def scatter(self, chunk: torch.Tensor, slots: torch.Tensor) -> None:
        """Copy ``chunk`` (``shape(tokens)``) into all layers at ``slots`` (``[tokens]`` int64)."""
        self._move(chunk, slots, to_cache=True)

    def _move(self, chunk: torch.Tensor, slots: torch.Tensor, to_cache: bool) -> None:
        if chunk.shape != self.shape(slots.numel()) or chunk.dtype != self.dtype:
            raise ValueError(
                f"chunk of shape {tuple(chunk.shape)} and {chunk.dtype}; this server's KV cache needs "
                f"{tuple(self.shape(slots.numel()))} and {self.dtype}"
            )
        if self.device.type != "cpu":
            self._move_on_device(chunk, slots.to(self.device), to_cache)
            return
        copies = getattr(self._host, "copies", None)
        if copies is None:
            copies = self._host.copies = HostCopies(self.caches, self.layout)
        copies.move(chunk, slots, to_cache)

    def _move_on_device(self, chunk: torch.Tensor, slots: torch.Tensor, to_cache: bool) -> None:
        # On the device's current stream, which is the one that vLLM computes on: nothing can overtake.
        if to_cache:
            self._move_tokens(chunk.to(self.device, non_blocking=True), slots, to_cache)
            # the staging memory goes back to the pool when this returns
            torch.accelerator.current_stream().synchronize()
            return
        staging = torch.empty(chunk.shape, dtype=chunk.dtype, device=self.device)
        self._move_tokens(staging, slots, to_cache)
        chunk.copy_(staging)

    def rows_of(self, slots: torch.Tensor) -> torch.Tensor:
        """Which rows of a layer's cache hold the tokens at ``slots`` (``[tokens]`` int64 on the device).

        Returns:
            ``[2, tokens, rows]`` int64: K, V; made once for many calls of :meth:`move_rows`.
        """
        size = self.layout.block_size
        return self._row_of[:, slots % size] + (slots // size * self._row_stride)[None, :, None]

    def row_views(self, chunk: torch.Tensor) -> list[list[torch.Tensor]]:
        """``chunk`` (``shape(tokens)``, on the device) as :meth:`move_rows` takes it; can be kept and used again."""
        if self._wide is not None:
            chunk = chunk.view(self._wide)
        width = self._wide_rows[0].shape[1]
        return [[chunk[side, layer].view(-1, width) for layer in range(len(self.caches))] for side in range(2)]

    def move_rows(self, views: list[list[torch.Tensor]], rows: torch.Tensor, to_cache: bool) -> None:
        """Copy tokens by their ``rows`` into a chunk (its ``row_views``) or from it.

        Only starts work on the device's current stream: one operation for K and one for V of each layer.
        """
        for side in range(2):
            index = rows[side].reshape(-1)
            for cache, plain in zip(self._wide_rows, views[side], strict=True):
                if to_cache:
                    cache.index_copy_(0, index, plain)
                else:
                    torch.index_select(cache, 0, index, out=plain)

    def _move_tokens(self, chunk: torch.Tensor, slots: torch.Tensor, to_cache: bool) -> None:
        size = self.layout.block_size
        first_rows = (slots // size * self._row_stride).unsqueeze(1)
        for side in range(2):
            index = (self._row_of[side][slots % size] + first_rows).view(-1)
            for layer, rows in enumerate(self._rows):
                plain = chunk[side, layer].view(-1, self._run)
                if to_cache:
                    rows.index_copy_(0, index, plain)
                else:
                    torch.index_select(rows, 0, index, out=plain)
