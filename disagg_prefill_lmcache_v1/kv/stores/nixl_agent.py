"""A NIXL agent: registers memory, meets other agents, moves bytes between them."""

from __future__ import annotations

import contextlib
import importlib
import threading
import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

from disagg_prefill_lmcache_v1.kv.stores import base
from disagg_prefill_lmcache_v1.kv.stores.base import StoreUnavailable

# Where NIXL's Python interface is: its own package, or one build of it.
MODULES = ("nixl._api", "nixl_cu12._api", "nixl_cu13._api")
_POLL_S = 50e-6  # between looks at a transfer that is on its way


class Agent:
    """A NIXL agent with a name of its own; any thread may use it.

    Raises:
        StoreUnavailable: NIXL is not installed, or UCX does not start.
    """

    def __init__(self) -> None:
        self.name = f"disagg-{uuid.uuid4().hex}"
        self._lock = threading.Lock()
        self._regions: list[tuple[int, int]] = []
        self._known: dict[bytes, str] = {}
        try:
            api = _nixl()
            config = api.nixl_agent_config(enable_prog_thread=False, backends=["UCX"])
            self._agent = api.nixl_agent(self.name, config)
        except StoreUnavailable:
            raise
        except Exception as error:
            raise StoreUnavailable(f"NIXL does not start: {error}") from error

    def register(self, regions: Iterable[tuple[int, int]]) -> None:
        """Make host memory, (address, bytes) each, known to the network."""
        with self._lock:
            for address, size in regions:
                self._agent.register_memory([(address, size, 0, "")], "DRAM")
                self._regions.append((address, size))

    def metadata(self) -> bytes:
        """What another agent needs to reach this one and the memory registered so far."""
        with self._lock:
            return self._agent.get_agent_metadata()

    def meet(self, metadata: bytes) -> str:
        """Get to know another agent; returns its name."""
        with self._lock:
            if metadata not in self._known:
                for old in self._known.values():  # the one before a restart
                    with contextlib.suppress(Exception):
                        self._agent.remove_remote_agent(old)
                self._known.clear()
                name = self._agent.add_remote_agent(metadata)
                self._known[metadata] = name.decode() if isinstance(name, bytes) else name
            return self._known[metadata]

    def progress(self) -> None:
        """Do what other agents' transfers need of this side."""
        with self._lock:
            self._agent.update_notifs()

    def move(self, operation: str, peer: str, parts: Sequence[tuple[int, int, int]]) -> None:
        """Copy between here and ``peer``; returns when all bytes have arrived.

        Args:
            operation: "WRITE" or "READ".
            parts: (address here, address there, bytes) of each.

        Raises:
            TimeoutError: not done in time; it may still go on.
            ConnectionError: it has failed.
        """
        extra = [(here, size) for here, _, size in parts if not self._is_registered(here, size)]
        registered = None
        try:
            with self._lock:
                if extra:  # staging memory that LMCache has added since
                    registered = self._agent.register_memory([(*each, 0, "") for each in extra], "DRAM")
                here = self._agent.get_xfer_descs([(here, size, 0) for here, _, size in parts], "DRAM")
                there = self._agent.get_xfer_descs([(there, size, 0) for _, there, size in parts], "DRAM")
                handle = self._agent.initialize_xfer(operation, here, there, peer)
                state = self._agent.transfer(handle)
            deadline = time.monotonic() + base.IO_TIMEOUT_S
            while state not in ("DONE", "ERR"):
                if time.monotonic() > deadline:
                    raise TimeoutError("timed out")
                time.sleep(_POLL_S)
                with self._lock:
                    state = self._agent.check_xfer_state(handle)
            with self._lock:
                self._agent.release_xfer_handle(handle)
                if registered is not None:
                    self._agent.deregister_memory(registered)
        except TimeoutError:
            raise
        except Exception as error:
            raise ConnectionError(f"NIXL: {error}") from error
        if state == "ERR":
            raise ConnectionError("NIXL: the transfer failed")

    def _is_registered(self, address: int, size: int) -> bool:
        return any(start <= address and address + size <= start + length for start, length in self._regions)


def _nixl() -> Any:
    for name in MODULES:
        try:
            return importlib.import_module(name)
        except ImportError as error:
            if not (error.name or "").startswith(name.partition(".")[0]):
                raise StoreUnavailable(f"NIXL cannot be used: {error}") from error
    raise StoreUnavailable("NIXL is not installed: pip install nixl, or choose another --backend")


# The receiver
