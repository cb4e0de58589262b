"""Errors that the proxy itself answers with, in the shape of the OpenAI API."""

from __future__ import annotations

import json

_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    408: "RequestTimeoutError",
    413: "RequestTooLargeError",
    415: "UnsupportedMediaTypeError",
    429: "RateLimitError",
    431: "RequestTooLargeError",
    500: "InternalServerError",
    502: "BadGatewayError",
    503: "ServiceUnavailableError",
    504: "GatewayTimeoutError",
}


class ProxyError(Exception):
    """A request ends with this error, made by the proxy.

    ``stage`` is proxy, prefill or decode; ``outcome`` is what the metrics call it; ``detail`` is for the log alone: it
    may name servers, which the message must not.
    """

    def __init__(self, status: int, message: str, stage: str, outcome: str, detail: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.stage = stage
        self.outcome = outcome
        self.detail = detail


def too_long(limit: int) -> ProxyError:
    """The error for a body of more than ``limit`` bytes."""
    return ProxyError(413, f"the request body is longer than {limit} bytes", "proxy", "bad_request")


def error_body(status: int, message: str, stage: str, request_id: str) -> bytes:
    """JSON of an error, with the stage and the request id added."""
    error = {
        "message": f"{message} (stage: {stage}, request id: {request_id})",
        "type": _TYPES[status],
        "param": None,
        "code": status,
        "stage": stage,
        "request_id": request_id,
    }
    return json.dumps({"error": error}).encode()
