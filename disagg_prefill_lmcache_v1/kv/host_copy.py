"""Fast copies between packed KV caches in host memory and chunks, on one core and without a compiler.

What the learned layout says decides, for keys and values apart, how they move (all exact, as bits):

- ``_Rows``: vectors, or large pieces of them, lie side by side (V of most packings). They are picked or placed by
  index, in the order of the chunk, any slots at once.
- ``_Packed``: elements of several tokens lie side by side (K transposed within a block, K or V in pairs). A group of
  layers goes through a scratch buffer that fits the CPU's caches: copied there in long pieces, transposed there in
  units of 32 bits by the one torch operator that does it with SIMD shuffles, and copied out in long pieces.
- ``_Rows`` with rows of one element for anything else: slow and right.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from disagg_prefill_lmcache_v1.kv.layout import BlockLayout

# Rows of this many bytes or more move by index; shorter ones are worth a scratch buffer.
_ROW_BYTES = 64
# What one transposition takes in: large enough for long copies, small enough for a core's caches.
_SCRATCH_BYTES = 1 << 20
# Fewer tokens in a row than this, on average: index them one by one.
_SHORT_RUN = 4


class _Run(NamedTuple):
    """Tokens ``first`` to ``first + stop - start`` of a chunk lie at ``start`` to ``stop`` of ``block``."""

    first: int
    block: int
    start: int
    stop: int


def _runs(slots: np.ndarray, size: int) -> list[_Run]:
    """Cut ``slots`` where the next slot is not the following one of the same block of ``size`` tokens."""
    jumps = (np.flatnonzero(slots[1:] - slots[:-1] != 1) + 1).tolist()
    runs = []
    for first, last in zip([0, *jumps], [*jumps, len(slots)], strict=True):
        block, start = divmod(slots.item(first), size)
        while first < last:
            stop = min(size, start + last - first)
            runs.append(_Run(first, block, start, stop))
            first, block, start = first + stop - start, block + 1, 0
    return runs


def _flat(cache: torch.Tensor, elements: int) -> np.ndarray:
    """All of ``cache`` from its first to its last element, as unsigned integers of the element's size."""
    last = (cache.shape[0] - 1) * cache.stride(0) + elements
    return _as_unsigned(cache.as_strided((last,), (1,)))


def _as_unsigned(tensor: torch.Tensor) -> np.ndarray:
    """The memory of ``tensor`` as unsigned integers of its elements' size; numpy has no bfloat16."""
    signed = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize]
    return tensor.view(signed).numpy().view(f"u{tensor.itemsize}")


def _strided(flat: np.ndarray, offset: int, shape: Sequence[int], strides: Sequence[int]) -> np.ndarray:
    """A view of ``flat``; offset and strides in its elements."""
    return np.lib.stride_tricks.as_strided(flat[offset:], shape, [s * flat.itemsize for s in strides])


def _shuffle(batch: torch.Tensor, count: int, rows: int, columns: int) -> torch.Tensor:
    """Transpose ``count`` matrices of 32-bit words: ``[count, rows, columns]`` float32 to ``[count, columns, rows]``.

    "Channel shuffle" of channels-last images is this, and on the CPU torch does it with SIMD shuffles, three times as
    fast as any copy with strides. Nothing is computed: the bits of every word stay.
    """
    cells = rows * columns
    images = batch.as_strided((count, cells, 1, 1), (cells, 1, cells, cells))
    return torch.native_channel_shuffle(images, rows).as_strided((count, columns, rows), (cells, rows, 1))


def _shuffle_plainly(batch: torch.Tensor, count: int, rows: int, columns: int) -> torch.Tensor:
    """:func:`_shuffle` where torch's operator does not run or does something else."""
    return batch[: count * rows * columns].view(count, rows, columns).transpose(1, 2).contiguous()


def _probe_shuffle() -> bool:
    words = torch.randint(-(2**31), 2**31 - 1, (3, 40, 24), dtype=torch.int32)
    words[0, 0, :4] = torch.tensor([0x7F800001, 0x7FC00000, -0x00800000, -0x80000000])  # NaNs, infinity, minus zero
    try:
        found = _shuffle(words.view(-1).view(torch.float32), 3, 40, 24).view(torch.int32)
    except (RuntimeError, AttributeError):  # no FBGEMM for this CPU, or another torch
        return False
    return torch.equal(found, words.transpose(1, 2))


