"""KV from the prefill server's memory straight into the decode server's, by NIXL: ``nixl://HOST:PORT``.

There is no KV server. Each tensor parallel rank of the decode server (the receiver) has memory for chunks and listens
on PORT plus its rank; the same rank of the prefill server (the sender) asks it for room, writes the chunk there (a UCX
put: RDMA, a copy between the processes or TCP, whatever both have) and says when it is complete. Who may use which part
of the memory is decided as in the store in shared memory: the messages, the index with its eviction and pins, and the
receiver's own client are those of shm_server.py and shm.py. To LMCache both sides are a plugin
(``remote_storage_plugins``).

A receiver lets a sender in, and tells where its memory lies, only after both have proved to know the run's secret
(proof.py). From then on the sender is trusted: UCX checks no bounds (SECURITY.md).

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

import msgspec
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
from disagg_prefill_lmcache_v1.kv.stores.proof import challenge, is_proof, proof, run_secret
from disagg_prefill_lmcache_v1.kv.stores.shm import ShmStoreConnector
from disagg_prefill_lmcache_v1.kv.stores.shm_index import BUSY, NO_ROOM, Client
from disagg_prefill_lmcache_v1.kv.stores.shm_memory import VERSION, Segment, populate
from disagg_prefill_lmcache_v1.kv.stores.shm_server import FRAME, Connection, Server, exchange, frame_of, read_result
from disagg_prefill_lmcache_v1.memory import available_memory, parse_size
from disagg_prefill_lmcache_v1.same_user import SECRET_VARIABLE

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

    def __init__(self, segment: Segment, secret: bytes, for_senders: dict[str, Any]) -> None:
        super().__init__(segment)
        self.secret = secret
        self.for_senders = {**self.hello, **for_senders}
        self._senders: set[Client] = set()
        self._asked_at = -1e9
        self.sending = threading.Event()

    def let_in(self, client: Client) -> None:
        """It is a sender of this run."""
        self._senders.add(client)
        self._expect()

    def _expect(self) -> None:
        self._asked_at = time.monotonic()
        self.sending.set()

    def _run(self, client: Client, operation: str, keys: Any = None) -> Any:
        result = super()._run(client, operation, keys)
        if client in self._senders and operation in ("reserve", "pin"):
            self._expect()
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


class _SenderConnection(Connection):
    """A sender, by TCP: its first frame must be the proof that it is one of this run."""

    max_frame = 1024
    _server: _ReceivingServer

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        self._challenge = challenge()
        self._transport.write(frame_of((True, {"version": VERSION, "challenge": self._challenge})))
        self._deadline = asyncio.get_running_loop().call_later(base.IO_TIMEOUT_S, self._transport.abort)

    def answer(self, frame: bytes) -> None:
        if self.max_frame == Connection.max_frame:
            super().answer(frame)
            return
        try:
            operation, theirs, given = msgspec.msgpack.decode(frame)
        except (msgspec.DecodeError, TypeError, ValueError):
            operation, theirs, given = "", b"", b""
        secret, challenges = self._server.secret, (self._challenge, theirs)
        if operation != "prove" or not isinstance(theirs, bytes) or not is_proof(given, secret, "sender", *challenges):
            cause = f"the prefill server has another secret than the decode server: {SECRET_VARIABLE}"
            self._transport.write(frame_of((False, cause)))
            self._transport.close()
            return
        self._deadline.cancel()
        self.max_frame = Connection.max_frame
        self._server.let_in(self._client)
        ours = {**self._server.for_senders, "proof": proof(secret, "receiver", *challenges)}
        self._transport.write(frame_of((True, ours)))

    def connection_lost(self, exc: Exception | None) -> None:
        self._deadline.cancel()
        super().connection_lost(exc)


class NixlReceiver(ShmStoreConnector):
    """The decode server's side: memory for chunks, in this process, and its client.

    Args:
        host, port: where senders ask.
        size: bytes of memory.

    Raises:
        StoreUnavailable: no memory, the port is in use, or NIXL does not start.
        ValueError: there is no secret.
    """

    def __init__(
        self, host: str, port: int, loop: asyncio.AbstractEventLoop, local_cpu_backend: Any, size: int
    ) -> None:
        self._name = f"{SCHEME}{host}:{port}"
        secret = run_secret()
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
        ranks = local_cpu_backend.metadata.world_size
        for_senders = {"agent": self._agent.metadata(), "address": address, "ranks": ranks}
        self._server = _ReceivingServer(self._own_segment, secret, for_senders)
        self._server_loop = asyncio.new_event_loop()
        self._ended = threading.Event()
        try:
            listening = self._server_loop.run_until_complete(
                self._server_loop.create_server(lambda: _SenderConnection(self._server), host, port)
            )
        except OSError as error:
            self._server_loop.close()
            raise StoreUnavailable(self._text(f"cannot listen: {error.strerror}")) from error
        self._listening = listening
        for work in (self._serve, self._progress):
            threading.Thread(target=work, name=f"kv-nixl{work.__name__}", daemon=True).start()
        logger.info("KV is received at %s, %d MiB", self._name, size >> 20)
        super().__init__(self._name, self._dial_here, loop, local_cpu_backend)

    def _dial_here(self) -> socket.socket:
        """A connection within this process."""
        ours, theirs = socket.socketpair()
        adopt = self._server_loop.connect_accepted_socket(lambda: Connection(self._server), theirs)
        asyncio.run_coroutine_threadsafe(adopt, self._server_loop)
        return ours

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
        StoreUnavailable: it does not, it has another secret, or NIXL does not start.
        ValueError: there is no secret.
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
        self._secret = run_secret()
        self._ranks = local_cpu_backend.metadata.world_size
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
            greeting = read_result(link.read, link.read(FRAME.size))
            if not isinstance(greeting, dict) or greeting.get("version") != VERSION or "challenge" not in greeting:
                raise ConnectionError("it is no decode server of this version")
            challenges = greeting["challenge"], challenge()
            hello = link.ask("prove", challenges[1], proof(self._secret, "sender", *challenges))
            if not is_proof(hello["proof"], self._secret, "receiver", *challenges):
                raise ConnectionError(f"it does not prove to know the secret of this run: {SECRET_VARIABLE}")
            if hello["ranks"] != self._ranks:
                raise ConnectionError(
                    f"the decode server has tensor parallel size {hello['ranks']}, this prefill server {self._ranks}: "
                    "start both with the same --tensor-parallel-size"
                )
            link.agent, link.address = self._agent.meet(hello["agent"]), hello["address"]
        except BaseException as error:
            link.close()
            if isinstance(error, Exception) and not isinstance(error, OSError):
                name = "" if isinstance(error, ValueError) else "NIXL: "
                raise ConnectionError(f"{name}{error}") from error
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
