"""What the proxy knows for routing.py: lengths of prompts, what the servers have to compute, and how long they took.

A prompt's tokens are counted where it is token ids, else estimated from its bytes by what the servers' usage has told.
Nothing here runs with ``--route always``.
"""

from __future__ import annotations

import re
import time
from bisect import bisect_right
from typing import Any

from disagg_prefill_lmcache_v1.proxy.health import Upstream
from disagg_prefill_lmcache_v1.proxy.metrics import SECONDS, Metrics
from disagg_prefill_lmcache_v1.proxy.pool import Pool
from disagg_prefill_lmcache_v1.proxy.request import RequestContext
from disagg_prefill_lmcache_v1.proxy.routing import ALWAYS, Router
from disagg_prefill_lmcache_v1.proxy.settings import Settings

_TOKENS_PER_BYTE = 0.25  # of text, before any answer has told
_LEARN = 0.1
# Token ids, one prompt or a list of them, however they are set.
_begins_with_ids = re.compile(rb"[ \t\r\n]*\[[\[ \t\r\n]*[0-9]").match


class RouteChooser:
    """Decides for each request whether a prefill server is asked, and learns from how it went."""

    def __init__(self, settings: Settings, prefillers: Pool, decoders: Pool, metrics: Metrics) -> None:
        threshold = int(settings.route) if settings.route.isdecimal() else 0
        self._router = Router("" if threshold else settings.route, threshold, settings.ttft_target_ms / 1000)
        self._prefillers, self._decoders = prefillers, decoders
        self._metrics = metrics
        self._tokens_per_byte = _TOKENS_PER_BYTE
        # Gaps between tokens are counted in a histogram already; its bounds are near enough to any target.
        first = metrics.index("disagg_itl_seconds")
        self._gaps = slice(first, first + len(SECONDS) + 1)
        self._bound = bisect_right(SECONDS, settings.itl_target_ms / 1000)
        self._seen = self._over = 0.0

    def choose(self, request: RequestContext, fields: dict[str, Any]) -> bool:
        """Whether the request goes straight to a decode server."""
        request.route_bytes, request.route_tokens = self._length(fields)
        self._note_gaps()
        if not self._decoders.upstreams or not self._prefillers.upstreams:
            return False  # which is told as ever
        decoder = min(_up(self._decoders), key=_in_flight)
        prefiller = min(_up(self._prefillers), key=_tokens)
        choice = self._router.choose(
            request.route_tokens, 0.0, prefiller.load, decoder.load, decoder.in_flight
        )  # fmt: skip
        request.way = "direct" if choice.direct else "pair"
        request.way_reason = choice.reason
        request.expected_s = choice.expected_s
        self._metrics.add("disagg_routes", request.way, choice.reason)
        return choice.direct

    def decoding(self, request: RequestContext, upstream: Upstream) -> None:
        """A decode server is about to be asked: a prompt that goes straight there is its work until the first token."""
        if request.on_first_token is not None:  # another one was asked before
            request.on_first_token()
        if request.way != "direct":
            return
        load, tokens, answers = upstream.load, request.route_tokens, upstream.in_flight
        ahead, begin, over = load.add(tokens), time.perf_counter(), self._over

        def first_token() -> None:
            request.on_first_token = None
            load.tokens -= tokens
            if request.ttft_s >= 0:
                load.line.note(ahead, request.start + request.ttft_s - begin)
                self._note_gaps()
                self._router.gaps.note_harm(tokens, answers, self._over - over)

        request.on_first_token = first_token

    def finished(self, request: RequestContext) -> None:
        """The request is over: what it tells of lengths and of the way from prefill to the first token."""
        if request.on_first_token is not None:  # there was none
            request.on_first_token()
        if request.prompt_tokens > 0 and request.route_bytes:
            self._tokens_per_byte += _LEARN * (request.prompt_tokens / request.route_bytes - self._tokens_per_byte)
        if request.ttft_s >= 0 and request.prefill_outcome == "ok":
            after = request.start + request.ttft_s - request.prefill_answered
            self._router.handover.note(request.route_tokens, after)

    def _length(self, fields: dict[str, Any]) -> tuple[int, float]:
        """(bytes of text, tokens) of the prompt; 0 bytes where it is token ids, which are counted."""
        value = next((fields[name] for name in ("prompt", "messages", "input") if name in fields), b"")
        text = bytes(value)
        if _begins_with_ids(text):
            return 0, text.count(b",") + 1.0
        return len(text), len(text) * self._tokens_per_byte

    def _note_gaps(self) -> None:
        counts = self._metrics.values[self._gaps]
        seen, over = sum(counts), sum(counts[self._bound :])
        if seen > self._seen:
            self._router.gaps.note(seen - self._seen, over - self._over)
            self._seen, self._over = seen, over


def make_chooser(settings: Settings, prefillers: Pool, decoders: Pool, metrics: Metrics) -> RouteChooser | None:
    """None where every request goes through a prefill server, or none does."""
    if settings.route == ALWAYS or settings.decode_only:
        return None
    return RouteChooser(settings, prefillers, decoders, metrics)


def _up(pool: Pool) -> list[Upstream]:
    """Servers that requests go to: one that is down is idle, and tells nothing of the others."""
    return [upstream for upstream in pool.upstreams if upstream.up] or pool.upstreams


def _in_flight(upstream: Upstream) -> int:
    return upstream.in_flight


def _tokens(upstream: Upstream) -> float:
    return upstream.load.tokens
