"""KV from the prefill server's memory straight into the decode server's, by NIXL: ``nixl://HOST:PORT``.

There is no KV server. Each tensor parallel rank of the decode server (the receiver) has memory for chunks and listens
on PORT plus its rank; the same rank of the prefill server (the sender) asks it for room, writes the chunk there (a UCX
put: RDMA, a copy between the processes or TCP, whatever both have) and says when it is complete. Who may use which part
of the memory is decided as in the store in shared memory: the messages, the index with its eviction and pins, and the
receiver's own client are those of shm_server.py and shm.py. To LMCache both sides are a plugin
(``remote_storage_plugins``).

LMCache has a NIXL backend of its own (``enable_pd``). It is not used, because there a sender waits for ever, in the
engine's step, for a receiver that is gone or full; chunks of cancelled requests are never freed; a chunk can be found
before it is written; and of a prompt that is prefilled in several steps nobody is told the end.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from lmcache.logging import init_logger
from lmcache.utils import CacheEngineKey
from lmcache.v1.memory_management import MemoryFormat, MemoryObj
from lmcache.v1.storage_backend.connector import ConnectorAdapter, ConnectorContext
from lmcache.v1.storage_backend.connector.base_connector import RemoteConnector

from disagg_prefill_lmcache_v1.kv.stores import base
from disagg_prefill_lmcache_v1.kv.stores.base import StoreRefused, StoreUnavailable, bytes_of, fits
from disagg_prefill_lmcache_v1.kv.stores.client import StoreClient
from disagg_prefill_lmcache_v1.kv.stores.link import Link, connect_tcp
from disagg_prefill_lmcache_v1.kv.stores.nixl_agent import Agent
from disagg_prefill_lmcache_v1.kv.stores.shm import ShmStoreConnector
from disagg_prefill_lmcache_v1.kv.stores.shm_index import BUSY, NO_ROOM, Client
from disagg_prefill_lmcache_v1.kv.stores.shm_memory import VERSION, Segment, available_memory, parse_size, populate
from disagg_prefill_lmcache_v1.kv.stores.shm_server import Connection, Server, exchange

logger = init_logger(__name__)

SCHEME = "nixl://"
PLUGIN = "nixl"  # in remote_storage_plugins
# Each variable wins over the key of extra_config.
URL_VARIABLE, URL_KEY = "DISAGG_NIXL_URL", f"remote_storage_plugin.{PLUGIN}.url"
SIZE_VARIABLE, SIZE_KEY = "KV_NIXL_SIZE", f"remote_storage_plugin.{PLUGIN}.size"
ROLE_KEY = f"remote_storage_plugin.{PLUGIN}.role"

# Both servers start at the same time, and the sender is of no use before the receiver listens.
PEER_START_S = 300.0
_BUSY_POLL_S = 2e-3  # while another sender is writing a chunk
# UCX needs the receiver's hand for a new connection and for what is neither RDMA nor a direct copy between processes.
# Its own thread for that takes half a core all the time; ours looks this often, while somebody sends.
_PROGRESS_S = 200e-6
_PROGRESS_AFTER_S = 0.2


class _ReceivingServer(Server):
    """Knows which of its clients are senders, and whether one of them may be sending."""

    def __init__(self, size: int, hello: dict[str, Any]) -> None:
        super().__init__(size, hello)
        self._senders: set[Client] = set()
        self._asked_at = -1e9
        self.sending = threading.Event()

    def _run(self, client: Client, operation: str, keys: Any = None) -> Any:
        if operation == "hello" and keys is not None:
            self._senders.add(client)
        result = super()._run(client, operation, keys)
        if client in self._senders and operation in ("hello", "reserve", "pin"):
            self._asked_at = time.monotonic()
            self.sending.set()
        return result

    def drop(self, client: Client) -> None:
        self._senders.discard(client)
        super().drop(client)

    def is_quiet(self) -> bool:
        """Called by another thread: what it sees may be a moment old."""
        since = time.monotonic() - self._asked_at
        if since < _PROGRESS_AFTER_S:
            return False
        # a transfer that takes longer than its deadline is of no use to anybody
        late = since > 2 * base.IO_TIMEOUT_S
        return late or not any(client.reserved or client.pins for client in tuple(self._senders))


class NixlReceiver(ShmStoreConnector):
    """The decode server's side: memory for chunks, in this process, and its client.

    Args:
        host, port: where senders ask.
        size: bytes of memory.

    Raises:
        StoreUnavailable: no memory, the port is in use, or NIXL does not start.
    """

    def __init__(
        self, host: str, port: int, loop: asyncio.AbstractEventLoop, local_cpu_backend: Any, size: int
    ) -> None:
        self._name = f"{SCHEME}{host}:{port}"
        self._agent = Agent()
        try:
            self._own_segment = Segment(size)
            mapping = mmap.mmap(self._own_segment.fd, size)
            populate(mapping, size, lambda: False)
        except OSError as error:
            raise StoreUnavailable(self._text(f"cannot take {size >> 20} MiB of memory: {error.strerror}")) from error
        self._memory = torch.frombuffer(mapping, dtype=torch.uint8)
        address = self._memory.data_ptr()
        self._agent.register([(address, size)])
        hello = {**self._own_segment.describe(), "agent": self._agent.metadata(), "address": address}
        self._server = _ReceivingServer(size, hello)
        self._server_loop = asyncio.new_event_loop()
        self._ended = threading.Event()
        try:
            listening = self._server_loop.run_until_complete(
                self._server_loop.create_server(lambda: Connection(self._server), host, port)
            )
        except OSError as error:
            self._server_loop.close()
            raise StoreUnavailable(self._text(f"cannot listen: {error.strerror}")) from error
        self._listening = listening
        for work in (self._serve, self._progress):
            threading.Thread(target=work, name=f"kv-nixl{work.__name__}", daemon=True).start()
        logger.info("KV is received at %s, %d MiB", self._name, size >> 20)
        super().__init__(host, port, loop, local_cpu_backend)

    def _text(self, cause: str) -> str:
        return f"KV store {self._name}: {cause}"

    def _serve(self) -> None:
        self._server_loop.run_forever()
        self._listening.close()
        self._server_loop.close()

    def _progress(self) -> None:
        while not self._ended.is_set():
            self._server.sending.wait()
            self._server.sending.clear()
            while not self._server.is_quiet() and not self._ended.is_set():
                try:
                    self._agent.progress()
                except Exception as error:  # senders notice by their deadlines
                    logger.warning("NIXL: %s", error)
                    time.sleep(1)
                time.sleep(_PROGRESS_S)

    async def close(self) -> None:
        await super().close()
        self._ended.set()
        self._server.sending.set()
        self._server_loop.call_soon_threadsafe(self._server_loop.stop)


# The sender


class _PeerLink(Link):
    """A connection to a receiver. What was reserved on it is freed when it closes."""

    def __init__(self, connected: socket.socket) -> None:
        super().__init__(connected)
        self.agent = ""
        self.address = 0

    def ask(self, *request: Any) -> Any:
        """Raises OSError, ValueError: there is no answer; the link is of no further use."""
        return exchange(self.send, self.read, request)

    _kept: ClassVar[list[_PeerLink]] = []  # else they would close when nobody knows them any more

    def keep_open(self) -> None:
        """A write may still go on: its place must not become another chunk's as long as this process lives."""
        self._kept.append(self)

    def close(self) -> None:
        if self not in self._kept:
            super().close()


