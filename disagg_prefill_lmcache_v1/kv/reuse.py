"""What was really reused of each prompt, told by the decoder's workers to whoever asked.

vLLM's ``cached_tokens`` counts what was to be loaded, whether it arrived or not: a request whose load failed says 599
of 600 and computes them all. Here the workers say of each load how many tokens vLLM goes on with, the scheduler adds
those that vLLM had itself (:class:`ReuseAccount`) and tells the API server. There an ASGI middleware,
:class:`TellReuse` (``vllm serve --middleware``), adds to the answer

    x-kv-reused-tokens: prompt tokens that were not computed
    x-kv-timing: queue=MS,first-step=MS,load=MS (until the engine scheduled it, then until the first bytes, without what
    loading took)

The header of a stream is held until its first bytes: when the first token is there, so is the number. An answer for
several prompts counts them all, several choices of one prompt count it once. Messages travel as in visibility.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from disagg_prefill_lmcache_v1.kv.load_scheduler import merge, put_bounded
from disagg_prefill_lmcache_v1.kv.settings import from_environment
from disagg_prefill_lmcache_v1.kv.visibility import (
    GENERATING,
    Announcer,
    Listener,
    Message,
    Receive,
    Send,
    Visibility,
    with_request_id,
)

TOLD_WITHIN_S = 1.0  # of an answer that has ended
_child = re.compile(r"[0-9]+_").match  # vLLM's id of one of several choices begins with its number


class ReuseAccount:
    """The scheduler's account of what each request reuses; every method is called by the scheduler's thread.

    Args:
        ranks: workers that load.
        beside: loads run beside the engine's steps: one takes from when its request was scheduled until the scheduler
            hears of its end. Else it takes what the slowest worker has measured, within a step.
    """

    def __init__(self, announcer: Announcer, ranks: int, beside: bool = False) -> None:
        self._announcer = announcer
        self._ranks = ranks
        self._beside = beside
        self._cached: dict[str, int] = {}
        # tokens that vLLM has, tokens to be loaded, when; outlives its request: workers may speak later, or never
        self._loading: OrderedDict[str, tuple[int, int, float]] = OrderedDict()
        self._seen: OrderedDict[str, list[float]] = OrderedDict()
        self._known: set[str] = set()

    def looked_up(self, request_id: str, cached: int) -> None:
        """vLLM's own cache has ``cached`` tokens."""
        self._cached[request_id] = cached

    def scheduled(self, request_id: str, tokens: int) -> None:
        """The request has its blocks, and ``tokens`` are to be loaded. vLLM says so again when they are."""
        if request_id in self._known:
            return
        self._known.add(request_id)
        cached = self._cached.pop(request_id, 0)
        if tokens:
            put_bounded(self._loading, request_id, (cached, tokens, time.monotonic()))
        else:
            self._announcer.reused(request_id, cached, time.monotonic())

    def loaded(self, used: Mapping[str, list[float]]) -> None:
        """What workers have said since: request to [seconds, ranks, tokens that vLLM goes on with]."""
        for request_id, values in used.items():
            seen = merge(self._seen.pop(request_id, None), values)
            if seen[1] < self._ranks:
                put_bounded(self._seen, request_id, seen)
            elif request_id in self._loading:
                cached, expected, scheduled_at = self._loading.pop(request_id)
                load_s = time.monotonic() - scheduled_at if self._beside else seen[0]
                self._announcer.reused(request_id, cached + min(int(seen[2]), expected), scheduled_at, load_s)

    def finished(self, request_id: str) -> None:
        """The request has ended."""
        self._known.discard(request_id)
        self._cached.pop(request_id, None)


class Reuse(Visibility):
    """What was told about the engine requests of one HTTP request."""

    def __init__(self) -> None:
        super().__init__()
        self._tokens: dict[str, int] = {}
        self.load_s = 0.0  # the longest of its engine requests

    def reused(self, request_id: str, tokens: int, load_s: float) -> None:
        self.load_s = max(self.load_s, load_s)
        found = _child(request_id)
        name = request_id[found.end() :] if found else request_id
        self._tokens[name] = max(self._tokens.get(name, 0), tokens)
        self.announced.set()

    @property
    def tokens(self) -> int:
        return sum(self._tokens.values())


class TellReuse:
    """ASGI middleware for the decoder: see the module's text."""

    def __init__(self, app: Callable[[Message, Receive, Send], Awaitable[None]]) -> None:
        self._app = app
        self._name = from_environment().visibility
        self._timeout_s = from_environment().wait_timeout
        self._listener: Listener | None = None

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if not self._name or scope["type"] != "http" or scope["path"] not in GENERATING:
            await self._app(scope, receive, send)
            return
        if self._listener is None:
            self._listener = Listener(self._name)
        scope, token = with_request_id(scope)
        reuse = self._listener.watch(token, scope.setdefault("state", {}), Reuse())
        start: Message | None = None

        async def tell(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start" and message["status"] < 400:
                start = message
                return
            if start is not None:
                begun, start = start, None
                # of a stream the first event may come before the first token
                ended = message["type"] == "http.response.body" and not message.get("more_body", False)
                within_s = min(TOLD_WITHIN_S, self._timeout_s) if ended else self._timeout_s
                await send({**begun, "headers": [*begun["headers"], *await self._header(reuse, within_s)]})
            await send(message)

        try:
            await self._app(scope, receive, tell)
        finally:
            self._listener.forget(token, reuse)

    async def _header(self, reuse: Reuse, within_s: float) -> list[tuple[bytes, bytes]]:
        self._listener.drain()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(reuse.announced.wait(), within_s)
            timing = reuse.timing(("queue", "first-step", "load"), reuse.load_s, time.monotonic())
            return [(b"x-kv-reused-tokens", b"%d" % reuse.tokens), *timing]
        return []


def used_tokens(missing: Any, cached: int, block_size: int) -> int:
    """Of the tokens to be loaded, those that vLLM goes on with: it computes from the first block that lacks one.

    Args:
        missing: ``[tokens]`` bool tensor, see DisaggWorker.load.
        cached: tokens that vLLM has.
    """
    lacking = missing.nonzero()
    end = int(lacking[0]) // block_size * block_size if len(lacking) else len(missing)
    return max(end - cached, 0)
