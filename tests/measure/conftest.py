"""Mock servers for the load and the probe."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest
from mock_vllm import MockVllm


@pytest.fixture
def mocks() -> Iterator[tuple[MockVllm, MockVllm]]:
    """A mock proxy, which reuses all but one token, and a mock prefiller, which reuses none."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    proxy, prefiller = MockVllm(), MockVllm()
    proxy.cached = lambda prompt_tokens: prompt_tokens - 1
    for mock in (proxy, prefiller):
        asyncio.run_coroutine_threadsafe(mock.serve(), loop).result(60)
    yield proxy, prefiller

    async def end() -> None:
        for mock in (proxy, prefiller):
            await mock.runner.cleanup()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    asyncio.run_coroutine_threadsafe(end(), loop).result(60)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(60)
    loop.close()
