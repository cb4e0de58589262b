"""One request from its first header to its log line: the checks, then prefill and decode."""

from __future__ import annotations

import asyncio
import hmac
import itertools
import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

from disagg_prefill_lmcache_v1.proxy import bodies, hand_over, status
from disagg_prefill_lmcache_v1.proxy.access_log import AccessLog
from disagg_prefill_lmcache_v1.proxy.adapters import LOAD, UNLOAD, AdapterStage
from disagg_prefill_lmcache_v1.proxy.admission import Admission
from disagg_prefill_lmcache_v1.proxy.answers import pass_on, send_error
from disagg_prefill_lmcache_v1.proxy.client_request import ClientRequest
from disagg_prefill_lmcache_v1.proxy.decode import DecodeStage
from disagg_prefill_lmcache_v1.proxy.errors import ProxyError, too_long
from disagg_prefill_lmcache_v1.proxy.header_fields import PREFLIGHT, RequestHeaders, cors_lines, own_lines
from disagg_prefill_lmcache_v1.proxy.metrics import Metrics
from disagg_prefill_lmcache_v1.proxy.pool import PREFILL
from disagg_prefill_lmcache_v1.proxy.prefill import PrefillStage
from disagg_prefill_lmcache_v1.proxy.prompt_meter import PromptMeter
from disagg_prefill_lmcache_v1.proxy.request import RequestContext, TraceMaker
from disagg_prefill_lmcache_v1.proxy.route_chooser import RouteChooser
from disagg_prefill_lmcache_v1.proxy.settings import Settings
from disagg_prefill_lmcache_v1.proxy.steering import steering_field, steering_field_of
from disagg_prefill_lmcache_v1.proxy.suspects import Suspects
from disagg_prefill_lmcache_v1.proxy.timing import PARTS, ttft_parts

log = logging.getLogger("disagg_proxy")

OWN_PATHS = frozenset({"/health", "/ready", "/metrics"})
_NEED_NO_KEY = ("/health", status.PAGE)
_GENERATING = frozenset(bodies.LIMIT_FIELD)
# In these streams the last event tells the usage; in the others it comes only if asked for.
_ALWAYS_USAGE = ("/v1/messages", "/v1/responses")


OwnRoute = Callable[[str, str], Awaitable[tuple[int, list[bytes], bytes]]]
"""Answers a request for one of the proxy's own paths (method, path): status, header lines, body."""


