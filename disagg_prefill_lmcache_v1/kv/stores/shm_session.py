"""A client's connection to the store in shared memory, and its mapping of that memory."""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from lmcache.logging import init_logger

from disagg_prefill_lmcache_v1.kv.stores import base
from disagg_prefill_lmcache_v1.kv.stores.base import StoreUnavailable
from disagg_prefill_lmcache_v1.kv.stores.link import Link
from disagg_prefill_lmcache_v1.kv.stores.shm_memory import VERSION, populate
from disagg_prefill_lmcache_v1.kv.stores.shm_server import FRAME, exchange, read_result

logger = init_logger(__name__)


class MappedSegment:
    """The store's memory, mapped. It stays mapped as long as any tensor that lies in it exists.

    Raises:
        OSError: it cannot be mapped.
    """

    def __init__(self, hello: dict[str, Any], fd: int) -> None:
        self.name: str = hello["segment"]
        self.size: int = hello["size"]
        try:
            mapping = mmap.mmap(fd, self.size)  # not beyond the file's end
        except (OSError, ValueError) as error:
            raise OSError(f"its memory cannot be mapped ({error})") from error
        self.memory = torch.frombuffer(mapping, dtype=torch.uint8)
        self._retired = threading.Event()
        # else every page costs a fault when it is first copied to or from: a third of the speed
        threading.Thread(target=self._populate, args=(mapping,), name="kv-store-map", daemon=True).start()

    def _populate(self, mapping: mmap.mmap) -> None:
        with contextlib.suppress(OSError):
            populate(mapping, self.size, self._retired.is_set)

    def tensor(self, offset: int, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        return self.memory[offset : offset + shape.numel() * dtype.itemsize].view(dtype).view(shape)

    def retire(self) -> None:
        """No new tensor will be asked for."""
        self._retired.set()


class Session:
    """One connection to the server; any thread may ask."""

    def __init__(self, connected: socket.socket, mapped: MappedSegment | None) -> None:
        self._lock = threading.Lock()  # held while a request is on its way
        self._state = threading.Lock()
        self._leases = 0
        self._failed = False
        self._link = Link(connected)
        try:
            head, fd = self._link.read_with_descriptor(FRAME.size)
            try:
                hello = read_result(self._link.read, head)
                if not isinstance(hello, dict) or hello.get("version") != VERSION:
                    raise OSError("it is no KV store of this version")
                known = mapped is not None and mapped.name == hello["segment"]
                self.segment = mapped if known else MappedSegment(hello, fd)
            finally:
                os.close(fd)
        except BaseException:
            self._link.close()
            raise

    def ask(self, *request: Any) -> Any:
        """The answer to a request.

        Raises:
            OSError, ValueError: there is none; the session is of no further use.
        """
        with self._lock:
            if self._failed:
                raise ConnectionResetError("the connection has failed")
            try:
                return exchange(self._link.send, self._link.read, request)
            except BaseException:
                self._failed = True  # before another thread could take the late answer for its own
                raise

    # What was handed out on this session keeps its connection open: the server frees it all when that closes.

    def lease(self) -> None:
        with self._state:
            self._leases += 1

    def end_leases(self, count: int = 1) -> None:
        with self._state:
            self._leases -= count
            self._close_if_unused()

    def fail(self) -> None:
        with self._state:
            self._failed = True
            self._close_if_unused()

    def _close_if_unused(self) -> None:
        if self._failed and self._leases <= 0:
            self._link.abort()


class Sessions:
    """Keeps one session with the server, and makes it again when it has failed.

    Args:
        name: of the store, for messages.
        dial: makes a connection to its server.

    Attributes:
        on_remap: called, by the thread that noticed, when memory() has changed: the server was restarted. The old
            memory stays mapped until the call has returned. Other threads may already have tensors of the new one.
    """

    def __init__(self, name: str, dial: Callable[[], socket.socket]) -> None:
        self.on_remap: Callable[[], None] | None = None
        self._name = name
        self._dial = dial
        self._lock = threading.Lock()
        self._session: Session | None = None
        self._segment: MappedSegment | None = None
        self._failed_at = -1e9
        self._closed = False

    def _ask(self, *request: Any) -> Any:
        return self._ask_leased(*request, lease=False)[0]

    def _ask_leased(self, *request: Any, lease: bool = True) -> tuple[Any, Session]:
        """The answer, and the session that gave it; with ``lease`` the caller must end a lease on it."""
        while True:
            session, fresh = self._connected()
            if lease:
                session.lease()
            try:
                return session.ask(*request), session
            except (OSError, ValueError, TypeError) as error:
                self._forget(session)
                if lease:
                    session.end_leases()
                # else: it was idle and the server was restarted meanwhile; a fresh connection tells
                if fresh or isinstance(error, TimeoutError):
                    self._fail(error)

    def _connected(self) -> tuple[Session, bool]:
        with self._lock:
            if self._session is not None:
                return self._session, False
            if self._closed:
                raise StoreUnavailable(self._text("closed here"))
            if time.monotonic() - self._failed_at < base.RETRY_AFTER_S:
                raise StoreUnavailable(self._text("did not answer a moment ago"))
            try:
                session = Session(self._dial(), self._segment)
            except (OSError, ValueError, TypeError, KeyError) as error:
                self._fail(error)
            old, self._segment = self._segment, session.segment
            self._session = session
        if old is not None and old is not session.segment:
            old.retire()
            logger.info("KV store %s was restarted: its memory is mapped anew", self._name)
            if self.on_remap is not None:
                self.on_remap()
        return session, True

    def _forget(self, session: Session) -> None:
        session.fail()
        with self._lock:
            if self._session is session:
                self._session = None

    def _fail(self, error: Exception) -> Any:
        self._failed_at = time.monotonic()
        raise StoreUnavailable(self._text(str(error) or type(error).__name__)) from error

    def _text(self, cause: str) -> str:
        return f"KV store {self._name}: {cause}"

    def end_sessions(self) -> None:
        with self._lock:
            self._closed = True
            session, self._session = self._session, None
        if session is not None:
            session.fail()
        if self._segment is not None:
            self._segment.retire()
