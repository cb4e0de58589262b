"""What is known about one request; the source of its access log line and metrics."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

from disagg_prefill_lmcache_v1.proxy.affinity import Prompt
from disagg_prefill_lmcache_v1.proxy.headers import Header
from disagg_prefill_lmcache_v1.proxy.health import Death


class Trace(Protocol):
    """Spans of a request (tracing.py)."""

    def model(self, field: Any) -> None:
        """The request's ``model``, as JSON."""

    def asked(self, request: RequestContext, role: str, authority: str) -> bytes:
        """A server is asked from now on; header lines for it."""

    def end(self, request: RequestContext) -> None:
        """The request has ended."""


class TraceMaker(Protocol):
    """Makes the traces of a process."""

    def begin(self, request: RequestContext, headers: list[Header]) -> Trace:
        """The trace of a request that came with these header fields; their context leaves ``request.headers``."""

    def close(self) -> None:
        """Send what is left."""


class RequestContext:
    """One request: what came, what is sent on, and how it went. Times are seconds, -1 means not known."""

    __slots__ = (
        "cached_tokens",
        "cors",
        "deaths",
        "decode_s",
        "decode_sent",
        "decode_told",
        "decoder",
        "error_detail",
        "event_stream",
        "expected_s",
        "hand_over",
        "headers",
        "kv_state",
        "kv_transfer_ms",
        "kv_wait_ms",
        "method",
        "on_first_token",
        "outcome",
        "parts",
        "path",
        "prefill_answered",
        "prefill_outcome",
        "prefill_s",
        "prefill_sent",
        "prefill_told",
        "prefiller",
        "prompt",
        "prompt_tokens",
        "request_id",
        "reused_tokens",
        "route",
        "sent",
        "stage",
        "start",
        "status",
        "target",
        "trace",
        "ttft_s",
        "want_usage",
        "way",
        "way_reason",
    )

    def __init__(
        self, method: str, path: str, target: bytes, route: str, request_id: str, headers: bytes, cors: bytes = b""
    ) -> None:
        self.method = method
        self.path = path
        self.target = target
        self.route = route  # the path if it is a generating one, else "other"
        self.request_id = request_id
        self.headers = headers  # header lines that are sent on to the servers
        self.cors = cors  # header lines that are added to the answer
        self.start = time.perf_counter()
        self.trace: Trace | None = None  # where traces are asked for
        self.stage = "proxy"
        self.status = 0
        self.outcome = "ok"
        self.error_detail = ""
        self.prefill_outcome = ""
        self.prefill_s = self.decode_s = self.ttft_s = -1.0
        self.kv_state = ""
        self.hand_over = b""  # kv_transfer_params of the prefill answer, JSON (hand_over.py)
        self.kv_wait_ms = self.kv_transfer_ms = -1.0
        self.prefill_sent = self.prefill_answered = self.decode_sent = 0.0  # on perf_counter; 0: not at all
        self.prefill_told: tuple[float, ...] = ()  # what the servers say of their time, see timing.py
        self.decode_told: tuple[float, ...] = ()
        self.parts: dict[str, float] = {}  # of ttft_s
        self.prompt_tokens = self.cached_tokens = self.reused_tokens = -1
        self.prefiller = self.decoder = ""
        self.deaths: tuple[Death, ...] = ()  # of servers that it may have ended (suspects.py)
        self.way = self.way_reason = ""  # pair or direct, where that was a choice (route_chooser.py)
        self.expected_s = -1.0  # to the first token, when it was chosen
        self.prompt: Prompt | None = None  # its size and beginning, where they are asked for
        self.on_first_token: Callable[[], None] | None = None
        self.sent = 0  # bytes of the answer's body
        self.event_stream = False
        self.want_usage = False  # whether the end of an event stream tells the usage
