"""vLLM's paged KV cache, read and written as LMCache chunks, whatever its layout.

vLLM's CPU attention packs keys and values per instruction set (transposed, interleaved, ...), its CUDA backends differ
from one version to the next, and none of it is an interface. A wrong guess moves whole blocks correctly and corrupts
part-filled ones, or everything, without an error. So nothing is guessed here: ``BlockLayout.learn`` writes numbered
keys and values through the layer's own cache-update function into a one-block scratch cache and reads back where each
went. What cannot be learned is refused when the server starts.

Stored chunks have LMCache's ``KV_2LTD`` format, ``[2, layers, tokens, kv_heads * head_size]``, on every device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


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


def is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether the elements fill a piece of memory without gaps, each place once, in whatever order of axes."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(strides, shape, strict=True) if size > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _find_positions(
    write_block: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], shape: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    """Where each element of K and V (``shape``: ``[2, block_size, heads, head_size]``) lies in a block.

    Args:
        write_block: writes K and V of a block, returns its memory.
    """
    cells = math.prod(shape)
    number = torch.arange(1, cells + 1)
    found = torch.zeros(cells, dtype=torch.int64)
    weight = 1
    while weight <= cells:
        digit = (number // weight % _RADIX).to(dtype).view(shape)
        found += write_block(digit[0], digit[1]).round().to(torch.int64) * weight
        weight *= _RADIX
    if int(found.min()) < 1 or int(found.max()) > cells:
        raise UnsupportedKVLayout("vLLM's cache update does not store K and V as they are (quantised KV cache?)")
    position = torch.full((cells + 1,), -1, dtype=torch.int64)
    position[found] = torch.arange(cells)
    position = position[1:]
    if int(position.min()) < 0:
        raise UnsupportedKVLayout("vLLM's cache update stores several K or V elements in one place")
    return position.view(shape)


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
        cells = math.prod(block_shape)
        if cells != 2 * per_side:
            raise UnsupportedKVLayout(
                f"a KV block of shape {tuple(block_shape)} has {cells} elements; {2 * per_side} are needed for "
                f"{block_size} tokens x {heads} KV heads x {head_size} x 2 (K and V): padded, compressed (MLA) or "
                "quantised KV caches cannot be moved"
            )
        if block_strides is None:
            block_strides = torch.empty(tuple(block_shape), device="meta").stride()
        if not is_dense(block_shape, block_strides):
            raise UnsupportedKVLayout(
                f"a KV block of shape {tuple(block_shape)} and strides {tuple(block_strides)} has gaps or overlaps"
            )

        def write_block(key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            memory = torch.zeros(cells, dtype=dtype, device=device)
            cache = memory.as_strided((1, *block_shape), (cells, *block_strides))
            slots = torch.arange(block_size, device=device)
            write(key.to(device).contiguous(), value.to(device).contiguous(), cache, slots)
            return memory.cpu()

        position = _find_positions(write_block, (2, block_size, heads, head_size), dtype)
        head_stride = int(position[0, 0, 1, 0] - position[0, 0, 0, 0]) if heads > 1 else cells
        regular = all(torch.equal(position[:, :, h], position[:, :, 0] + h * head_stride) for h in range(heads))
        views: list[tuple[list[int], list[int], int] | None] = []
        for side in position[:, :, 0]:
            strides = _as_strides(side) if regular else None
            views.append((*strides, int(side[0, 0])) if strides else None)
        return cls(heads, block_size, head_size, position, (views[0], views[1]), head_stride)
