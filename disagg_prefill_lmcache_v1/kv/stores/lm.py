"""Client of LMCache's ``lm://`` server (``python -m lmcache.v1.server``).

``lm://`` has no acknowledgement of a put: an EXIST after it on the same connection is one. LMCache's own client has one
connection, shared by header and body reads that other coroutines can come between, and never reconnects.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import torch
from lmcache.logging import init_logger
from lmcache.utils import CacheEngineKey
from lmcache.v1.memory_management import MemoryFormat, MemoryObj
from lmcache.v1.protocol import ClientCommand, ClientMetaMessage, ServerMetaMessage, ServerReturnCode

from disagg_prefill_lmcache_v1.kv.stores.base import StoreRefused, bytes_of, fits
from disagg_prefill_lmcache_v1.kv.stores.client import CONNECTIONS, LOOKUPS_AT_ONCE, StoreClient
from disagg_prefill_lmcache_v1.kv.stores.link import Link, dial

logger = init_logger(__name__)

# LMCache's server allocates what is still missing of a chunk for every piece that it receives: pieces that arrive as a
# whole are taken two to three times as fast as one that trickles in.
_PIECE = 256 << 10


def _header(command: ClientCommand, key: CacheEngineKey, obj: MemoryObj | None = None, length: int = 0) -> bytes:
    if obj is None:
        return ClientMetaMessage(command, key, 0, MemoryFormat(1), torch.float16, torch.Size([0, 0, 0, 0])).serialize()
    return ClientMetaMessage(
        command, key, length, obj.get_memory_format(), obj.get_dtype(), obj.get_shape()
    ).serialize()


_PING_KEY = CacheEngineKey("ping", 1, 0, 0, torch.float16)


class LMStoreConnector(StoreClient):
    """Client of ``python -m lmcache.v1.server``.

    Raises:
        StoreUnavailable: no server answers at ``host:port``.
    """

    def __init__(
        self, host: str, port: int, loop: asyncio.AbstractEventLoop, local_cpu_backend: Any, links: int = CONNECTIONS
    ) -> None:
        self._address = (host, port)
        super().__init__(f"lm://{host}:{port}", loop, local_cpu_backend, links)

    def connect(self) -> Link:
        return dial(self._address)

    @staticmethod
    def _answer(link: Link) -> ServerMetaMessage:
        return ServerMetaMessage.deserialize(link.read(ServerMetaMessage.packlength()))

    def check(self, link: Link) -> None:
        link.send(_header(ClientCommand.HEALTH, _PING_KEY))
        if self._answer(link).code != ServerReturnCode.SUCCESS:
            raise StoreRefused("the KV store says that it is not healthy")

    def put_all(self, link: Link, keys: Sequence[CacheEngineKey], objs: Sequence[MemoryObj]) -> None:
        for key, obj in zip(keys, objs, strict=True):
            data = bytes_of(obj)
            link.send(_header(ClientCommand.PUT, key, obj, len(data)))
            for i in range(0, len(data), _PIECE):
                link.send(data[i : i + _PIECE])
        link.send(_header(ClientCommand.EXIST, keys[-1]))  # answered after the puts: their acknowledgement
        if self._answer(link).code != ServerReturnCode.SUCCESS:
            raise ConnectionError("the KV store dropped a chunk")

    def count_on(self, link: Link, keys: Sequence[CacheEngineKey]) -> int:
        present = 0
        for i in range(0, len(keys), LOOKUPS_AT_ONCE):
            part = keys[i : i + LOOKUPS_AT_ONCE]
            link.send(b"".join(_header(ClientCommand.EXIST, key) for key in part))
            codes = [self._answer(link).code for _ in part]
            for code in codes:
                if code != ServerReturnCode.SUCCESS:
                    return present
                present += 1
        return present

    def get_one(self, link: Link, key: CacheEngineKey) -> MemoryObj | None:
        link.send(_header(ClientCommand.GET, key))
        meta = self._answer(link)
        if meta.code != ServerReturnCode.SUCCESS:
            return None
        return self._take(link, key, meta.shape, meta.dtype, meta.fmt, meta.length)

    def _take(
        self, link: Link, key: CacheEngineKey, shape: torch.Size, dtype: Any, fmt: MemoryFormat, length: int
    ) -> MemoryObj | None:
        """Read the bytes of a chunk that come next on ``link`` into staging memory; skip them if it is foreign."""
        if not fits(self, shape, dtype, fmt, length):
            logger.warning("Chunk %s not taken: foreign shape %s", key.to_string(), shape)
            link.skip(length)
            return None
        obj = self.allocate(shape, dtype, fmt)
        try:
            link.read_into(bytes_of(obj)[:length])
        except BaseException:
            self.give_back(obj)
            raise
        return obj


def connect(url: str, loop: asyncio.AbstractEventLoop, local_cpu_backend: Any) -> LMStoreConnector:
    """The client for ``lm://HOST:PORT``. Raises StoreUnavailable: the store does not answer."""
    host, _, port = url.removeprefix("lm://").rstrip("/").rpartition(":")
    return LMStoreConnector(host, int(port), loop, local_cpu_backend)
