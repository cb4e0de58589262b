"""Fixtures that several test files share."""

from __future__ import annotations

import asyncio
import shutil
import signal
import threading
from collections.abc import Iterator

import pytest

# Under nohup it is ignored, by everything that a test starts as well.
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture
def loop():
    """An event loop that runs in a thread, as LMCache's does."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.fixture(scope="module", params=["lm", "redis", "shm"])
def server(request):
    """A real KV store of each kind."""
    from kv_stores import Server

    if request.param == "redis" and not shutil.which("redis-server"):
        pytest.skip("redis-server is not installed")
    server = Server(request.param)
    yield server
    server.stop()


@pytest.fixture
def one_torch_thread() -> Iterator[None]:
    """Threads that wait for each other cost more than they bring on a busy machine."""
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
