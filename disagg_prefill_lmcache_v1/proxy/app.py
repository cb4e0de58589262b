"""The proxy application: prefill, then decode, and everything else straight to the decode server."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import hmac
import itertools
import json
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Iterable
from typing import Any

from fastapi import FastAPI
from fastapi import Response as FastAPIResponse
from fastapi.responses import JSONResponse

from disagg_prefill_lmcache_v1.proxy import bodies as proxy_bodies
from disagg_prefill_lmcache_v1.proxy.access_log import AccessLog
from disagg_prefill_lmcache_v1.proxy.downstream import BodyTooLong, BodyTooSlow, ClientProtocol, ClientRequest
from disagg_prefill_lmcache_v1.proxy.metrics import Metrics
from disagg_prefill_lmcache_v1.proxy.pool import DECODE, PREFILL, Pool, Upstream, file_stamp, read_members
from disagg_prefill_lmcache_v1.proxy.settings import Settings, SettingsError
from disagg_prefill_lmcache_v1.proxy.upstream import Connection, Header, Response, UpstreamError

log = logging.getLogger("disagg_proxy")

OWN_PATHS = frozenset({"/health", "/ready", "/metrics"})
_GENERATING = frozenset(proxy_bodies.LIMIT_FIELD)

# Hop-by-hop headers, and those that are made anew for each hop.
_HOP_BY_HOP = frozenset(
    (b"connection", b"keep-alive", b"proxy-connection", b"proxy-authenticate", b"proxy-authorization", b"te",
     b"trailer", b"transfer-encoding", b"upgrade", b"content-length")
)  # fmt: skip
_NOT_SENT_ON = _HOP_BY_HOP | {b"host", b"expect", b"x-request-id"}
_NOT_SENT_BACK = _HOP_BY_HOP | {b"x-request-id", b"x-kv-state", b"x-kv-wait-ms", b"x-kv-transfer-ms"}
_KV_STATES = {b"stored": "stored", b"timeout": "timeout", b"failed": "failed", b"none": "none"}
_HELD_EVENT = 1 << 20  # longest part of an unfinished event that waits for its end

_prompt_tokens = re.compile(rb'"(?:prompt|input)_tokens"\s*:\s*(\d{1,15})').search
_created_tokens = re.compile(rb'"cache_creation_input_tokens"\s*:\s*(\d{1,15})').search
_cached_tokens = re.compile(rb'"(?:cached_tokens|cache_read_input_tokens)"\s*:\s*(\d{1,15})').search
_PREFLIGHT = (
    b"access-control-allow-methods: GET, POST, PUT, DELETE, OPTIONS, HEAD\r\n"
    b"access-control-allow-headers: *, Authorization, Content-Type\r\naccess-control-max-age: 600\r\n"
)
_request_id_ok = re.compile(rb"[A-Za-z0-9_.:/@+=,~#|-]{1,256}").fullmatch


def error_body(status: int, message: str, kind: str, stage: str, request_id: str) -> bytes:
    """Error in the shape of the OpenAI API, with the stage and the request id added."""
    error = {
        "message": f"{message} (stage: {stage}, request id: {request_id})",
        "type": kind,
        "param": None,
        "code": status,
        "stage": stage,
        "request_id": request_id,
    }
    return json.dumps({"error": error}).encode()


_ERROR_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    408: "RequestTimeoutError",
    413: "RequestTooLargeError",
    415: "UnsupportedMediaTypeError",
    500: "InternalServerError",
    502: "BadGatewayError",
    503: "ServiceUnavailableError",
    504: "GatewayTimeoutError",
}


class ProxyError(Exception):
    """A request ends with this error, made by the proxy."""

    def __init__(self, status: int, message: str, stage: str, outcome: str) -> None:
        super().__init__(message)
        self.status = status
        self.stage = stage
        self.outcome = outcome


class Job:
    """What is known about one request; the source of its access log line and metrics."""

    __slots__ = (
        "cached_tokens",
        "cors",
        "decode_s",
        "decoder",
        "event_stream",
        "kv_state",
        "kv_transfer_ms",
        "kv_wait_ms",
        "method",
        "outcome",
        "path",
        "prefill_outcome",
        "prefill_s",
        "prefiller",
        "prompt_tokens",
        "request_id",
        "route",
        "sent",
        "stage",
        "start",
        "status",
        "ttft_s",
    )

    def __init__(self, method: str, path: str, route: str, request_id: str) -> None:
        self.method = method
        self.path = path
        self.route = route
        self.request_id = request_id
        self.start = time.perf_counter()
        self.stage = "proxy"
        self.status = 0
        self.outcome = "ok"
        self.prefill_outcome = ""
        self.prefill_s = self.decode_s = self.ttft_s = -1.0
        self.kv_state = ""
        self.kv_wait_ms = self.kv_transfer_ms = -1.0
        self.prompt_tokens = self.cached_tokens = -1
        self.prefiller = self.decoder = ""
        self.sent = 0
        self.event_stream = False
        self.cors = b""


class StreamRelay:
    """Passes an answer on to the client while it comes."""

    __slots__ = (
        "_chunked",
        "_client",
        "_connection",
        "_core",
        "_event_stream",
        "_held",
        "_itl",
        "_job",
        "_last",
        "_tail",
        "_want_usage",
        "_write",
        "done",
        "usage",
    )

    def __init__(
        self, core: Proxy, job: Job, client: ClientRequest, response: Response, chunked: bool, want_usage: bool
    ) -> None:
        self._core = core
        self._job = job
        self._client = client
        self._connection: Connection = response.connection
        self._chunked = chunked
        self._event_stream = response.event_stream
        self._want_usage = want_usage
        self._write = client.transport.write
        self._held = b""
        self._last = 0.0
        self._tail = b""
        self._itl = core.itl_index
        self.usage = b""
        self.done: asyncio.Future[UpstreamError | None] = core.loop.create_future()

    def pause(self, paused: bool) -> None:
        """The client stopped (True) or began (False) to read."""
        if paused:
            self._connection.pause()
        else:
            self._connection.resume()

    def raw(self, data: bytes) -> bool:
        """Whole chunks, framing included."""
        if self._event_stream:
            if self._held or data[-4:] != b"\n\n\r\n":
                return False
            self._count(data)
        try:  # noqa: SIM105 (this is the path of every token)
            self._write(data)
        except RuntimeError:
            pass  # the connection has ended, which it will tell next
        self._job.sent += len(data)
        return True

    def payload(self, data: bytes) -> None:
        """Body bytes. An unfinished event is held until its end has come, so that none is ever cut."""
        if self._event_stream:
            self._count(data)
            if self._held:
                data = self._held + data
                self._held = b""
            if data[-2:] != b"\n\n" and data[-4:] != b"\r\n\r\n":
                cut = max(data.rfind(b"\n\n") + 2, data.rfind(b"\r\n\r\n") + 4)
                if cut < 4:
                    cut = 0
                if len(data) - cut <= _HELD_EVENT:
                    data, self._held = data[:cut], data[cut:]
        if data:
            self._client.send(data)
            self._job.sent += len(data)

    def _count(self, data: bytes) -> None:
        self._tail = data
        now = time.perf_counter()
        if self._last:
            self._core.metrics.observe(self._itl, now - self._last)
        else:
            self._job.ttft_s = now - self._job.start
        self._last = now
        if self._want_usage and b'"usage"' in data:
            self.usage = data

    def end(self) -> None:
        """The answer is complete."""
        if self._held:
            self._client.send(self._held)
        self._client.end()
        if not self.done.done():
            self.done.set_result(None)

    def lost(self, error: UpstreamError) -> None:
        """The answer was cut."""
        if self._event_stream and not self._held and self._tail.rstrip(b"\r\n").endswith(b"data: [DONE]"):
            self.end()  # only the end of the body's framing is missing
        elif not self.done.done():
            self.done.set_result(error)


class Proxy:
    """State of one worker process."""

    def __init__(self, settings: Settings, metrics: Metrics, access_log: AccessLog | None) -> None:
        self.settings = settings
        self.metrics = metrics
        self.loop = asyncio.get_running_loop()
        self._access_log = access_log
        prefillers, decoders = settings.prefiller_urls, settings.decoder_urls
        self._stamp = (0, 0)
        if settings.upstreams_file:
            self._stamp = file_stamp(settings.upstreams_file)
            prefillers, decoders = read_members(settings.upstreams_file)
        self.prefill = Pool(PREFILL, prefillers, settings, metrics)
        self.decode = Pool(DECODE, decoders, settings, metrics)
        self._key = b"Bearer " + settings.api_key.encode() if settings.api_key else b""
        self._ids = itertools.count(1)
        self._id_prefix = uuid.uuid4().hex[:20].encode()
        self._kv_degraded: set[str] = set()
        self._cors = {origin.encode() for origin in settings.cors_origin}
        self._prefill_down = False
        self.itl_index = metrics.index("disagg_itl_seconds")
        self._prefill_index = metrics.index("disagg_prefill_seconds")
        self._kv_wait_index = metrics.index("disagg_kv_wait_seconds")
        self._ttft_index = metrics.index("disagg_ttft_seconds")
        self._e2e_index = metrics.index("disagg_e2e_seconds")
        self._in_prefill = metrics.index("disagg_in_flight", "prefill")
        self._in_decode = metrics.index("disagg_in_flight", "decode")
        # Series that every request counts in, found without a call.
        self._usage_indexes = tuple(
            metrics.index(f"disagg_{name}")
            for name in ("usage_reports", "prompt_tokens", "reused_tokens", "full_reuse_requests")
        )
        self._outcome_indexes: dict[tuple[str, str, str], int] = {}
        self._kv_indexes = {
            state: metrics.index("disagg_kv_state", state) for state in (*_KV_STATES.values(), "unknown")
        }
        metrics.set("disagg_kv_degraded", to=0.0)
        self._tasks: list[asyncio.Task[Any]] = []
        self._finished = self._last_finished = self._freed_at = 0  # counts of requests
        self._malloc_trim = None
        with contextlib.suppress(OSError, AttributeError):  # glibc only
            self._malloc_trim = ctypes.CDLL(None).malloc_trim

    def start(self) -> None:
        """Begin the background work."""
        for work in (self.prefill.watch(), self.decode.watch(), self._tick()):
            self._tasks.append(self.loop.create_task(work))

    async def stop(self) -> None:
        """End the background work and close all idle connections."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.prefill.close()
        self.decode.close()

    async def _tick(self) -> None:
        s = self.settings
        limits = [t for t in (s.prefill_timeout_s, s.decode_timeout_s, s.stream_idle_timeout_s) if t]
        seconds = min([1.0, *(limit / 4 for limit in limits)])
        last = self.loop.time()
        while True:
            await asyncio.sleep(seconds)
            now = self.loop.time()
            # A stopped or starved proxy must not blame the servers for its own pause.
            passed, last = min(now - last, 2 * seconds), now
            self.prefill.sweep(passed)
            self.decode.sweep(passed)
            if s.upstreams_file:
                self._read_upstreams_again()
            self._free_memory_at_rest()

    def _free_memory_at_rest(self) -> None:
        """Give memory back to the system once the last request has ended; while there are some, they would pay."""
        values = self.metrics.values
        at_rest = self._finished == self._last_finished and not values[self._in_prefill] + values[self._in_decode]
        self._last_finished = self._finished
        if at_rest and self._finished != self._freed_at:
            self._freed_at = self._finished
            gc.collect()
            if self._malloc_trim is not None:
                self._malloc_trim(0)

    def _read_upstreams_again(self) -> None:
        path = self.settings.upstreams_file
        stamp = file_stamp(path)
        if stamp in (self._stamp, (0, 0)):
            return
        self._stamp = stamp
        try:
            prefillers, decoders = read_members(path)
        except SettingsError as error:
            log.error("%s; the servers in use stay the same", error)
            return
        self.prefill.set_members(prefillers)
        self.decode.set_members(decoders)
        log.info("servers now: prefill %s; decode %s", ", ".join(prefillers), ", ".join(decoders))

    # -- one request

    async def handle(
        self, client: ClientRequest, method: str, path: str, target: bytes, headers: Iterable[Header]
    ) -> None:
        """Serve one request from its first header to its log line."""
        settings = self.settings
        generating = path in _GENERATING and method == "POST"
        given_id = length = content_type = authorization = connection_header = origin = b""
        lines = []
        for name, value, line in headers:
            if name in _NOT_SENT_ON:
                if name == b"x-request-id":
                    given_id = value
                elif name == b"content-length":
                    length = value
                elif name == b"connection":
                    connection_header = value.lower()
                continue
            if name == b"content-type":
                content_type = value
            elif name == b"authorization":
                authorization = value
            elif name == b"origin":
                origin = value
            lines.append(line)
        if connection_header and connection_header not in (b"keep-alive", b"close"):
            named = {token.strip() for token in connection_header.split(b",")}
            lines = [line for line in lines if line.partition(b":")[0].lower() not in named]
        request_id = given_id if given_id and _request_id_ok(given_id) else self._new_id()
        lines.append(b"x-request-id: %b\r\n" % request_id)
        job = Job(method, path, path if generating else "other", request_id.decode())
        try:
            if self._cors and origin:
                job.cors = self._cors_lines(origin)
                if method == "OPTIONS" and job.cors:
                    job.status = 204
                    client.answer(204, [job.cors, _PREFLIGHT, self._own_lines(job)], b"")
                    return
            if self._key and method != "OPTIONS" and not hmac.compare_digest(_normal_bearer(authorization), self._key):
                raise ProxyError(401, "the API key is missing or wrong", "proxy", "unauthorized")
            if client.gone:
                raise asyncio.CancelledError
            limit = settings.max_body_bytes
            if length and int(length) > limit:
                raise BodyTooLong
            body = await client.body(limit, settings.client_timeout_s)
            if client.gone:  # a cancellation is forgotten by wait_for() when it comes together with the body
                raise asyncio.CancelledError
            common = b"".join(lines)
            if generating:
                await self._generate(client, job, target, common, content_type, body)
            else:
                await self._decode(client, job, method.encode(), target, common, body, want_usage=False)
        except ProxyError as error:
            self._answer_error(client, job, error)
        except BodyTooLong:
            message = f"the request body is longer than {settings.max_body_bytes} bytes"
            self._answer_error(client, job, ProxyError(413, message, "proxy", "bad_request"))
        except BodyTooSlow:
            message = f"no more of the request body within {settings.client_timeout_s:g} s"
            self._answer_error(client, job, ProxyError(408, message, "proxy", "client_stalled"))
        except asyncio.CancelledError:
            if client.gone:
                job.outcome = "client_gone"
            else:  # the drain deadline has passed
                error = ProxyError(503, "the proxy is shutting down", job.stage, "shutdown")
                self._answer_error(client, job, error)
        except Exception:
            log.exception("request %s failed inside the proxy", job.request_id)
            self._answer_error(client, job, ProxyError(500, "internal error", job.stage, "internal_error"))
        finally:
            self._account(job)

    def _new_id(self) -> bytes:
        return b"%b%012x" % (self._id_prefix, next(self._ids))

    async def _generate(
        self, client: ClientRequest, job: Job, target: bytes, common: bytes, content_type: bytes, body: bytes
    ) -> None:
        if content_type != b"application/json" and content_type.lower().split(b";")[0].strip() != b"application/json":
            raise ProxyError(415, "the content type must be application/json", "proxy", "bad_request")
        try:
            fields = proxy_bodies.parse_fields(body)
        except proxy_bodies.BadJSON as error:
            raise ProxyError(400, f"the request body is not valid JSON: {error}", "proxy", "bad_request") from None
        shaped = None if fields is None else proxy_bodies.prefill_body(job.path, fields)
        if shaped is None:
            self.metrics.add("disagg_prefill_skipped", "no_prompt" if fields is None else "stored_response")
        else:
            answer = await self._prefill(job, target, common, shaped, fields)
            if answer is not None:
                job.stage = "prefill"
                self._pass_on(client, job, answer, self._answer_lines(job, answer))
                return
        # The last event of these streams tells the usage; in the others it comes only if asked for.
        want_usage = job.path in ("/v1/messages", "/v1/responses") or (
            fields is not None and "stream_options" in fields
        )
        await self._decode(client, job, b"POST", target, common, body, want_usage)

    async def _prefill(
        self, job: Job, target: bytes, common: bytes, body: list[Any], fields: dict[str, Any]
    ) -> Response | None:
        """Fill the KV cache. Returns the answer if the server refused the request itself (4xx)."""
        job.stage = "prefill"
        pool = self.prefill
        values = self.metrics.values
        prefix = _prefix_of(fields) if len(pool.upstreams) > 1 else None
        tried: list[Upstream] = []
        reason = "no prefill server"
        size = len(body[0]) if len(body) == 1 else sum(map(len, body))
        begin = time.perf_counter()
        while True:
            upstream = pool.choose(prefix, tried)
            if upstream is None:
                break
            if upstream.open_until > self.loop.time() and not upstream.refusing:
                reason = f"{upstream.name} does not answer"
                tried.append(upstream)
                continue
            job.prefiller = upstream.authority
            head = b"POST %b HTTP/1.1\r\n%b%bcontent-length: %d\r\n\r\n" % (
                target, upstream.host_line, common, size,
            )  # fmt: skip
            request = head + body[0] if len(body) == 1 else (head, *body)
            upstream.in_flight += 1
            values[self._in_prefill] += 1.0
            try:
                response = await upstream.client.request(
                    request, head_timeout=self.settings.prefill_timeout_s, idle_timeout=self.settings.prefill_timeout_s
                )
            except UpstreamError as error:
                reason = f"{upstream.name}: {error}"
                job.prefill_outcome = error.kind
                pool.failed(upstream, str(error))
                tried.append(upstream)
                if error.kind == "timeout":
                    break
                continue
            finally:
                upstream.in_flight -= 1
                values[self._in_prefill] -= 1.0
            job.prefill_s = time.perf_counter() - begin
            self.metrics.observe(self._prefill_index, job.prefill_s)
            if not response.complete:
                response.connection.abort()
            status = response.status
            if status < 300:
                job.prefill_outcome = "ok"
                if upstream.failures:
                    pool.succeeded(upstream)
                self._note_kv(job, response, upstream)
                self._note_prefill(True, "")
                return None
            if 400 <= status < 500:
                job.prefill_outcome = "client_error"
                return None if proxy_bodies.refusal_may_be_wrong(fields) else response
            job.prefill_outcome = "server_error"
            reason = f"{upstream.name} answers {status}"
            pool.failed(upstream, reason)
            tried.append(upstream)
        self._note_prefill(False, reason)
        job.kv_state = "none"
        if not job.prefill_outcome:
            job.prefill_outcome = "unavailable"
        if self.settings.prefill_failure == "fail":
            status = 504 if job.prefill_outcome == "timeout" else 503
            raise ProxyError(status, f"prefill failed: {reason}", "prefill", job.prefill_outcome)
        self.metrics.add("disagg_prefill_skipped", job.prefill_outcome)
        return None

    def _note_prefill(self, works: bool, reason: str) -> None:
        if works == self._prefill_down:
            self._prefill_down = not works
            if works:
                log.info("prefill works again")
            else:
                log.warning("prefill failed, decoding without it: %s", reason)

    def _note_kv(self, job: Job, response: Response, upstream: Upstream) -> None:
        state, wait, reason = "unknown", None, ""
        for name, value, _ in response.headers:
            if name == b"x-kv-state":
                state = _KV_STATES.get(value, "unknown")
            elif name == b"x-kv-reason":
                reason = ": " + value.decode("latin-1")
            elif name == b"x-kv-wait-ms":
                with contextlib.suppress(ValueError):
                    wait = float(value)
            elif name == b"x-kv-transfer-ms":
                with contextlib.suppress(ValueError):
                    job.kv_transfer_ms = float(value)
        job.kv_state = state
        self.metrics.values[self._kv_indexes[state]] += 1.0
        if wait is not None:
            job.kv_wait_ms = wait
            self.metrics.observe(self._kv_wait_index, wait / 1000)
        degraded = state in ("timeout", "failed")
        if state == "none" or degraded == (upstream.name in self._kv_degraded):
            return
        if degraded:
            self._kv_degraded.add(upstream.name)
            log.warning(
                "KV caches of %s do not reach the store, decoders compute again: %s%s", upstream.name, state, reason
            )
        else:
            self._kv_degraded.discard(upstream.name)
            log.info("KV caches of %s reach the store again", upstream.name)
        self.metrics.set("disagg_kv_degraded", to=float(bool(self._kv_degraded)))

    async def _decode(
        self,
        client: ClientRequest,
        job: Job,
        method: bytes,
        target: bytes,
        common: bytes,
        body: bytes,
        want_usage: bool,
    ) -> None:
        job.stage = "decode"
        pool = self.decode
        values = self.metrics.values
        tried: list[Upstream] = []
        length = b"content-length: %d\r\n" % len(body) if body or method not in (b"GET", b"HEAD") else b""
        begin = time.perf_counter()
        failure: UpstreamError | None = None
        while True:
            upstream = pool.choose(None, tried)
            if upstream is None:
                raise self._decode_failed(failure)
            job.decoder = upstream.authority
            head = b"%b %b HTTP/1.1\r\n%b%b%b\r\n" % (method, target, upstream.host_line, common, length)
            request = head + body if len(body) < 65536 else (head, body)
            upstream.in_flight += 1
            values[self._in_decode] += 1.0
            try:
                response = await upstream.client.request(
                    request, no_body=method == b"HEAD", head_timeout=self.settings.decode_timeout_s,
                    idle_timeout=self.settings.stream_idle_timeout_s,
                )  # fmt: skip
                if upstream.failures:
                    pool.succeeded(upstream)
                job.decode_s = time.perf_counter() - begin
                if response.status == 404 and job.path.startswith("/v1/responses") and len(pool.upstreams) > 1:
                    # A stored response is known to the decode server that made it, and to no other.
                    tried.append(upstream)
                    if pool.choose(None, tried) is not None:
                        if not response.complete:
                            response.connection.abort()
                        continue
                if response.complete and not response.event_stream:
                    self._pass_on(client, job, response, self._answer_lines(job, response), usage=True)
                else:
                    await self._stream(client, job, response, want_usage)
                return
            except UpstreamError as error:
                # Nothing has been sent to the client yet.
                failure = error
                pool.failed(upstream, str(error))
                tried.append(upstream)
                if error.kind in ("timeout", "protocol"):
                    raise self._decode_failed(error) from None
                self.metrics.add("disagg_retries", DECODE)
            finally:
                upstream.in_flight -= 1
                values[self._in_decode] -= 1.0

    def _decode_failed(self, error: UpstreamError | None) -> ProxyError:
        if error is None:
            return ProxyError(503, "there is no decode server", "decode", "refused")
        status = {"timeout": 504, "protocol": 502}.get(error.kind, 503)
        return ProxyError(status, f"the decode server failed: {error}", "decode", error.kind)

    async def _stream(self, client: ClientRequest, job: Job, response: Response, want_usage: bool) -> None:
        job.status = response.status
        connection = response.connection
        try:
            job.event_stream = response.event_stream
            chunked = client.begin(response.status, self._answer_lines(job, response), response.length)
            relay = StreamRelay(self, job, client, response, chunked, want_usage)
            if response.complete:
                relay.payload(response.body)
                relay.end()
            else:
                connection.stream_to(relay, chunked)
                client.on_pause(relay.pause)
            error = await relay.done
        except BaseException:
            if not response.complete:
                connection.abort()
            raise
        if relay.usage:
            self._note_usage(job, relay.usage)
        if error is not None and error.kind == "client_stalled":
            raise ProxyError(504, str(error), "proxy", error.kind)
        if error is not None:
            self.decode.failed(self._upstream_of(connection), str(error))
            status = 504 if error.kind == "timeout" else 503
            raise ProxyError(status, f"the decode server failed: {error}", "decode", error.kind)

    def _upstream_of(self, connection: Connection) -> Upstream:
        address = connection.client.address
        for upstream in self.decode.upstreams:
            if upstream.client.address == address:
                return upstream
        return Upstream(DECODE, connection.client)

    # -- answers

    def _answer_lines(self, job: Job, response: Response) -> list[bytes]:
        lines = []
        connection_header = b""
        for name, value, line in response.headers:
            if name not in _NOT_SENT_BACK:
                lines.append(line)
            elif name == b"connection":
                connection_header = value.lower()
        if connection_header and connection_header not in (b"keep-alive", b"close"):
            named = {token.strip() for token in connection_header.split(b",")}
            lines = [line for line in lines if line.partition(b":")[0].lower() not in named]
        if job.cors:
            lines = [line for line in lines if not line.lower().startswith(b"access-control-")]
            lines.append(job.cors)
        lines.append(self._own_lines(job))
        return lines

    def _cors_lines(self, origin: bytes) -> bytes:
        if b"*" in self._cors:
            return b"access-control-allow-origin: *\r\naccess-control-expose-headers: *\r\n"
        if origin not in self._cors:
            return b""
        return (
            b"access-control-allow-origin: %b\r\nvary: Origin\r\n"
            b"access-control-allow-credentials: true\r\naccess-control-expose-headers: x-request-id\r\n" % origin
        )

    def _own_lines(self, job: Job) -> bytes:
        text = f"x-request-id: {job.request_id}\r\n"
        if job.kv_state:
            text += f"x-kv-state: {job.kv_state}\r\n"
            if job.kv_wait_ms >= 0:
                text += f"x-kv-wait-ms: {job.kv_wait_ms:.1f}\r\n"
            if job.kv_transfer_ms >= 0:
                text += f"x-kv-transfer-ms: {job.kv_transfer_ms:.1f}\r\n"
        return text.encode()

    def _pass_on(
        self, client: ClientRequest, job: Job, response: Response, lines: list[bytes], usage: bool = False
    ) -> None:
        job.status = response.status
        body = response.body
        job.sent = len(body)
        if response.status >= 400:
            job.outcome = "client_error" if response.status < 500 else "server_error"
        elif usage and job.route != "other":
            start = body.rfind(b'"usage"')
            if start >= 0:
                self._note_usage(job, body[start : start + 1024])
                if job.prompt_tokens >= 0:
                    text = f"x-prompt-tokens: {job.prompt_tokens}\r\nx-reused-tokens: {max(job.cached_tokens, 0)}\r\n"
                    lines.append(text.encode())
        client.answer(response.status, lines, body, response.length if not body else None)

    def _note_usage(self, job: Job, text: bytes) -> None:
        found = _prompt_tokens(text, max(text.rfind(b'"usage"'), 0))
        if found is None:
            return
        start, prompt = found.start(), int(found[1])
        found = _cached_tokens(text, start)
        reused = job.cached_tokens = int(found[1]) if found else 0
        if job.path == "/v1/messages":  # there input_tokens leaves out what came from a cache or went into one
            found = _created_tokens(text, start)
            prompt += reused + (int(found[1]) if found else 0)
        job.prompt_tokens = prompt
        values = self.metrics.values
        reports, prompts, reuses, full = self._usage_indexes
        values[reports] += 1.0
        values[prompts] += prompt
        values[reuses] += reused
        if reused >= prompt - 1:
            values[full] += 1.0

    def _answer_error(self, client: ClientRequest, job: Job, error: ProxyError) -> None:
        job.outcome = error.outcome
        job.stage = error.stage
        body = error_body(error.status, str(error), _ERROR_TYPES[error.status], error.stage, job.request_id)
        if client.started:
            last_words = b"data: " + body + b"\n\n" if job.event_stream else b""
            client.cut(last_words, at_once=error.outcome == "client_stalled")
            return
        job.status = error.status
        lines = [b"content-type: application/json\r\n", self._own_lines(job)]
        if job.cors:
            lines.append(job.cors)
        if error.status == 401:
            lines.append(b"www-authenticate: Bearer\r\n")
        client.close_if_unread()
        client.answer(error.status, lines, body)

    def _account(self, job: Job) -> None:
        self._finished += 1
        total = time.perf_counter() - job.start
        metrics = self.metrics
        metrics.observe(self._e2e_index, total)
        if job.ttft_s >= 0:
            metrics.observe(self._ttft_index, job.ttft_s)
            metrics.add("disagg_streamed_bytes", by=float(job.sent))
        if job.prefill_outcome:
            self._count_outcome((job.route, "prefill", job.prefill_outcome))
        self._count_outcome((job.route, job.stage, job.outcome))
        if self._access_log is not None:
            self._access_log.write(job, total)

    def _count_outcome(self, key: tuple[str, str, str]) -> None:
        index = self._outcome_indexes.get(key)
        if index is None:
            index = self._outcome_indexes[key] = self.metrics.index("disagg_requests", *key)
        self.metrics.values[index] += 1.0


