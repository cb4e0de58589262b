"""How many requests are in progress at once: a place for each, and a queue for those that find none."""

from __future__ import annotations

import asyncio
from collections import OrderedDict

from disagg_prefill_lmcache_v1.proxy.errors import ProxyError
from disagg_prefill_lmcache_v1.proxy.metrics import Metrics


class Admission:
    """At most ``places`` requests at once, at most ``queue`` more that wait, each for at most ``timeout_s``."""

    def __init__(self, places: int, queue: int, timeout_s: float, metrics: Metrics) -> None:
        self._places = places
        self._queue = queue
        self._timeout_s = timeout_s
        self._taken = 0
        self._metrics = metrics
        self._waiting_index = metrics.index("disagg_in_flight", "queue")
        self._waiting: OrderedDict[asyncio.Future[None], None] = OrderedDict()

    async def enter(self) -> None:
        """Take a place, which must be given back by leave(). Raises ProxyError when there is none in time."""
        if self._taken < self._places:
            self._taken += 1
            return
        if len(self._waiting) >= self._queue:
            raise ProxyError(429, "too many requests are in progress", "proxy", "overload")
        turn = asyncio.get_running_loop().create_future()
        self._waiting[turn] = None
        self._metrics.values[self._waiting_index] += 1.0
        try:
            await asyncio.wait((turn,), timeout=self._timeout_s)
        except asyncio.CancelledError:
            if turn.done():
                self.leave()
            raise
        finally:
            self._waiting.pop(turn, None)
            self._metrics.values[self._waiting_index] -= 1.0
        if not turn.done():
            raise ProxyError(503, f"no place became free within {self._timeout_s:g} s", "proxy", "overload")

    def leave(self) -> None:
        """Give a place back; whoever waits the longest gets it."""
        if self._waiting:
            turn, _ = self._waiting.popitem(last=False)
            turn.set_result(None)
        else:
            self._taken -= 1
