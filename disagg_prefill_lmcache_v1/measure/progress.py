"""Lines for the terminal while something takes its time."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

PROGRESS_EVERY_S = 5.0


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


async def with_progress(work: Awaitable[Any], status: Callable[[], str]) -> Any:
    """Awaits `work`, with a line of `status` every few seconds."""
    begin = time.perf_counter()

    async def report() -> None:
        while True:
            await asyncio.sleep(PROGRESS_EVERY_S)
            say(f"{status()}, {time.perf_counter() - begin:.0f} s")

    reporter = asyncio.ensure_future(report())
    try:
        return await work
    finally:
        reporter.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await reporter