class RequestHandler:
    """Serves the requests of one worker process."""

    def __init__(
        self, settings: Settings, metrics: Metrics, access_log: AccessLog | None, prefill: PrefillStage,
        decode: DecodeStage, adapters: AdapterStage, own_route: OwnRoute, prompts: PromptMeter,
        chooser: RouteChooser | None = None, tracing: TraceMaker | None = None,
    ) -> None:  # fmt: skip
        self._settings = settings
        self._metrics = metrics
        self._access_log = access_log
        self._prefill = prefill
        self._decode = decode
        self._adapters = adapters
        self._own_route = own_route
        self._prompts = prompts
        self._chooser = chooser
        self._tracing = tracing
        self._own_paths = OWN_PATHS | {status.PAGE, status.DATA} if settings.status_page else OWN_PATHS
        self._key = b"Bearer " + settings.api_key.encode() if settings.api_key else b""
        self._cors = frozenset(origin.encode() for origin in settings.cors_origin)
        self._suspects = Suspects(settings.suspect_request_s)
        self._admission = None
        if settings.max_in_flight:
            self._admission = Admission(settings.max_in_flight, settings.max_queue, settings.queue_timeout_s, metrics)
        self._ids = itertools.count(1)
        self._id_prefix = uuid.uuid4().hex[:20].encode()
        self._ttft = metrics.index("disagg_ttft_seconds")
        self._parts = {part: metrics.index("disagg_ttft_part_seconds", part) for part in PARTS}
        self._e2e = metrics.index("disagg_e2e_seconds")
        self._outcomes: dict[tuple[str, str, str], int] = {}  # indexes of series, found without a call
        self.finished = 0  # count of requests

    async def handle(self, client: ClientRequest) -> None:
        """Serve one request."""
        known = client.known
        if known is None:
            given = RequestHeaders(client.headers)
            lines = b"".join(given.sent_on)
        else:
            given, lines = known.given, known.lines
        request_id = given.request_id or b"%b%012x" % (self._id_prefix, next(self._ids))
        method, path = client.method, client.path
        request = RequestContext(
            method, path, client.target, path if path in _GENERATING and method == "POST" else "other",
            request_id.decode(), b"%bx-request-id: %b\r\n" % (lines, request_id),
            cors_lines(self._cors, given.origin) if self._cors and given.origin else b"",
        )  # fmt: skip
        logged = True
        try:
            client.check()
            fault = given.fault(client.version)
            if fault:
                client.keep_alive = False
                raise ProxyError(400, fault, "proxy", "bad_request")
            if method == "OPTIONS" and request.cors:
                request.status = 204
                client.answer(204, [request.cors, PREFLIGHT, own_lines(request)], b"")
            elif path in self._own_paths:
                logged = False
                await self._answer_itself(client, request, given)
            else:
                await self._forward(client, request, given)
        except ProxyError as error:
            send_error(client, request, error)
        except asyncio.CancelledError:
            if client.gone:
                request.outcome = "client_gone"
            else:  # the drain deadline has passed
                send_error(client, request, ProxyError(503, "the proxy is shutting down", request.stage, "shutdown"))
        except Exception:
            log.exception("request %s failed inside the proxy", request.request_id)
            send_error(client, request, ProxyError(500, "internal error", request.stage, "internal_error"))
        finally:
            if logged:
                self._account(request)

    async def _answer_itself(self, client: ClientRequest, request: RequestContext, given: RequestHeaders) -> None:
        """One of the proxy's own paths."""
        if request.path not in _NEED_NO_KEY:
            self._check_key(request.method, given)
        await client.body()
        status, lines, body = await self._own_route(request.method, request.path)
        if request.cors:
            lines.append(request.cors)
        client.answer(status, lines, body)

    async def _forward(self, client: ClientRequest, request: RequestContext, given: RequestHeaders) -> None:
        """Everything else: prefill and decode, or the decode server alone."""
        self._check_key(request.method, given)
        limit = self._settings.max_body_bytes
        if given.content_length and int(given.content_length) > limit:
            raise too_long(limit)
        if self._tracing is not None:
            request.trace = self._tracing.begin(request, client.headers)
        admission = self._admission
        if admission is not None:
            await admission.enter()
        try:
            client.expects_continue = given.expects_continue
            body = await client.body()
            if request.route != "other":
                await self._generate(client, request, given.content_type, body)
            else:
                if body and not self._settings.trusted_kv_transfer_params:
                    _refuse_steering(steering_field_of(body))
                all_servers = request.method == "POST" and request.path in (LOAD, UNLOAD)
                await (self._adapters if all_servers else self._decode).run(client, request, body)
        finally:
            if admission is not None:
                admission.leave()

    def _check_key(self, method: str, given: RequestHeaders) -> None:
        # A browser asks without a key whether it may ask.
        asks = method == "OPTIONS" and not given.transfer_encoding and given.content_length in (b"", b"0")
        if self._key and not asks and not self._is_key(given.authorization):
            raise ProxyError(401, "the API key is missing or wrong", "proxy", "unauthorized")

    def _is_key(self, authorization: bytes) -> bool:
        # The scheme may be written in any case; it is not part of the secret.
        if authorization[:7].lower() == b"bearer ":
            authorization = b"Bearer " + authorization[7:].strip()
        return hmac.compare_digest(authorization, self._key)

    async def _generate(self, client: ClientRequest, request: RequestContext, content_type: bytes, body: bytes) -> None:
        if content_type != b"application/json" and content_type.lower().split(b";")[0].strip() != b"application/json":
            raise ProxyError(415, "the content type must be application/json", "proxy", "bad_request")
        try:
            fields = bodies.parse_fields(body)
        except bodies.BadJSON as error:
            raise ProxyError(400, f"the request body is not valid JSON: {error}", "proxy", "bad_request") from None
        if fields is not None and not self._settings.trusted_kv_transfer_params:
            _refuse_steering(steering_field(fields))
        if request.trace is not None and fields is not None and "model" in fields:
            request.trace.model(fields["model"])
        ended = self._suspects.roles(request.path, body)
        whole = False
        try:
            await self._generate_from(client, request, body, fields, PREFILL in ended)
            whole = True
        finally:
            self._suspects.note(request, body, whole)

    async def _generate_from(
        self, client: ClientRequest, request: RequestContext, body: bytes, fields: dict[str, Any] | None, suspect: bool
    ) -> None:
        shaped, reason = self._shaped(request, fields, suspect and self._settings.prefill_failure == "decode")
        if fields is not None:
            request.prompt = self._prompts.measure(fields)
        if shaped is None:
            self._metrics.add("disagg_prefill_skipped", reason)
        elif self._chooser is None or not self._chooser.choose(request):
            refusal = await self._prefill.run(request, shaped, fields)
            if refusal is not None:
                pass_on(client, request, refusal)
                return
        request.want_usage = request.path in _ALWAYS_USAGE or (fields is not None and "stream_options" in fields)
        await self._decode.run(client, request, body)

    def _shaped(
        self, request: RequestContext, fields: dict[str, Any] | None, suspect: bool
    ) -> tuple[list[Any] | None, str]:
        """The prefill request's body in pieces, or None and why there is none."""
        if suspect or self._settings.decode_only:
            return None, "suspect" if suspect else "decode_only"
        if fields is None:
            return None, "no_prompt"
        more = {}
        if self._settings.kv_hand_over == "params":
            if not hand_over.is_possible(fields):
                return None, "several_choices"
            more = {hand_over.FIELD: hand_over.ASK}
        return bodies.prefill_body(request.path, fields, **more), "stored_response"

    def _account(self, request: RequestContext) -> None:
        self.finished += 1
        total = time.perf_counter() - request.start
        metrics = self._metrics
        metrics.observe(self._e2e, total)
        if request.ttft_s >= 0:
            metrics.observe(self._ttft, request.ttft_s)
            request.parts = ttft_parts(request, request.ttft_s)
            metrics.observe_each(self._parts, request.parts)
            metrics.add("disagg_streamed_bytes", by=float(request.sent))
        if request.prompt is not None:
            self._prompts.learn(request)
        if self._chooser is not None:
            self._chooser.finished(request)
        if request.prefill_outcome:
            self._count((request.route, "prefill", request.prefill_outcome))
        self._count((request.route, request.stage, request.outcome))
        if request.trace is not None:
            request.trace.end(request)
        if self._access_log is not None:
            self._access_log.write(request, total)

    def _count(self, key: tuple[str, str, str]) -> None:
        index = self._outcomes.get(key)
        if index is None:
            index = self._outcomes[key] = self._metrics.index("disagg_requests", *key)
        self._metrics.values[index] += 1.0


def _refuse_steering(field: str) -> None:
    if field:
        message = f"{field} is not taken from clients (--trusted-kv-transfer-params allows it)"
        raise ProxyError(400, message, "proxy", "bad_request")
