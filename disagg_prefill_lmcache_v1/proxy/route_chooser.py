"""What the proxy knows for routing.py: lengths of prompts, what the servers have to compute, and how long they took.

Nothing here runs with ``--route always``.
"""

from __future__ import annotations

import time
from bisect import bisect_right

from disagg_prefill_lmcache_v1.proxy.health import Upstream
from disagg_prefill_lmcache_v1.proxy.metrics import SECONDS, Metrics
from disagg_prefill_lmcache_v1.proxy.pool import Pool
from disagg_prefill_lmcache_v1.proxy.request import RequestContext
from disagg_prefill_lmcache_v1.proxy.routing import ALWAYS, Router
from disagg_prefill_lmcache_v1.proxy.settings import Settings


class RouteChooser:
    """Decides for each request whether a prefill server is asked, and learns from how it went."""

    def __init__(self, settings: Settings, prefillers: Pool, decoders: Pool, metrics: Metrics) -> None:
        threshold = int(settings.route) if settings.route.isdecimal() else 0
        self._router = Router("" if threshold else settings.route, threshold, settings.ttft_target_ms / 1000)
        self._prefillers, self._decoders = prefillers, decoders
        self._metrics = metrics
        # Gaps between tokens are counted in a histogram already; its bounds are near enough to any target.
        first = metrics.index("disagg_itl_seconds")
        self._gaps = slice(first, first + len(SECONDS) + 1)
        self._bound = bisect_right(SECONDS, settings.itl_target_ms / 1000)
        self._seen = self._over = 0.0

    def choose(self, request: RequestContext) -> bool:
        """Whether the request goes straight to a decode server."""
        self._note_gaps()
        prompt = request.prompt
        prefiller, known = self._prefillers.likely(prompt)
        decoder, _ = self._decoders.likely(prompt)
        if prompt is None or prefiller is None or decoder is None:
            return False  # which is told as ever
        choice = self._router.choose(prompt.tokens, known, prefiller.load, decoder.load, decoder.in_flight)
        request.way = "direct" if choice.direct else "pair"
        request.way_reason = choice.reason
        request.expected_s = choice.expected_s
        self._metrics.add("disagg_routes", request.way, choice.reason)
        return choice.direct

    def decoding(self, request: RequestContext, upstream: Upstream) -> None:
        """A decode server is about to be asked: a prompt that goes straight there is its work until the first token."""
        if request.on_first_token is not None:  # another one was asked before
            request.on_first_token()
        prompt = request.prompt
        if request.way != "direct" or prompt is None:
            return
        load, tokens, answers = upstream.load, max(prompt.tokens - prompt.known, 1), upstream.in_flight
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
        """The request is over: what it tells of the way from prefill to the first token."""
        if request.on_first_token is not None:  # there was none
            request.on_first_token()
        if request.ttft_s >= 0 and request.prefill_outcome == "ok" and request.prompt is not None:
            after = request.start + request.ttft_s - request.prefill_answered
            self._router.handover.note(request.prompt.tokens, after)

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
