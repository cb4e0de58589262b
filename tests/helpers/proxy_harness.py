"""Starts the real proxy as a process in front of mock servers (see mock_openai_server.py) for the proxy tests."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
for folder in (REPOSITORY, REPOSITORY / "tests" / "helpers"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from httpx._config import DEFAULT_TIMEOUT_CONFIG  # noqa: E402
from launch_harness import free_ports  # noqa: E402
from mock_openai_server import MockState, start_mock  # noqa: E402

PROXY = REPOSITORY / "disagg_prefill_lmcache_v1" / "disagg_proxy_server.py"
MOCK = REPOSITORY / "tests" / "helpers" / "mock_openai_server.py"
DEADLINE_S = 60.0
# Without this httpx gives up after 5 s where a test tells no timeout; a busy machine starts workers later than that.
for limit in ("connect", "read", "write", "pool"):
    setattr(DEFAULT_TIMEOUT_CONFIG, limit, DEADLINE_S)


def wait_until(condition: Callable[[], Any], what: str, seconds: float = DEADLINE_S) -> Any:
    """Wait until ``condition`` is true and return it; fail after ``seconds``."""
    deadline = time.monotonic() + seconds
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.01)


class MockThread:
    """Mock servers in an event loop of their own, in a thread of the test."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self._servers: list[asyncio.AbstractServer] = []

    def call(self, coroutine: Any) -> Any:
        """Run a coroutine there and wait for its result."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(DEADLINE_S)

    def add(self, role: str, behaviour: str = "") -> tuple[int, MockState]:
        """Start one mock server: its port and state."""
        server, port, state = self.call(start_mock(0, role, behaviour))
        self._servers.append(server)
        return port, state

    def close(self) -> None:
        """End the thread and all its servers."""

        async def end() -> None:
            for server in self._servers:
                server.close()
            for task in asyncio.all_tasks():
                if task is not asyncio.current_task():
                    task.cancel()

        self.call(end())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(DEADLINE_S)
        self.loop.close()


class ProxyProcess:
    """The proxy as a process, on a port of its own choice."""

    def __init__(self, *flags: str, env: dict[str, str] | None = None) -> None:
        clean = {k: v for k, v in os.environ.items() if not k.startswith("DISAGG_PROXY_")}
        self.process = subprocess.Popen(
            [sys.executable, str(PROXY), "--port", "0", *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**clean, **(env or {})},
        )
        self.messages: list[str] = []
        self.access_lines: list[dict[str, Any]] = []
        self._threads = [
            threading.Thread(target=self._read_messages, daemon=True),
            threading.Thread(target=self._read_access_log, daemon=True),
        ]
        for thread in self._threads:
            thread.start()
        self.port = 0
        try:
            wait_until(lambda: self._listening() or self.process.poll() is not None, "proxy listens")
            assert self.port, "\n".join(self.messages)
        except AssertionError:
            self.process.kill()
            raise
        self.url = f"http://127.0.0.1:{self.port}"

    def _listening(self) -> bool:
        for line in self.messages:
            match = re.search(r"listening on \w+://[^ ]*:(\d+)", line)
            if match:
                self.port = int(match[1])
                return True
        return False

    def _read_messages(self) -> None:
        for line in self.process.stderr:
            self.messages.append(line.decode(errors="replace").rstrip())

    def _read_access_log(self) -> None:
        for line in self.process.stdout:
            self.access_lines.append(json.loads(line))

    def connect(self) -> socket.socket:
        """Plain TCP connection to the proxy."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=DEADLINE_S)

    def access_line(self, request_id: str) -> dict[str, Any]:
        """Access log line of a request, once it is there."""
        return wait_until(
            lambda: next((line for line in self.access_lines if line["request_id"] == request_id), None),
            f"access log line of {request_id}",
        )

    def descriptors(self) -> int:
        """Open file descriptors of the proxy."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def resident_bytes(self) -> int:
        """Resident memory of the proxy."""
        with open(f"/proc/{self.process.pid}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and return the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(DEADLINE_S)
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()
            for thread in self._threads:
                thread.join(DEADLINE_S)


class Stack:
    """One prefill mock, one decode mock and the proxy before them."""

    def __init__(self, *flags: str, prefill: str = "", decode: str = "", env: dict[str, str] | None = None) -> None:
        self.mocks = MockThread()
        self.prefill_port, self.prefill = self.mocks.add("prefill", prefill)
        self.decode_port, self.decode = self.mocks.add("decode", decode)
        self.proxy = ProxyProcess(
            "--prefiller-port", str(self.prefill_port), "--decoder-port", str(self.decode_port), *flags, env=env
        )
        self.url = self.proxy.url

    def bodies(self, state: MockState, request_id: str) -> list[bytes]:
        """Bodies that a mock got under a request id."""
        return [
            r["body"].encode("latin-1") for r in list(state.requests) if r["headers"].get("x-request-id") == request_id
        ]

    def close(self) -> None:
        """End everything."""
        self.proxy.stop(signal.SIGKILL)
        self.mocks.close()


@contextlib.contextmanager
def stack(*flags: str, **options: Any) -> Iterator[Stack]:
    """A Stack for one test."""
    made = Stack(*flags, **options)
    try:
        yield made
    finally:
        made.close()


def dead_port() -> int:
    """A port on which nothing listens."""
    return free_ports(1)[0]
