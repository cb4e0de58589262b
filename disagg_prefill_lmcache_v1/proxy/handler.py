"""One request from its first header to its log line: the checks, then prefill and decode."""

from __future__ import annotations

import asyncio
import hmac
import itertools
import logging
import time
import uuid
from collections.abc import Iterable

from disagg_prefill_lmcache_v1.proxy import bodies
from disagg_prefill_lmcache_v1.proxy.access_log import AccessLog
from disagg_prefill_lmcache_v1.proxy.answers import pass_on, send_error
from disagg_prefill_lmcache_v1.proxy.client import BodyTooLong, BodyTooSlow, ClientRequest
from disagg_prefill_lmcache_v1.proxy.decode import DecodeStage
from disagg_prefill_lmcache_v1.proxy.errors import ProxyError
from disagg_prefill_lmcache_v1.proxy.header_fields import PREFLIGHT, RequestHeaders, cors_lines, own_lines
from disagg_prefill_lmcache_v1.proxy.metrics import Metrics
from disagg_prefill_lmcache_v1.proxy.prefill import PrefillStage
from disagg_prefill_lmcache_v1.proxy.request import RequestContext
from disagg_prefill_lmcache_v1.proxy.settings import Settings
from disagg_prefill_lmcache_v1.proxy.upstream import Header

log = logging.getLogger("disagg_proxy")

_GENERATING = frozenset(bodies.LIMIT_FIELD)
# In these streams the last event tells the usage; in the others it comes only if asked for.
_ALWAYS_USAGE = ("/v1/messages", "/v1/responses")


class RequestHandler:
    """Serves the requests of one worker process."""

    def __init__(
        self, settings: Settings, metrics: Metrics, access_log: AccessLog | None, prefill: PrefillStage,
        decode: DecodeStage,
    ) -> None:  # fmt: skip
        self._settings = settings
        self._metrics = metrics
        self._access_log = access_log
        self._prefill = prefill
        self._decode = decode
        self._key = b"Bearer " + settings.api_key.encode() if settings.api_key else b""
        self._cors = frozenset(origin.encode() for origin in settings.cors_origin)
        self._ids = itertools.count(1)
        self._id_prefix = uuid.uuid4().hex[:20].encode()
        self._ttft = metrics.index("disagg_ttft_seconds")
        self._e2e = metrics.index("disagg_e2e_seconds")
        self._outcomes: dict[tuple[str, str, str], int] = {}  # indexes of series, found without a call
        self.finished = 0  # count of requests

    async def handle(
        self, client: ClientRequest, method: str, path: str, target: bytes, headers: Iterable[Header]
    ) -> None:
        """Serve one request."""
        given = RequestHeaders(headers)
        request_id = given.request_id or b"%b%012x" % (self._id_prefix, next(self._ids))
        given.sent_on.append(b"x-request-id: %b\r\n" % request_id)
        generating = path in _GENERATING and method == "POST"
        request = RequestContext(
            method, path, target, path if generating else "other", request_id.decode(), b"".join(given.sent_on),
            cors_lines(self._cors, given.origin) if self._cors and given.origin else b"",
        )  # fmt: skip
        try:
            if method == "OPTIONS" and request.cors:
                request.status = 204
                client.answer(204, [request.cors, PREFLIGHT, own_lines(request)], b"")
                return
            body = await self._checked_body(client, request, given)
            if generating:
                await self._generate(client, request, given.content_type, body)
            else:
                await self._decode.run(client, request, body)
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
            self._account(request)

    async def _checked_body(self, client: ClientRequest, request: RequestContext, given: RequestHeaders) -> bytes:
        """The request's body, once the client may send it. Raises ProxyError."""
        if self._key and request.method != "OPTIONS" and not self._is_key(given.authorization):
            raise ProxyError(401, "the API key is missing or wrong", "proxy", "unauthorized")
        if client.gone:
            raise asyncio.CancelledError
        limit, silence_s = self._settings.max_body_bytes, self._settings.client_timeout_s
        try:
            if given.content_length and int(given.content_length) > limit:
                raise BodyTooLong
            body = await client.body(limit, silence_s)
        except BodyTooLong:
            message = f"the request body is longer than {limit} bytes"
            raise ProxyError(413, message, "proxy", "bad_request") from None
        except BodyTooSlow:
            message = f"no more of the request body within {silence_s:g} s"
            raise ProxyError(408, message, "proxy", "client_stalled") from None
        if client.gone:  # a cancellation is forgotten by wait_for() when it comes together with the body
            raise asyncio.CancelledError
        return body

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
        shaped = None if fields is None else bodies.prefill_body(request.path, fields)
        if shaped is None:
            self._metrics.add("disagg_prefill_skipped", "no_prompt" if fields is None else "stored_response")
        else:
            refusal = await self._prefill.run(request, shaped, fields)
            if refusal is not None:
                pass_on(client, request, refusal)
                return
        request.want_usage = request.path in _ALWAYS_USAGE or (fields is not None and "stream_options" in fields)
        await self._decode.run(client, request, body)

    def _account(self, request: RequestContext) -> None:
        self.finished += 1
        total = time.perf_counter() - request.start
        metrics = self._metrics
        metrics.observe(self._e2e, total)
        if request.ttft_s >= 0:
            metrics.observe(self._ttft, request.ttft_s)
            metrics.add("disagg_streamed_bytes", by=float(request.sent))
        if request.prefill_outcome:
            self._count((request.route, "prefill", request.prefill_outcome))
        self._count((request.route, request.stage, request.outcome))
        if self._access_log is not None:
            self._access_log.write(request, total)

    def _count(self, key: tuple[str, str, str]) -> None:
        index = self._outcomes.get(key)
        if index is None:
            index = self._outcomes[key] = self._metrics.index("disagg_requests", *key)
        self._metrics.values[index] += 1.0