class NixlSender(StoreClient):
    """The prefill server's side. What it has sent it can also read back.

    Args:
        host, port: of the receiver.
        start_s: how long to wait for the receiver to listen.

    Raises:
        StoreUnavailable: it does not, or NIXL does not start.
    """

    def __init__(
        self,
        host: str,
        port: int,
        loop: asyncio.AbstractEventLoop,
        local_cpu_backend: Any,
        start_s: float = PEER_START_S,
    ) -> None:
        self._address = (host, port)
        self._agent = Agent()
        self._await_receiver(start_s)
        super().__init__(f"{SCHEME}{host}:{port}", loop, local_cpu_backend)
        self._agent.register(self.memory())

    def _await_receiver(self, start_s: float) -> None:
        begin = time.monotonic()
        next_report = begin + 5
        while True:
            try:
                socket.create_connection(self._address, timeout=base.CONNECT_TIMEOUT_S).close()
                return
            except OSError as error:
                now = time.monotonic()
                if now - begin > start_s:
                    text = "KV store %s%s:%d: the decode server does not listen (%s): start it too"
                    raise StoreUnavailable(text % (SCHEME, *self._address, error)) from error
            if now >= next_report:
                logger.info("Waiting for the decode server at %s:%d: %.0f s", *self._address, now - begin)
                next_report = now + 5
            time.sleep(0.1)

    def connect(self) -> _PeerLink:
        link = _PeerLink(connect_tcp(self._address))
        try:
            hello = link.ask("hello", self._agent.name)
            if not isinstance(hello, dict) or hello.get("version") != VERSION or "agent" not in hello:
                raise ConnectionError("it is no decode server of this version")
            link.agent, link.address = self._agent.meet(hello["agent"]), hello["address"]
        except BaseException as error:
            link.close()
            if isinstance(error, OSError | ValueError):
                raise
            if isinstance(error, Exception):
                raise ConnectionError(f"NIXL: {error}") from error
            raise
        return link

    def check(self, link: _PeerLink) -> None:
        link.ask("ping")

    def put_all(self, link: _PeerLink, keys: Sequence[CacheEngineKey], objs: Sequence[MemoryObj]) -> None:
        names = [key.to_string() for key in keys]
        wanted = [
            [name, len(bytes_of(obj)), [[*obj.get_shape()], _name_of(obj.get_dtype()), self.meta_fmt.value]]
            for name, obj in zip(names, objs, strict=True)
        ]
        answers = link.ask("reserve", wanted)
        ours = [i for i, offset in enumerate(answers) if offset >= 0]
        if ours:
            parts = [(objs[i].tensor.data_ptr(), link.address + answers[i], wanted[i][1]) for i in ours]
            try:
                self._agent.move("WRITE", link.agent, parts)
            except TimeoutError:
                link.keep_open()
                raise
            if link.ask("commit", [names[i] for i in ours]):
                raise ConnectionError("the decode server dropped a chunk")
        if NO_ROOM in answers:
            raise StoreRefused(f"the decode server has no room for a chunk: raise {SIZE_VARIABLE}")
        if BUSY in answers:
            self._await_others(link, names)

    def _await_others(self, link: _PeerLink, names: list[str]) -> None:
        """Another sender is writing one of them."""
        deadline = time.monotonic() + base.IO_TIMEOUT_S
        while link.ask("exists", names)[1]:
            if time.monotonic() > deadline:
                raise TimeoutError("another prefill server does not end writing a chunk")
            time.sleep(_BUSY_POLL_S)

    def get_one(self, link: _PeerLink, key: CacheEngineKey) -> MemoryObj | None:
        name = key.to_string()
        (found,) = link.ask("pin", [name])
        if found is None:
            return None
        offset, length, (dims, dtype_name, fmt) = found
        shape, dtype = torch.Size(dims), getattr(torch, dtype_name, None)
        if fmt != self.meta_fmt.value or not fits(self, shape, dtype, self.meta_fmt, length):
            logger.warning("Chunk %s not taken: foreign shape %s", name, shape)
            link.ask("release", [name])
            return None
        obj = self.allocate(shape, dtype, MemoryFormat(fmt))
        moving = True
        try:
            self._agent.move("READ", link.agent, [(obj.tensor.data_ptr(), link.address + offset, length)])
            moving = False
            link.ask("release", [name])
        except BaseException as error:
            # after a late read its memory may still be written to: it is never given back
            if not (moving and isinstance(error, TimeoutError)):
                self.give_back(obj)
            raise
        return obj

    def count_on(self, link: _PeerLink, keys: Sequence[CacheEngineKey]) -> int:
        deadline = time.monotonic() + base.IO_TIMEOUT_S
        names = [key.to_string() for key in keys]
        while True:
            count, busy = link.ask("exists", names)
            if not busy or time.monotonic() > deadline:
                return count
            time.sleep(_BUSY_POLL_S)


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class NixlConnectorAdapter(ConnectorAdapter):
    """LMCache's plugin seam: ``remote_storage_plugins: ["nixl"]``."""

    def __init__(self) -> None:
        super().__init__(SCHEME)

    def can_parse(self, url: str) -> bool:
        return url.startswith(f"plugin://{PLUGIN}")

    def create_connector(self, context: ConnectorContext) -> RemoteConnector:
        return connect(context.url, context.loop, context.local_cpu_backend)


