"""Tells how many requests a vLLM server has in progress, so that whoever stops it can wait (launch/drain.py).

An ASGI middleware: ``vllm serve ... --middleware disagg_prefill_lmcache_v1.kv.in_flight.CountRequests``, after the
other ones, so that it stands around them: an answer that is held for its KV is in progress. ``GET /in-flight`` answers
with the number. vLLM's own gauges do not do: they tell of a request only after its first step, and not of held answers.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

PATH = "/in-flight"

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
Receive = Callable[[], Awaitable[Message]]


class CountRequests:
    """Counts what is POSTed: health checks and scrapes are nothing to wait for."""

    def __init__(self, app: Callable[[Message, Receive, Send], Awaitable[None]]) -> None:
        self._app = app
        self._count = 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            if scope["type"] == "http" and scope["path"] == PATH:
                await self._tell(send)
            else:
                await self._app(scope, receive, send)
            return
        self._count += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._count -= 1

    async def _tell(self, send: Send) -> None:
        body = b"%d" % self._count
        headers = [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})
