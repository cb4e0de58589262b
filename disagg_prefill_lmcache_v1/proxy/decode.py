"""The decode stage: the client's own request goes to a decode server, whose answer goes back as it comes."""

from __future__ import annotations

import time

from disagg_prefill_lmcache_v1.proxy import hand_over, timing
from disagg_prefill_lmcache_v1.proxy.answers import pass_on
from disagg_prefill_lmcache_v1.proxy.client_request import ClientRequest
from disagg_prefill_lmcache_v1.proxy.errors import ProxyError
from disagg_prefill_lmcache_v1.proxy.header_fields import answer_lines
from disagg_prefill_lmcache_v1.proxy.health import Upstream
from disagg_prefill_lmcache_v1.proxy.metrics import Metrics
from disagg_prefill_lmcache_v1.proxy.pool import DECODE, Pool
from disagg_prefill_lmcache_v1.proxy.relay import StreamRelay
from disagg_prefill_lmcache_v1.proxy.request import RequestContext
from disagg_prefill_lmcache_v1.proxy.route_chooser import RouteChooser
from disagg_prefill_lmcache_v1.proxy.settings import Settings
from disagg_prefill_lmcache_v1.proxy.upstream import Limits, Response, UpstreamError
from disagg_prefill_lmcache_v1.proxy.usage import UsageMeter, told_reuse

_STATUS = {"timeout": 504, "protocol": 502}
# What a client is told; the log tells which server it was and what the system said.
_WORDS = {
    "refused": "it cannot be reached",
    "unreachable": "it cannot be reached",
    "timeout": "it did not answer in time",
    "lost": "the connection was lost",
    "protocol": "its answer is not valid HTTP",
}


class DecodeStage:
    """Sends requests to the servers of one pool and their answers to the clients."""

    def __init__(self, settings: Settings, pool: Pool, metrics: Metrics, chooser: RouteChooser | None = None) -> None:
        self._chooser = chooser
        self._limits = Limits(begin_s=settings.decode_timeout_s, silence_s=settings.stream_idle_timeout_s)
        self._pool = pool
        self._metrics = metrics
        self._usage = UsageMeter(metrics)
        self._itl = metrics.index("disagg_itl_seconds")
        self.in_flight = metrics.index("disagg_in_flight", "decode")

    async def run(self, client: ClientRequest, request: RequestContext, body: bytes) -> None:
        """Have the request answered by a decode server. Raises ProxyError."""
        request.stage = "decode"
        pool = self._pool
        values = self._metrics.values
        tried: list[Upstream] = []
        failure: UpstreamError | None = None
        attempts = 1 if request.route == "other" else 2
        held = 0 if request.prompt is None else request.prompt.tokens
        begin = time.perf_counter()
        # A request is sent again only if no server has taken any of it, or was refused by one: nothing was fetched.
        body = hand_over.with_params(body, request.hand_over) if request.hand_over else body
        while True:
            # A prompt that is computed here goes where its beginning is known; KV from a prefill server goes anywhere.
            upstream = pool.choose(None if request.prefill_outcome else request.prompt, tried)
            if upstream is None:
                raise _failed(failure)
            request.decoder = upstream.authority
            if self._chooser is not None:
                self._chooser.decoding(request, upstream)
            upstream.in_flight += 1
            upstream.held += held
            values[self.in_flight] += 1.0
            try:
                response = await self._ask(upstream, request, body)
                upstream.note_answer()
                if response.status == 500:
                    request.deaths += (upstream.death(sure=False),)
                request.decode_s = time.perf_counter() - begin
                request.reused_tokens = told_reuse(response.internal)
                if self._may_be_known_elsewhere(request, response, upstream, tried):
                    continue
                if response.complete and not response.event_stream:
                    self._answer(client, request, response)
                else:
                    await self._stream(client, request, response, upstream)
                return
            except UpstreamError as error:
                # Nothing has been sent to the client yet.
                upstream.note_error(error)
                if error.taken and error.kind == "lost":
                    request.deaths += (upstream.death(sure=True),)
                attempts -= 1
                if error.taken or not attempts or error.kind == "exhausted":
                    raise _failed(error) from None
                failure = error
                if error.kind != "lost":  # else an idle connection had been closed: the server is asked once more
                    tried.append(upstream)
                self._metrics.add("disagg_retries", DECODE)
            finally:
                upstream.in_flight -= 1
                upstream.held -= held
                values[self.in_flight] -= 1.0

    async def _ask(self, upstream: Upstream, request: RequestContext, body: bytes) -> Response:
        method = request.method
        trace = request.trace
        headers = request.headers if trace is None else trace.asked(request, "decode", upstream.authority)
        length = b"content-length: %d\r\n" % len(body) if body or method not in ("GET", "HEAD") else b""
        head = b"%b %b HTTP/1.1\r\n%b%b%b\r\n" % (
            method.encode(), request.target, upstream.host_line, headers, length,
        )  # fmt: skip
        request.decode_sent = time.perf_counter()
        return await upstream.client.request(
            head + body if len(body) < 65536 else (head, body), no_body=method == "HEAD",
            limits=self._limits,
        )  # fmt: skip

    def _may_be_known_elsewhere(
        self, request: RequestContext, response: Response, upstream: Upstream, tried: list[Upstream]
    ) -> bool:
        """Whether to ask the next server: a stored response is known to the one that made it, and to no other."""
        if response.status != 404 or len(self._pool.upstreams) == 1:
            return False
        if not request.path.startswith("/v1/responses") or request.prefill_outcome:  # a prompt that names none
            return False
        tried.append(upstream)
        if self._pool.choose(None, tried) is None:
            return False
        if not response.complete:
            response.connection.abort()
        return True

    def _answer(self, client: ClientRequest, request: RequestContext, response: Response) -> None:
        usage_lines = b""
        if response.status < 400 and request.route != "other":
            usage_lines = self._usage.note_answer(request, response.body)
        pass_on(client, request, response, usage_lines)

    async def _stream(
        self, client: ClientRequest, request: RequestContext, response: Response, upstream: Upstream
    ) -> None:
        request.status = response.status
        connection = response.connection
        try:
            request.event_stream = response.event_stream
            lines = answer_lines(request, response.headers)
            if request.route != "other" and response.event_stream:
                request.start = timing.arrived(client.transport, request.start)
                told = response.header(timing.HEADER)
                request.decode_told = timing.told_times(timing.told_by_decode(told)) if told else ()
                so_far = timing.ttft_parts(request, time.perf_counter() - request.start)
                lines.append(timing.server_timing(so_far))
            chunked = client.begin(response.status, lines, response.length)
            relay = StreamRelay(self._metrics, self._itl, request, client, response)
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
            self._usage.note(request, relay.usage)
        if error is None:
            return
        if error.kind == "client_stalled":
            raise ProxyError(504, str(error), "proxy", error.kind)
        upstream.note_error(error)
        if error.kind == "lost":
            request.deaths += (upstream.death(sure=True),)
        raise ProxyError(
            504 if error.kind == "timeout" else 503, f"the decode server failed: {_WORDS[error.kind]}", "decode",
            error.kind, str(error),
        )  # fmt: skip


def _failed(error: UpstreamError | None) -> ProxyError:
    if error is None:
        return ProxyError(503, "there is no decode server", "decode", "refused")
    if error.kind == "exhausted":
        return ProxyError(503, "the proxy has no connection left", "proxy", error.kind, str(error))
    message = f"the decode server failed: {_WORDS[error.kind]}"
    return ProxyError(_STATUS.get(error.kind, 503), message, "decode", error.kind, str(error))