class _Rows:
    """Keys or values that move as rows of elements, picked by an index."""

    def __init__(self, flats: list[np.ndarray], layout: BlockLayout, side: int, block_stride: int) -> None:
        run = math.gcd(layout.side_run(side), block_stride)
        size = run * flats[0].itemsize
        self._dtype = np.dtype(f"u{size}") if size in (1, 2, 4, 8) else np.dtype((np.void, size))
        self._caches = [flat[: len(flat) // run * run].view(self._dtype) for flat in flats]
        self._block_rows = block_stride // run
        self._row_of = layout.position[side].view(layout.block_size, -1, run)[..., 0].div(run).long().numpy()
        self._block_size = layout.block_size
        self._side = side
        self.row_bytes = size

    def move(self, chunk: np.ndarray, slots: np.ndarray, runs: list[_Run], to_cache: bool) -> None:
        rows_of, stride = self._row_of, self._block_rows
        if len(runs) * _SHORT_RUN <= len(slots):
            parts = [rows_of[run.start : run.stop] + run.block * stride for run in runs]
            index = np.concatenate(parts) if len(parts) > 1 else parts[0]
        else:
            blocks, offsets = np.divmod(slots, self._block_size)
            index = rows_of[offsets] + (blocks * stride)[:, None]
        rows = chunk[self._side].view(self._dtype)
        for cache, plain in zip(self._caches, rows, strict=True):
            if to_cache:
                cache[index] = plain
            else:
                cache.take(index, out=plain, mode="clip")  # "raise" would copy twice; the slots were checked


class _Packed:
    """Keys or values whose innermost elements belong to several tokens or are less than a row; see the module.

    A "word" is 32 bits: one element, two neighbouring elements of a token, or the same element of two tokens ("pairs").

    Raises:
        ValueError: the layout is none of these.
    """

    def __init__(self, flats: list[np.ndarray], layout: BlockLayout, side: int, block_stride: int) -> None:
        view = layout.views[side]
        if view is None or flats[0].itemsize not in (2, 4) or sys.byteorder != "little":
            raise ValueError("no strided view of words")
        sizes, strides, offset = view
        tokens, columns, size = [], [], 1
        for digit in zip(sizes, strides, strict=True):
            (tokens if size < layout.block_size else columns).append(digit)
            size *= digit[0]
        if math.prod(n for n, _ in tokens) != layout.block_size:
            raise ValueError("tokens and columns are one digit")
        self._side, self._heads, self._flats = side, layout.heads, flats
        words = flats
        place = [offset, layout.head_stride, block_stride]
        self._pairs = False
        if flats[0].itemsize == 2:
            inner = next((digits for digits in (columns, tokens) if digits and digits[-1][1] == 1), None)
            if inner is None or inner[-1][0] % 2:
                raise ValueError("no pairs")
            self._pairs = inner is tokens
            last = inner.pop()
            if any(n % 2 for n in [*place, *(stride for _, stride in tokens + columns)]):
                raise ValueError("pairs at odd places")
            tokens, columns = ([(n, stride // 2) for n, stride in digits] for digits in (tokens, columns))
            if last[0] > 2:
                (tokens if self._pairs else columns).append((last[0] // 2, 1))
            place = [n // 2 for n in place]
            words = [flat[: len(flat) // 2 * 2].view(np.uint32) for flat in flats]
        # a group: the tokens whose words lie side by side, or else one token (or pair)
        self._transposed = bool(tokens) and tokens[-1][1] == 1 and tokens[-1][0] > 1
        group = [tokens.pop()] if self._transposed else []
        if len(tokens) > 1:
            raise ValueError("tokens in more than two digits")
        groups = tokens[0] if tokens else (1, 0)
        self._per_word = 2 if self._pairs else 1
        self._group_words = group[0][0] if group else 1
        self._group = self._group_words * self._per_word  # tokens
        self._groups = groups[0]
        self._columns = [n for n, _ in columns]
        self._width = layout.heads * math.prod(self._columns)  # words of a token (or pair)
        blocks = (len(words[0]) - place[0]) // place[2] + 1 if len(words[0]) > place[0] else 0
        shape = [blocks, self._groups, layout.heads, *self._columns, *(n for n, _ in group)]
        steps = [place[2], groups[1], place[1], *(s for _, s in columns), *(s for _, s in group)]
        self._words = [_strided(flat, place[0], shape, steps) for flat in words]
        # the same by element, for tokens that share a word with others
        self._elements = self._words
        if self._pairs:
            shape = [*shape[:-1], shape[-1] * 2] if group else [*shape, 2]
            steps = [*(2 * s for s in (steps[:-1] if group else steps)), 1]
            self._elements = [_strided(flat, offset, shape, steps) for flat in flats]
        self._shuffle = _shuffle if _probe_shuffle() else _shuffle_plainly
        self._scratch = torch.empty(0)
        self._scratch_words = np.empty(0, np.uint32)
        self._halves = np.empty(0, np.uint16)
        self._low = np.empty(0, np.uint32)

    def _span(self, run: _Run) -> tuple[int, int]:
        """The tokens of its block to handle for ``run``: whole groups, or whole words of a single group."""
        unit = self._per_word if self._groups == 1 else self._group
        return run.start // unit * unit, -(-run.stop // unit) * unit

    def _batches(self, runs: list[_Run], layers: int) -> Iterator[tuple[list[tuple[_Run, int]], int, range]]:
        """(runs with the first token of their span, tokens of a span, layers) that fit into the scratch buffer."""
        position = 0
        while position < len(runs):
            start, stop = self._span(runs[position])
            tokens = stop - start
            size = tokens // self._per_word * self._width * 4
            batch = [(runs[position], start)]
            for run in runs[position + 1 :]:
                start, stop = self._span(run)
                if stop - start != tokens or (len(batch) + 1) * size > _SCRATCH_BYTES:
                    break
                batch.append((run, start))
            position += len(batch)
            step = max(1, _SCRATCH_BYTES // (len(batch) * size))
            for layer in range(0, layers, step):
                yield batch, tokens, range(layer, min(layers, layer + step))

    def move(self, chunk: np.ndarray, slots: np.ndarray, runs: list[_Run], to_cache: bool) -> None:
        side = chunk[self._side]  # [layers, tokens, heads * head_size]
        if not self._pairs:
            side = side.view(np.uint32)
        move = self._scatter if to_cache else self._gather
        for batch, tokens, layers in self._batches(runs, len(side)):
            words = tokens // self._per_word
            count = len(layers) * len(batch) * words * self._width
            if self._scratch.numel() < count:
                self._scratch = torch.empty(count, dtype=torch.float32)
                self._scratch_words = self._scratch.numpy().view(np.uint32)
                if self._pairs:
                    self._halves, self._low = np.empty(2 * count, np.uint16), np.empty(count, np.uint32)
            move(side, batch, words, layers, self._scratch[:count])

    def _packed_shape(self, words: int) -> list[int]:
        """Shape of a span of one layer in the order of the block."""
        if not self._transposed:
            return [words, self._heads, *self._columns]
        inner = min(words, self._group_words)
        return [words // inner, self._heads, *self._columns, inner]

    def _gather(
        self, side: np.ndarray, batch: list[tuple[_Run, int]], words: int, layers: range, scratch: torch.Tensor
    ) -> None:
        count, runs = len(layers), len(batch)
        shape = self._packed_shape(words)
        packed = self._scratch_words[: scratch.numel()].reshape(count, runs, *shape)
        for i, layer in enumerate(layers):
            cache = self._words[layer]
            for k, (run, start) in enumerate(batch):
                np.copyto(packed[i, k], self._part(cache[run.block], start // self._per_word, words))
        if self._transposed:
            inner = shape[-1]
            moved = self._shuffle(scratch, scratch.numel() // (self._width * inner), self._width, inner)
            plain = moved.numpy().view(np.uint32).reshape(count, runs, words, self._width)
        else:
            plain = packed.reshape(count, runs, words, self._width)
        target = side[layers.start : layers.stop]
        for first, last, part, skip, tokens in self._pieces(batch, plain):
            if not self._pairs:
                np.copyto(target[:, first:last], part[:, skip : skip + tokens])
                continue
            # in cache first: one long copy to the chunk is faster than two with gaps
            halves = self._halves[: part.size * 2].reshape(count, -1, 2, self._width)
            np.copyto(halves[:, :, 0], part, casting="unsafe")
            np.right_shift(part, 16, out=part)
            np.copyto(halves[:, :, 1], part, casting="unsafe")
            np.copyto(target[:, first:last], halves.reshape(count, -1, self._width)[:, skip : skip + tokens])

    def _scatter(
        self, side: np.ndarray, batch: list[tuple[_Run, int]], words: int, layers: range, scratch: torch.Tensor
    ) -> None:
        count, runs = len(layers), len(batch)
        plain = self._scratch_words[: scratch.numel()].reshape(count, runs, words, self._width)
        source = side[layers.start : layers.stop]
        for first, last, part, skip, tokens in self._pieces(batch, plain):
            if not self._pairs:
                np.copyto(part[:, skip : skip + tokens], source[:, first:last])
                continue
            halves = self._halves[: part.size * 2].reshape(count, -1, 2, self._width)
            np.copyto(halves.reshape(count, -1, self._width)[:, skip : skip + tokens], source[:, first:last])
            np.copyto(part, halves[:, :, 1])
            np.left_shift(part, 16, out=part)
            low = self._low[: part.size].reshape(part.shape)
            np.copyto(low, halves[:, :, 0])
            np.bitwise_or(part, low, out=part)
        shape = self._packed_shape(words)
        if self._transposed:
            inner = shape[-1]
            moved = self._shuffle(scratch, scratch.numel() // (self._width * inner), inner, self._width).numpy()
            packed = moved.view(np.uint32).reshape(count, runs, *shape)
        else:
            packed = plain.reshape(count, runs, *shape)
        for i, layer in enumerate(layers):
            for k, (run, start) in enumerate(batch):
                self._place(layer, packed[i, k], run, start)

    def _pieces(
        self, batch: list[tuple[_Run, int]], plain: np.ndarray
    ) -> Iterator[tuple[int, int, np.ndarray, int, int]]:
        """(first token, last + 1, their ``[layers, words, width]``, tokens of it to leave out in front, tokens)."""
        count, runs, words, width = plain.shape
        whole = words * self._per_word
        if all(run.stop - run.start == whole for run, _ in batch):
            first = batch[0][0].first
            yield first, first + runs * whole, plain.reshape(count, runs * words, width), 0, runs * whole
            return
        for k, (run, start) in enumerate(batch):
            tokens = run.stop - run.start
            yield run.first, run.first + tokens, plain[:, k], run.start - start, tokens

    def _part(self, block: np.ndarray, start: int, words: int) -> np.ndarray:
        """``words`` token words of ``block``, from ``start``, whole groups or a part of the only one."""
        if not self._transposed:
            return block[start : start + words]
        if self._groups == 1:
            return block[..., start : start + words]
        return block[start // self._group_words : (start + words) // self._group_words]

    def _place(self, layer: int, packed: np.ndarray, run: _Run, start: int) -> None:
        """Write the tokens of ``run``, and nothing else, from ``packed``, which begins with token ``start``."""
        whole, group = self._words[layer][run.block], self._group
        first, last = -(-run.start // group), run.stop // group
        base = start // group  # packed begins within this group, at its first token unless there is one group only
        if first < last:
            np.copyto(whole[first:last], packed[first - base : last - base])
        if first * group == run.start and last * group == run.stop:
            return
        block = self._elements[layer][run.block]
        if self._pairs:
            packed = packed[..., None] if not self._transposed else packed
            packed = packed.view(np.uint16)
        skip = start - base * group
        for begin, end in {(run.start, min(run.stop, first * group)), (max(run.start, last * group), run.stop)}:
            if begin < end:
                at = begin // group
                inside = begin - at * group, end - at * group
                np.copyto(block[at, ..., slice(*inside)], packed[at - base, ..., inside[0] - skip : inside[1] - skip])


class HostCopies:
    """Copies tokens between caches and chunks in host memory.

    Args:
        caches: the layers' KV caches, alike in shape, strides and dtype.
    """

    def __init__(self, caches: Sequence[torch.Tensor], layout: BlockLayout) -> None:
        self._size, self._blocks = layout.block_size, caches[0].shape[0]
        flats = [_flat(cache, layout.elements) for cache in caches]
        stride = caches[0].stride(0)
        self._index = [_Rows(flats, layout, side, stride) for side in range(2)]
        self._sides: list[_Rows | _Packed] = list(self._index)
        for side, rows in enumerate(self._index):
            if rows.row_bytes < _ROW_BYTES:
                with contextlib.suppress(ValueError):
                    self._sides[side] = _Packed(flats, layout, side, stride)

    def move(self, chunk: torch.Tensor, slots: torch.Tensor, to_cache: bool) -> None:
        """Copy ``chunk`` (``[2, layers, tokens, width]``) to the caches at ``slots``, or from there.

        Raises:
            IndexError: a slot that the caches do not have.
        """
        if not slots.numel():
            return
        places = slots.numpy()
        if not chunk[0, 0].is_contiguous():
            dense = chunk.contiguous()
            self.move(dense, slots, to_cache)
            if not to_cache:
                chunk.copy_(dense)
            return
        runs = _runs(places, self._size)
        if not all(0 <= run.block < self._blocks for run in runs):
            asked, there = f"{places.min()} to {places.max()}", self._blocks * self._size
            raise IndexError(f"slots {asked} of a KV cache of {there} slots")
        sides = self._sides if len(runs) * _SHORT_RUN <= len(places) + 2 * _SHORT_RUN else self._index
        plain = _as_unsigned(chunk)
        for side in sides:
            side.move(plain, places, runs, to_cache)