def _normal_bearer(value: bytes) -> bytes:
    """Authorization value with the scheme in the usual case, which is not part of the secret."""
    return b"Bearer " + value[7:].strip() if value[:7].lower() == b"bearer " else value


def _prefix_of(fields: dict[str, Any]) -> bytes | None:
    for name in ("prompt", "messages", "input"):
        if name in fields:
            return bytes(memoryview(fields[name])[:16384])
    return None


class ProxyApp(FastAPI):
    """FastAPI application whose proxied routes bypass the framework: it would cost more than the proxy itself."""

    proxy: Proxy

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"] not in OWN_PATHS:
            method = scope["method"]
            client = ClientRequest.of_asgi(receive, method == "HEAD")
            target = scope["raw_path"] + (b"?" + scope["query_string"] if scope["query_string"] else b"")
            headers = [(name, value, b"%b: %b\r\n" % (name, value)) for name, value in scope["headers"]]
            await self.proxy.handle(client, method, scope["path"], target, headers)
        else:
            await super().__call__(scope, receive, send)


def create_app(settings: Settings, metrics: Metrics | None = None, access_log: AccessLog | None = None) -> ProxyApp:
    """The application; serve it with uvicorn and ``http=ClientProtocol``."""
    metrics = metrics or Metrics()

    @contextlib.asynccontextmanager
    async def lifespan(app: ProxyApp) -> AsyncIterator[None]:
        app.proxy = Proxy(settings, metrics, access_log)
        app.proxy.start()
        ClientProtocol.own_paths = OWN_PATHS
        ClientProtocol.plain_requests = {
            b"POST %b HTTP/1.1" % path.encode(): (path, path.encode()) for path in _GENERATING
        }
        ClientProtocol.longest_plain = settings.max_body_bytes
        ClientProtocol.handler = staticmethod(app.proxy.handle)
        yield
        await app.proxy.stop()

    # The schema and its pages are the decode server's: clients talk to its routes.
    app = ProxyApp(title="Disaggregated prefill proxy", lifespan=lifespan, openapi_url=None, docs_url=None)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> JSONResponse:
        found: dict[str, dict[str, bool]] = {}
        for pool in (app.proxy.prefill, app.proxy.decode):
            members = pool.upstreams
            results = await asyncio.gather(*(pool.check(member) for member in members))
            found[pool.role] = {member.name: up for member, up in zip(members, results, strict=True)}
        good = all(any(servers.values()) for servers in found.values())
        return JSONResponse({"ready": good, "servers": found}, 200 if good else 503)

    @app.get("/metrics")
    async def show_metrics() -> FastAPIResponse:
        return FastAPIResponse(metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return app
