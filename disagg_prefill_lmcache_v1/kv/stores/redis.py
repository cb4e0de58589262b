"""Client of Redis: ``redis://``, ``rediss://`` (TLS) and ``unix://``.

LMCache's own client has no deadlines, tells nobody of a failed put, takes a chunk of which one value was evicted for
present, and its ``close`` waits for its own event loop, so the process hangs at its end.
"""

from __future__ import annotations

import asyncio
import os
import struct
from collections.abc import Sequence
from typing import Any

import redis
from lmcache.logging import init_logger
from lmcache.utils import CacheEngineKey
from lmcache.v1.memory_management import MemoryObj
from lmcache.v1.protocol import RemoteMetadata

from disagg_prefill_lmcache_v1.kv.stores import base
from disagg_prefill_lmcache_v1.kv.stores.base import StoreRefused, StoreUnavailable, bytes_of, fits
from disagg_prefill_lmcache_v1.kv.stores.client import CONNECTIONS, LOOKUPS_AT_ONCE, StoreClient
from disagg_prefill_lmcache_v1.kv.stores.link import Link
from disagg_prefill_lmcache_v1.same_user import SECRET_VARIABLE, read_secret

logger = init_logger(__name__)

_PIECE = 1 << 20
_PIECES_AHEAD = 4
# Path of a Unix socket of the Redis that remote_url names: a part of the cost of TCP.
SOCKET_VARIABLE = "DISAGG_REDIS_SOCKET"


