"""Fixtures that several test files share."""

from __future__ import annotations

import asyncio
import shutil
import threading

import pytest


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


@pytest.fixture(scope="module", params=["lm", "redis", "shm", "nixl"])
def server(request):
    """A real KV store of each kind."""
    from kv_stores import Server

    if request.param == "redis" and not shutil.which("redis-server"):
        pytest.skip("redis-server is not installed")
    server = Server(request.param)
    yield server
    server.stop()