def connect(url: str, loop: asyncio.AbstractEventLoop, local_cpu_backend: Any) -> NixlReceiver | NixlSender:
    """The sender for ``nixl://HOST:PORT``; for ``plugin://nixl`` the side that the configuration names. Of this rank.

    Raises:
        StoreUnavailable: the other side does not answer, or NIXL does not start.
        ValueError: a setting is missing or not understood.
    """
    get: Callable[[str, str], Any] = local_cpu_backend.config.get_extra_config_value
    role = "sender"
    if not url.startswith(SCHEME):
        url, role = os.environ.get(URL_VARIABLE) or get(URL_KEY, ""), get(ROLE_KEY, "")
    host, _, port = url.removeprefix(SCHEME).rstrip("/").rpartition(":")
    if not url.startswith(SCHEME) or not host or not port.isdecimal():
        raise ValueError(f"{URL_VARIABLE} or {URL_KEY} is {url!r}: allowed: {SCHEME}HOST:PORT")
    mine = int(port) + local_cpu_backend.metadata.worker_id
    if role == "sender":
        return NixlSender(host, mine, loop, local_cpu_backend)
    if role != "receiver":
        raise ValueError(f"{ROLE_KEY} is {role!r}: allowed: sender, receiver")
    text = os.environ.get(SIZE_VARIABLE) or get(SIZE_KEY, "")
    try:
        size = parse_size(text)
    except ValueError as error:
        raise ValueError(f"{SIZE_VARIABLE} or {SIZE_KEY} {error}") from None
    available = available_memory()
    if size > available:
        raise StoreUnavailable(f"{SIZE_VARIABLE}={text}: {available >> 20} MiB are available, choose less than that")
    return NixlReceiver(host, mine, loop, local_cpu_backend, size)
