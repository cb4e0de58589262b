"""The prefill stage: has a prefill server fill the KV cache, and notes what became of it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import Any

from disagg_prefill_lmcache_v1.proxy import bodies, hand_over, timing
from disagg_prefill_lmcache_v1.proxy.errors import ProxyError
from disagg_prefill_lmcache_v1.proxy.health import Upstream
from disagg_prefill_lmcache_v1.proxy.metrics import Metrics
from disagg_prefill_lmcache_v1.proxy.pool import Pool
from disagg_prefill_lmcache_v1.proxy.request import RequestContext
from disagg_prefill_lmcache_v1.proxy.settings import Settings
from disagg_prefill_lmcache_v1.proxy.upstream import Limits, Response, UpstreamError

log = logging.getLogger("disagg_proxy")

_KV_STATES = {b"stored": "stored", b"timeout": "timeout", b"failed": "failed", b"none": "none"}


class PrefillStage:
    """Sends prefill requests to the servers of one pool."""

    def __init__(self, settings: Settings, pool: Pool, metrics: Metrics) -> None:
        self._settings = settings
        self._limits = Limits(whole_s=settings.prefill_timeout_s)
        self._hands_over = settings.kv_hand_over == "params"
        self._pool = pool
        self._metrics = metrics
        self._time = asyncio.get_running_loop().time
        self._down = False
        self._seconds = metrics.index("disagg_prefill_seconds")
        self._kv_wait = metrics.index("disagg_kv_wait_seconds")
        self.in_flight = metrics.index("disagg_in_flight", "prefill")
        self._kv_indexes = {
            state: metrics.index("disagg_kv_state", state) for state in (*_KV_STATES.values(), "unknown")
        }
        metrics.set("disagg_kv_degraded", to=0.0)

    async def run(self, request: RequestContext, body: list[Any], fields: dict[str, Any]) -> Response | None:
        """Fill the KV cache for a request. ``body`` is the prefill request's, in pieces.

        Returns the answer if the server refused the request itself (4xx), else None. Raises ProxyError where a failed
        prefill ends the request.
        """
        request.stage = "prefill"
        pool = self._pool
        tried = [upstream for upstream in pool.upstreams if upstream.kv_mismatch]  # of no use to any decode server
        reason = tried[0].kv_mismatch if tried else "no prefill server"
        attempts = 2
        while attempts:
            upstream = pool.choose(request.prompt, tried)
            if upstream is None:
                break
            if upstream.open_until > self._time() and not upstream.refusing:
                reason = f"{upstream.name} does not answer"
                tried.append(upstream)
                continue
            try:
                response = await self._ask(upstream, request, body)
            except UpstreamError as error:
                reason = f"{upstream.name}: {error}"
                request.prefill_outcome = error.kind
                upstream.note_error(error)
                if error.taken and error.kind == "lost":
                    request.deaths += (upstream.death(sure=True),)
                if error.taken or error.kind == "exhausted":
                    break
                attempts -= 1
                if error.kind != "lost":  # else an idle connection had been closed: the server is asked once more
                    tried.append(upstream)
                continue
            status = response.status
            if status < 300:
                self._note_success(request, response, upstream)
                return None
            if 400 <= status < 500:
                request.prefill_outcome = "client_error"
                return None if bodies.refusal_may_be_wrong(fields) else response
            request.prefill_outcome = "server_error"
            if status == 500:
                request.deaths += (upstream.death(sure=False),)
            reason = f"{upstream.name} answers {status}"
            break
        self._give_up(request, reason)
        return None

    async def _ask(self, upstream: Upstream, request: RequestContext, body: list[Any]) -> Response:
        request.prefiller = upstream.authority
        trace = request.trace
        headers = request.headers if trace is None else trace.asked(request, "prefill", upstream.authority)
        size = len(body[0]) if len(body) == 1 else sum(map(len, body))
        head = b"POST %b HTTP/1.1\r\n%b%bcontent-length: %d\r\n\r\n" % (
            request.target, upstream.host_line, headers, size,
        )  # fmt: skip
        values = self._metrics.values
        begin = time.perf_counter()
        request.prefill_sent = request.prefill_sent or begin
        prompt = request.prompt
        tokens = 0 if prompt is None else max(prompt.tokens - prompt.known, 1)
        ahead = upstream.load.add(tokens) if tokens else 0.0
        upstream.in_flight += 1
        values[self.in_flight] += 1.0
        try:
            response = await upstream.client.request(
                head + body[0] if len(body) == 1 else (head, *body), limits=self._limits
            )
        finally:
            upstream.load.tokens -= tokens
            upstream.in_flight -= 1
            values[self.in_flight] -= 1.0
        request.prefill_answered = end = time.perf_counter()
        request.prefill_s = end - begin
        self._metrics.observe(self._seconds, request.prefill_s)
        if tokens and response.status < 300:
            upstream.load.line.note(ahead, request.prefill_s)
        if not response.complete:
            response.connection.abort()
        return response

    def _note_success(self, request: RequestContext, response: Response, upstream: Upstream) -> None:
        request.prefill_outcome = "ok"
        upstream.note_answer()
        self._note_kv(request, response, upstream)
        if self._hands_over and response.complete:
            request.hand_over = hand_over.told(response.body)
        if self._down:
            self._down = False
            log.info("prefill works again")

    def _give_up(self, request: RequestContext, reason: str) -> None:
        """Go on without prefill, or raise ProxyError, as the settings say."""
        if not self._down:
            self._down = True
            log.warning("prefill failed, decoding without it: %s", reason)
        request.kv_state = "none"
        request.error_detail = reason
        if not request.prefill_outcome:
            request.prefill_outcome = "unavailable"
        if self._settings.prefill_failure == "fail":
            status = 504 if request.prefill_outcome == "timeout" else 503
            message = f"prefill failed: {request.prefill_outcome.replace('_', ' ')}"
            raise ProxyError(status, message, "prefill", request.prefill_outcome, reason)
        self._metrics.add("disagg_prefill_skipped", request.prefill_outcome)

    def _note_kv(self, request: RequestContext, response: Response, upstream: Upstream) -> None:
        state, wait, reason = "unknown", None, ""
        for name, value, _ in response.internal:
            if name == b"x-kv-state":
                state = _KV_STATES.get(value, "unknown")
            elif name == b"x-kv-reason":
                reason = ": " + value.decode("latin-1")
            elif name == b"x-kv-wait-ms":
                with contextlib.suppress(ValueError):
                    wait = float(value)
            elif name == timing.HEADER:
                request.prefill_told = timing.told_times(timing.told_by_prefill(value))
            elif name == b"x-kv-transfer-ms":
                with contextlib.suppress(ValueError):
                    request.kv_transfer_ms = float(value)
        request.kv_state = state
        self._metrics.values[self._kv_indexes[state]] += 1.0
        if wait is not None:
            request.kv_wait_ms = wait
            self._metrics.observe(self._kv_wait, wait / 1000)
        degraded = state in ("timeout", "failed")
        if state != "none" and degraded != upstream.kv_degraded:
            self._note_degraded(upstream, degraded, state + reason)

    def _note_degraded(self, upstream: Upstream, degraded: bool, reason: str) -> None:
        upstream.kv_degraded = degraded
        if degraded:
            log.warning("KV caches of %s do not reach the store, decoders compute again: %s", upstream.name, reason)
        else:
            log.info("KV caches of %s reach the store again", upstream.name)
        self._metrics.set("disagg_kv_degraded", to=float(not all(u.shares_kv for u in self._pool.upstreams)))