class RedisStoreConnector(StoreClient):
    """Client of Redis; a chunk is two values, ``<key>kv_bytes`` and ``<key>metadata``, as LMCache has it.

    redis-py makes the connections (URL, password, TLS, database). The values go past its parser, which would copy
    each of them twice, in one thread.

    Args:
        url: ``redis://``, ``rediss://`` or ``unix://``; without a password the one in the file SECRET_VARIABLE counts.
    """

    def __init__(
        self, url: str, loop: asyncio.AbstractEventLoop, local_cpu_backend: Any, links: int = CONNECTIONS
    ) -> None:
        path = os.environ.get(SOCKET_VARIABLE, "")
        settings: dict[str, Any] = {"protocol": 2, "socket_timeout": base.IO_TIMEOUT_S}
        if secret := os.environ.get(SECRET_VARIABLE):
            settings["password"] = read_secret(secret)  # one in the URL wins
        if path and os.path.exists(path) and url.startswith("redis://"):
            self._pool = redis.ConnectionPool(connection_class=redis.UnixDomainSocketConnection, path=path, **settings)
        else:
            self._pool = redis.ConnectionPool.from_url(url, socket_connect_timeout=base.CONNECT_TIMEOUT_S, **settings)
        super().__init__("Redis", loop, local_cpu_backend, links)  # the URL may carry a password

    def connect(self) -> Link:
        connection = self._pool.make_connection()
        try:
            connection.connect()
        except redis.RedisError as error:
            # its text may repeat the URL
            raise ConnectionError(f"no connection ({type(error).__name__})") from None
        link = Link(connection._sock)
        link.connection = connection  # type: ignore[attr-defined]  # closes its socket when it is collected
        return link

    @staticmethod
    def _command(*words: bytes) -> bytes:
        return b"".join([b"*%d\r\n" % len(words), *(b"$%d\r\n%b\r\n" % (len(word), word) for word in words)])

    @staticmethod
    def _reply(link: Link, kind: bytes) -> bytes:
        """The rest of a one-line reply: of ":" a number, of "+" a word, of "$" a length."""
        line = link.read_line()
        if line[:1] == b"-":
            raise StoreRefused(f"Redis answers {line[1:].decode(errors='replace')}")
        if line[:1] != kind:
            raise ValueError(f"Redis answers {line[:40]!r}")
        return line[1:]

    def check(self, link: Link) -> None:
        link.send(self._command(b"PING"))
        self._reply(link, b"+")

    def put_all(self, link: Link, keys: Sequence[CacheEngineKey], objs: Sequence[MemoryObj]) -> None:
        refused = None
        for key, obj in zip(keys, objs, strict=True):
            data, name = bytes_of(obj), key.to_string().encode()
            meta = RemoteMetadata(len(data), obj.get_shapes(), obj.get_dtypes(), obj.get_memory_format()).serialize()
            value = name + b"kv_bytes"
            link.send(b"*3\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n" % (len(value), value, len(data)))
            link.send(data)
            link.send(b"\r\n" + self._command(b"SET", name + b"metadata", bytes(meta)))
            for _ in range(2):
                try:
                    self._reply(link, b"+")
                except StoreRefused as error:
                    refused = error
        if refused is not None:
            raise refused

    def count_on(self, link: Link, keys: Sequence[CacheEngineKey]) -> int:
        present = 0
        for i in range(0, len(keys), LOOKUPS_AT_ONCE):
            names = [key.to_string().encode() for key in keys[i : i + LOOKUPS_AT_ONCE]]
            commands = (self._command(b"EXISTS", name + b"metadata", name + b"kv_bytes") for name in names)
            link.send(b"".join(commands))
            for count in [self._reply(link, b":") for _ in names]:
                if count != b"2":
                    return present
                present += 1
        return present

    def get_one(self, link: Link, key: CacheEngineKey) -> MemoryObj | None:
        name = key.to_string().encode()
        link.send(self._command(b"GET", name + b"metadata"))
        length = int(self._reply(link, b"$"))
        if length < 0:
            return None
        raw = link.read(length + 2)[:-2]
        try:
            meta = RemoteMetadata.deserialize(raw)
        except (ValueError, KeyError, struct.error):
            meta = None
        if meta is None or len(meta.shapes) != 1:
            logger.warning("Chunk %s not taken: it is not LMCache's", key.to_string())
            return None
        if not fits(self, meta.shapes[0], meta.dtypes[0], meta.fmt, meta.length):
            logger.warning("Chunk %s not taken: foreign shape %s", key.to_string(), meta.shapes[0])
            return None
        obj = self.allocate(meta.shapes[0], meta.dtypes[0], meta.fmt)
        try:
            whole = self._read_pieces(link, name + b"kv_bytes", bytes_of(obj)[: meta.length])
        except BaseException:
            self.give_back(obj)
            raise
        if not whole:
            self.give_back(obj)
            return None
        return obj

    def _read_pieces(self, link: Link, name: bytes, target: memoryview) -> bool:
        """Read a value into ``target``; whether it was there and as long.

        In pieces: for a GET Redis makes a copy of the whole value, page by page new memory, before it sends the first
        byte, and sends it bit by bit between other work.
        """
        starts = range(0, len(target), _PIECE)
        commands = [
            self._command(b"GETRANGE", name, b"%d" % start, b"%d" % (min(start + _PIECE, len(target)) - 1))
            for start in starts
        ]
        link.send(b"".join(commands[:_PIECES_AHEAD]))
        whole = True
        for i, start in enumerate(starts):
            part = target[start : start + _PIECE]
            length = int(self._reply(link, b"$"))
            if length == len(part):
                link.read_into(part)
            else:
                whole = False
                link.skip(length)
            link.read_line()  # its end
            if i + _PIECES_AHEAD < len(commands):
                link.send(commands[i + _PIECES_AHEAD])
        return whole


def connect(url: str, loop: asyncio.AbstractEventLoop, local_cpu_backend: Any) -> RedisStoreConnector:
    """The client for a Redis URL. Raises StoreUnavailable: Redis does not answer, or refuses us."""
    try:
        return RedisStoreConnector(url, loop, local_cpu_backend)
    except (StoreRefused, redis.RedisError) as error:
        raise StoreUnavailable(f"KV store Redis refuses the connection: {type(error).__name__}") from None
