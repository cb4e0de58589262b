"""How a request is answered: with a server's whole answer, or with an error of the proxy's own."""

from __future__ import annotations

from disagg_prefill_lmcache_v1.proxy.client_request import ClientRequest
from disagg_prefill_lmcache_v1.proxy.errors import ProxyError, error_body
from disagg_prefill_lmcache_v1.proxy.header_fields import answer_lines, own_lines
from disagg_prefill_lmcache_v1.proxy.request import RequestContext
from disagg_prefill_lmcache_v1.proxy.upstream import Response


def pass_on(client: ClientRequest, request: RequestContext, response: Response, more_lines: bytes = b"") -> None:
    """Answer with a server's whole answer, and ``more_lines`` of header."""
    request.status = response.status
    body = response.body
    request.sent = len(body)
    if response.status >= 400:
        request.outcome = "client_error" if response.status < 500 else "server_error"
    lines = answer_lines(request, response.headers)
    if more_lines:
        lines.append(more_lines)
    client.answer(response.status, lines, body, response.length if not body else None)


def send_error(client: ClientRequest, request: RequestContext, error: ProxyError) -> None:
    """Answer with an error, as an event where a stream has begun."""
    request.outcome = error.outcome
    request.stage = error.stage
    if error.detail:
        request.error_detail = error.detail
    body = error_body(error.status, str(error), error.stage, request.request_id)
    if client.started:
        last_words = b"data: " + body + b"\n\n" if request.event_stream else b""
        client.cut(last_words, at_once=error.outcome == "client_stalled")
        return
    request.status = error.status
    lines = [b"content-type: application/json\r\n", own_lines(request)]
    if request.cors:
        lines.append(request.cors)
    if error.status == 401:
        lines.append(b"www-authenticate: Bearer\r\n")
    elif error.outcome == "overload":
        lines.append(b"retry-after: 1\r\n")
    client.answer(error.status, lines, body)
