"""What a KV store's client must hold: the interface between kv/transfer.py and a store.

A client is made by :func:`registry.connect` for the URL of a store. For it holds:

- ``commit`` returns when every other client finds the chunk: "visible" can be told from "sent". A chunk that has only
  half arrived is never found.
- Every operation has a deadline (IO_TIMEOUT_S). A lost connection is made again; a store that failed a moment ago
  fails at once (RETRY_AFTER_S), so that requests are recomputed instead of hanging. Failures are ``StoreUnavailable``
  (it does not answer) or ``StoreRefused`` (it answers with an error).
- A chunk of another shape or dtype than this model's never reaches the KV cache (:func:`fits`).
- The tensors of ``stage`` and ``fetch`` are chunks ``[2, layers, tokens, kv_heads * head_size]``. They lie in memory of
  the client: a staged one must go to ``commit`` or ``abandon``; a fetched one may be read until ``Fetch.done``.
- All methods block, and any thread may call them.

LMCache calls the same object through its own interface (lmcache_interface.py). A new store is a module with ``connect``
and a line in registry.py.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch

# Seconds without a byte before an operation on the store is given up.
IO_TIMEOUT_S = 5.0
CONNECT_TIMEOUT_S = 2.0
# After a failure the store is left alone for this long; meanwhile every operation fails at once.
RETRY_AFTER_S = 0.5


class StoreUnavailable(ConnectionError):
    """The KV store cannot be reached."""


class StoreRefused(Exception):
    """The KV store answers, but will not do this (Redis without memory, a wrong password...)."""


class Fetch(abc.ABC):
    """Chunks on their way from a store: iterate over ``(index of the key, tensor [2, layers, tokens, hidden])``.

    They come in any order; those that the store does not have, or that are not this model's, do not come. The tensors
    lie in memory that is not ours to keep: :meth:`done` says that one has been read, :meth:`close` ends it all.
    """

    @abc.abstractmethod
    def __iter__(self) -> Iterator[tuple[int, torch.Tensor]]: ...

    @abc.abstractmethod
    def done(self, index: int) -> None: ...

    @abc.abstractmethod
    def close(self) -> None: ...

    def __enter__(self) -> Fetch:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class Store(Protocol):
    """A client; ``links`` is how many chunks it carries at once, each way."""

    links: int

    def count_present(self, keys: Sequence[Any]) -> int:
        """How many of ``keys``, counted from the first, the store has."""

    def stage(
        self, keys: Sequence[Any], shapes: Sequence[torch.Size], dtype: torch.dtype
    ) -> tuple[list[torch.Tensor | None], list[bool]]:
        """Memory for chunks to be written: for each key, from the first on, a tensor or None, and whether None is
        because the store has the chunk already, or another client is just writing it, rather than for want of room.
        """

    def commit(self, keys: Sequence[Any], tensors: Sequence[torch.Tensor]) -> None:
        """Make staged chunks visible; their memory is given back in any case."""

    def abandon(self, keys: Sequence[Any], tensors: Sequence[torch.Tensor | None]) -> None:
        """Give staged chunks back unwritten; None is passed over."""

    def fetch(self, keys: Sequence[Any]) -> Fetch:
        """Begin to read chunks."""

    def memory(self) -> list[tuple[int, int]]:
        """(address, bytes) of the memory that the tensors lie in: what a device may be given direct access to."""


def fits(connector: Any, shape: torch.Size, dtype: torch.dtype | None, fmt: Any, length: int) -> bool:
    """Whether a chunk is one of this model's, perhaps part-filled: a foreign one must never reach the KV cache.

    Args:
        shape: ``[2, layers, tokens, hidden]``; tokens may be fewer than a whole chunk has.
        length: bytes.
    """
    want = connector.meta_shapes[0]
    if len(shape) != len(want) or dtype != connector.meta_dtypes[0] or fmt != connector.meta_fmt:
        return False
    if any(shape[i] != want[i] for i in range(len(want)) if i != 2) or not 0 < shape[2] <= want[2]:
        return False
    return length == shape.numel() * dtype.itemsize


def bytes_of(obj: Any) -> memoryview:
    """The memory of LMCache's memory object."""
    view = obj.byte_array
    view = view if isinstance(view, memoryview) else memoryview(view)
    return view if view.format == "B" else view.cast("B")
