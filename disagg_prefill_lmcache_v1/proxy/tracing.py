"""One trace of each request: a span of the proxy, and below it one for each server that it asks (OpenTelemetry).

Imported with ``--otlp-traces-endpoint`` alone. A client's ``traceparent`` is continued; each server gets one that names
the span of its stage, below which vLLM's own spans hang (its ``--otlp-traces-endpoint``). A thread sends them
in batches; what the collector does not take is dropped. OpenTelemetry's own variables hold (``OTEL_BSP_*``, …).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExportResult
from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from disagg_prefill_lmcache_v1.proxy.headers import Header
from disagg_prefill_lmcache_v1.proxy.request import RequestContext

log = logging.getLogger("disagg_proxy")

_SERVICE = "disagg-proxy"
_EXPORT_S = 2.0  # for a batch; so long, at most, a collector that is gone holds up the proxy's end
_LONGEST = 1024  # characters of an attribute that a client decides
_CONTEXT = (b"traceparent", b"tracestate")
_OPERATIONS = {"/v1/completions": "text_completion"}  # of generating routes; the others are chats
_extract = TraceContextTextMapPropagator().extract


class Tracing:
    """Makes the traces of one process. ``endpoint`` is the URL of an OTLP/HTTP collector, path included."""

    def __init__(self, endpoint: str) -> None:
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # it tells each batch that is lost
        self._exporter = _Exporter(endpoint)
        resource = Resource({SERVICE_NAME: _SERVICE}).merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter))
        self._tracer = self._provider.get_tracer(_SERVICE)

    def begin(self, request: RequestContext, headers: list[Header]) -> RequestTrace:
        """The trace of a request that came with these header fields; their context leaves ``request.headers``."""
        given = [(name.decode(), value.decode("latin-1")) for name, value, _ in headers if name in _CONTEXT]
        carrier = dict(given)
        if given:
            lines = request.headers.split(b"\r\n")
            request.headers = b"\r\n".join([line for line in lines if line.partition(b":")[0].lower() not in _CONTEXT])
            if len(carrier) < len(given):
                carrier = {}  # two parents are none
        return RequestTrace(self._tracer, request, _extract(carrier))

    def close(self) -> None:
        """Send what is left, if somebody takes it."""
        self._exporter.closing = True
        self._provider.shutdown()


class RequestTrace:
    """The spans of one request."""

    __slots__ = ("_context", "_epoch_ns", "_root", "_stage", "_tracer")

    def __init__(self, tracer: Tracer, request: RequestContext, parent: Any) -> None:
        self._tracer = tracer
        self._epoch_ns = time.time_ns() - time.perf_counter_ns()
        attributes = {
            "http.request.method": request.method, "url.path": request.path[:_LONGEST],
            "disagg.request_id": request.request_id,
        }  # fmt: skip
        name = request.method
        if request.route != "other":
            name += f" {request.route}"
            attributes["http.route"] = request.route
            attributes["gen_ai.operation.name"] = _OPERATIONS.get(request.route, "chat")
        self._root = tracer.start_span(
            name, context=parent, kind=SpanKind.SERVER, attributes=attributes, start_time=self._ns(request.start)
        )
        self._context = set_span_in_context(self._root)
        self._stage: tuple[str, Span] | None = None

    def _ns(self, at: float) -> int:
        return self._epoch_ns + int(at * 1e9)

    def model(self, field: Any) -> None:
        """The request's ``model``, as JSON."""
        text = bytes(memoryview(field)).strip(b'"')
        self._root.set_attribute("gen_ai.request.model", text[:_LONGEST].decode(errors="replace"))

    def asked(self, request: RequestContext, role: str, authority: str) -> bytes:
        """A server is asked from now on; header lines for it."""
        self._end_stage(request)
        host, _, port = authority.rpartition(":")
        attributes = {"http.request.method": request.method, "server.address": host.strip("[]")}
        span = self._tracer.start_span(
            role, context=self._context, kind=SpanKind.CLIENT, attributes=attributes | {"server.port": int(port)}
        )
        self._stage = role, span
        context = span.get_span_context()
        lines = f"traceparent: 00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}\r\n"
        if context.trace_state:
            lines += f"tracestate: {context.trace_state.to_header()}\r\n"
        return request.headers + lines.encode("latin-1")

    def _end_stage(self, request: RequestContext) -> None:
        if self._stage is None:
            return
        role, span = self._stage
        self._stage = None
        outcome, end = request.outcome, time.perf_counter()
        if role == "prefill":
            outcome, end = request.prefill_outcome or request.outcome, request.prefill_answered or end
            span.set_attribute("disagg.kv_state", request.kv_state)
        elif request.status:
            span.set_attribute("http.response.status_code", request.status)
        if outcome != "ok":
            _fail(span, outcome)
        span.end(self._ns(end))

    def end(self, request: RequestContext) -> None:
        """The request has ended."""
        self._end_stage(request)
        root, status = self._root, request.status
        if root.is_recording():
            told = {
                "gen_ai.usage.input_tokens": request.prompt_tokens, "disagg.reused_tokens": request.reused_tokens,
                "gen_ai.latency.time_to_first_token": request.ttft_s,
                **{f"disagg.ttft.{part}": seconds for part, seconds in request.parts.items()},
            }  # fmt: skip
            root.set_attributes({name: value for name, value in told.items() if value >= 0})
            root.set_attribute("http.response.status_code", status)
            if request.way:
                root.set_attribute("disagg.route", request.way)
            if request.outcome != "ok" and not 400 <= status < 500:  # what a client did wrong is no error here
                _fail(root, request.outcome)
        root.end()


def _fail(span: Span, outcome: str) -> None:
    span.set_attribute("error.type", outcome)
    span.set_status(StatusCode.ERROR)


class _Exporter(OTLPSpanExporter):
    """Tells once that the collector is gone or back, and does not wait for one that is gone when the proxy ends."""

    closing = False
    _lost = False

    def __init__(self, endpoint: str) -> None:
        super().__init__(endpoint, timeout=_EXPORT_S)
        self._url = endpoint

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        if self.closing and self._lost:
            return SpanExportResult.FAILURE
        result = super().export(spans)
        lost = result is not SpanExportResult.SUCCESS
        if lost != self._lost:
            self._lost = lost
            log.warning("traces are lost: %s does not take them" if lost else "%s takes traces again", self._url)
        return result
