"""A stand-in for an OpenTelemetry collector: takes OTLP/HTTP traces and keeps the spans. No part of OpenTelemetry's."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


class StandinCollector:
    """Listens on a port of its own; ``status`` is what it answers."""

    def __init__(self) -> None:
        self.spans: list[dict[str, Any]] = []
        self.status = 200
        self.asked = 0
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                collector.take(body)
                self.send_response(collector.status)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *arguments: Any) -> None:
                """Tests do not want its log."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1/traces"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def take(self, body: bytes) -> None:
        """The spans of a request's body, if they are taken at all."""
        self.asked += 1
        if self.status != 200:
            return
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            service = _attributes(resource.resource.attributes).get("service.name")
            for scope in resource.scope_spans:
                for span in scope.spans:
                    self.spans.append({
                        "service": service, "name": span.name, "trace": span.trace_id.hex(), "id": span.span_id.hex(),
                        "parent": span.parent_span_id.hex(), "kind": span.kind, "error": span.status.code == 2,
                        "begin": span.start_time_unix_nano, "end": span.end_time_unix_nano,
                        "attributes": _attributes(span.attributes),
                    })  # fmt: skip

    def of(self, request_id: str) -> dict[str, dict[str, Any]]:
        """Spans of the trace of a request by their names; none until the request's own has come."""
        spans = list(self.spans)
        roots = [each for each in spans if each["attributes"].get("disagg.request_id") == request_id]
        return {each["name"]: each for each in spans if roots and each["trace"] == roots[0]["trace"]}

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _attributes(found: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value") or "string_value") for each in found}
