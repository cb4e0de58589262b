"""vLLM's paged KV cache, read and written as LMCache chunks, whatever its layout.

vLLM's CPU attention packs keys and values per instruction set (transposed, interleaved, ...), its CUDA backends differ
from one version to the next, and none of it is an interface. A wrong guess moves whole blocks correctly and corrupts
part-filled ones, or everything, without an error. So nothing is guessed here: ``BlockLayout.learn`` writes numbered
keys and values through the layer's own cache-update function into a one-block scratch cache and reads back where each
went. What cannot be learned is refused when the server starts.

Stored chunks have LMCache's ``KV_2LTD`` format, ``[2, layers, tokens, kv_heads * head_size]``, on every device.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from disagg_prefill_lmcache_v1.kv.host_copy import HostCopies


class UnsupportedKVLayout(ValueError):
    """This KV cache cannot be moved exactly; the server must not start with it."""


# 0..127 is exact in every dtype that KV is stored in (float32, float16, bfloat16).
_RADIX = 128


def _prime_digits(size: int) -> list[int]:
    """Prime factors of ``size``, largest last: the mixed radix in which indices are taken apart."""
    factors, n, p = [], size, 2
    while n > 1:
        while n % p == 0:
            factors.append(p)
            n //= p
        p += 1
    return factors


def _as_strides(position: torch.Tensor) -> tuple[list[int], list[int]] | None:
    """Express ``position[i, j]`` as a strided view, if it is one.

    Args:
        position: ``[rows, columns]`` int64, the offset of each element.

    Returns:
        ``(sizes, strides)`` so that ``as_strided(sizes, strides)`` lists the elements in row-major ``(i, j)`` order;
        None when no such view exists (the caller falls back to indexing element by element).
    """
    dims: list[tuple[int, int]] = []  # (size, stride), outermost first
    for axis, size in ((0, position.shape[0]), (1, position.shape[1])):
        line = position[:, 0] if axis == 0 else position[0]
        digits: list[tuple[int, int]] = []  # innermost first
        step = 1
        for radix in _prime_digits(size):
            stride = int(line[step] - line[0])
            if digits and stride == digits[-1][0] * digits[-1][1]:
                digits[-1] = (digits[-1][0] * radix, digits[-1][1])
            else:
                digits.append((radix, stride))
            step *= radix
        dims += reversed(digits)
    sizes, strides = [d[0] for d in dims], [d[1] for d in dims]
    if not sizes or any(s <= 0 for s in strides):
        return None
    flat = torch.zeros((), dtype=torch.int64)
    for size, stride in dims:
        flat = flat.unsqueeze(-1) + torch.arange(size) * stride
    return (sizes, strides) if torch.equal(flat.reshape(-1) + position[0, 0], position.reshape(-1)) else None


def _is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether the elements fill a piece of memory without gaps, each place once, in whatever order of axes."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(strides, shape, strict=True) if size > 1):
        if stride != expected:
            return False
        expected *= size
    return True


@dataclass(frozen=True)
class BlockLayout:
    """Where the elements of one KV cache block lie.

    Attributes:
        heads, block_size, head_size: of one tensor parallel rank.
        position: ``[2, block_size, heads, head_size]`` int64, offset of each K (0) and V (1) element in the block.
        views: for K and V the ``(sizes, strides, offset)`` of one head's ``[block_size, head_size]`` elements as a
            strided view, or None where only element-wise indexing describes it.
        head_stride: distance of two heads in the block, in elements.
    """

    heads: int
    block_size: int
    head_size: int
    position: torch.Tensor
    views: tuple[tuple[list[int], list[int], int] | None, tuple[list[int], list[int], int] | None]
    head_stride: int

    @property
    def summary(self) -> str:
        """In words, for the log."""
        packed = ", ".join("by index" if view is None else f"as {view[0]} by {view[1]}" for view in self.views)
        return f"block of {self.block_size} tokens, {self.heads} KV heads of {self.head_size}; K, V {packed}"

    @property
    def run(self) -> int:
        """Elements of one K or V vector that lie side by side: what an index can move at once."""
        return self._run_of(self.position)

    def side_run(self, side: int) -> int:
        """The same of K (0) or V (1) alone."""
        return self._run_of(self.position[side : side + 1])

    def _run_of(self, position: torch.Tensor) -> int:
        run = self.head_size
        while run > 1:
            parts = position.view(-1, self.block_size, self.heads, self.head_size // run, run)
            aligned = not bool((parts[..., 0] % run).any())
            if aligned and torch.equal(parts, parts[..., :1] + torch.arange(run)):
                break
            run = run // 2 if run % 2 == 0 else 1
        return run

    @property
    def elements(self) -> int:
        """Elements of one block, K and V of all heads."""
        return 2 * self.heads * self.block_size * self.head_size

    @classmethod
    def learn(
        cls,
        write: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], Any],
        block_shape: Sequence[int],
        heads: int,
        block_size: int,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        block_strides: Sequence[int] | None = None,
    ) -> BlockLayout:
        """Find the layout by writing numbered elements through vLLM's own cache update.

        Args:
            write: ``write(key, value, cache, slot_mapping)``; key and value are ``[tokens, heads, head_size]``,
                cache is ``[1, *block_shape]``, slot_mapping ``[tokens]`` int64.
            block_shape, block_strides: of one block as vLLM holds it; without strides it is contiguous.
            dtype, device: of the KV cache.

        Raises:
            UnsupportedKVLayout: the block does not hold exactly one place for each K and V element.
        """
        per_side = block_size * heads * head_size
        cells = 1
        for n in block_shape:
            cells *= n
        if cells != 2 * per_side:
            raise UnsupportedKVLayout(
                f"a KV block of shape {tuple(block_shape)} has {cells} elements; {2 * per_side} are needed for "
                f"{block_size} tokens x {heads} KV heads x {head_size} x 2 (K and V): padded, compressed (MLA) or "
                "quantised KV caches cannot be moved"
            )
        if block_strides is None:
            block_strides = torch.empty(tuple(block_shape), device="meta").stride()
        if not _is_dense(block_shape, block_strides):
            raise UnsupportedKVLayout(
                f"a KV block of shape {tuple(block_shape)} and strides {tuple(block_strides)} has gaps or overlaps"
            )
        number = torch.arange(1, 2 * per_side + 1)
        found = torch.zeros(2 * per_side, dtype=torch.int64)
        slots = torch.arange(block_size, device=device)
        place, weight = 1, 1
        while place <= 2 * per_side:
            digit = (number // weight % _RADIX).to(dtype).view(2, block_size, heads, head_size).to(device)
            memory = torch.zeros(cells, dtype=dtype, device=device)
            cache = memory.as_strided((1, *block_shape), (cells, *block_strides))
            write(digit[0].contiguous(), digit[1].contiguous(), cache, slots)
            found += memory.cpu().round().to(torch.int64) * weight
            weight *= _RADIX
            place *= _RADIX
        position = torch.full((2 * per_side + 1,), -1, dtype=torch.int64)
        if int(found.min()) < 1 or int(found.max()) > 2 * per_side:
            raise UnsupportedKVLayout("vLLM's cache update does not store K and V as they are (quantised KV cache?)")
        position[found] = torch.arange(2 * per_side)
        position = position[1:]
        if int(position.min()) < 0:
            raise UnsupportedKVLayout("vLLM's cache update stores several K or V elements in one place")
        position = position.view(2, block_size, heads, head_size)
        head_stride = int(position[0, 0, 1, 0] - position[0, 0, 0, 0]) if heads > 1 else cells
        regular = all(torch.equal(position[:, :, h], position[:, :, 0] + h * head_stride) for h in range(heads))
        views: list[tuple[list[int], list[int], int] | None] = []
        for side in position[:, :, 0]:
            strides = _as_strides(side) if regular else None
            views.append((*strides, int(side[0, 0])) if strides else None)
        return cls(heads, block_size, head_size, position, (views[0], views[1]), head_stride)


class KVMover:
    """Copies tokens between a server's paged KV caches and chunk tensors.

    On the CPU kv_host_copy.py does it; elsewhere all tokens move by index on the device, a whole chunk at a time, and
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
            if not _is_dense(cache.shape[1:], cache.stride()[1:]):
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
