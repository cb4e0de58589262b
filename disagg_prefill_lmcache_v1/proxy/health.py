"""One server as the proxy sees it: its connections, its load, and whether it is healthy.

What a server answers to a request depends on the request, and so does whether it answers at all: no client can have a
server taken for unhealthy. That is decided by connections that cannot be made and by the proxy's own health checks.
"""

from __future__ import annotations

import asyncio
import logging
from typing import NamedTuple

from disagg_prefill_lmcache_v1.proxy.routing import Load
from disagg_prefill_lmcache_v1.proxy.upstream import Client, UpstreamError

log = logging.getLogger("disagg_proxy")

_LAYOUT = b"x-kv-layout"
_DYING_S = 30.0  # how long a server may take from the answer 500 to its end

_REQUEST_TOKENS = {"prefill": 64, "decode": 512}  # that a request weighs beside its prompt; in decode, its answer

CIRCUIT_FAILURES = 3  # failed checks in a row that close a server to new requests
BACK_OFF_S = (0.5, 1.0, 2.0, 4.0, 8.0)


class Death(NamedTuple):
    """The end of a server of that role, as one of its requests saw it."""

    at: float
    """Loop time."""
    role: str
    server: Upstream | None
    """For an end that shows only later: who was to end. None: it is sure."""

    def is_sure(self) -> bool:
        """Whether the server has ended."""
        return self.server is None or self.at <= self.server.refused_at <= self.at + _DYING_S


class Upstream:
    """One server."""

    __slots__ = (
        "_time",
        "authority",
        "checked",
        "client",
        "failures",
        "healthy",
        "held",
        "host_line",
        "in_flight",
        "kv_degraded",
        "kv_layout",
        "kv_mismatch",
        "load",
        "name",
        "open_until",
        "refused_at",
        "refusing",
        "role",
        "sick",
        "suspect",
        "up",
    )

    def __init__(self, role: str, client: Client) -> None:
        self._time = asyncio.get_running_loop().time
        self.role = role
        self.client = client
        self.name = client.address.url
        self.authority = client.address.authority
        self.host_line = b"host: " + self.authority.encode() + b"\r\n"
        self.in_flight = 0
        self.load = Load()  # prompts that it computes or that wait there
        self.held = 0  # tokens of the prompts whose answers it makes
        self.kv_degraded = False  # its KV caches do not reach the store
        self.kv_layout = ""  # how its KV is stored, as it tells with its health
        self.kv_mismatch = ""  # why no decode server can load its KV
        self.up = True  # gets requests: nothing speaks against it
        self.healthy = False  # has passed a check or answered, and nothing has spoken against it since
        self.checked = False  # at least once
        self.suspect = False  # a request failed: check soon
        self.failures = 0
        self.open_until = 0.0
        self.refused_at = 0.0  # loop time when it began to refuse connections
        self.sick = False  # its /health says so, whatever it answers to requests
        self.refusing = False  # connections are refused, which costs no time: it may be tried all the same

    @property
    def work(self) -> float:
        """What it has to do and to hold, tokens; with one server of its role only the count of requests is known."""
        return self.load.tokens + self.held + _REQUEST_TOKENS[self.role] * self.in_flight

    def note_answer(self) -> None:
        """A request got an answer: a check that got none was wrong, or the server is back."""
        if self.failures and not self.sick:
            self._passed("it answers")

    def note_error(self, error: UpstreamError) -> None:
        """A request failed: no connection counts, all else is a reason to check."""
        if error.kind in ("refused", "unreachable"):
            self._failed(str(error), refused=error.kind == "refused", sick=self.sick)
        elif error.kind not in ("exhausted", "client_stalled"):
            self.suspect = True

    @property
    def shares_kv(self) -> bool:
        """Whether nothing speaks against its KV caches getting to decode servers."""
        return not (self.kv_degraded or self.kv_mismatch)

    def death(self, sure: bool) -> Death:
        """A request seems to have ended the server; not ``sure``: it has if connections are refused soon."""
        self.suspect = True
        return Death(self._time(), self.role, None if sure else self)

    async def check(self, timeout_s: float) -> None:
        """Ask the server for its /health, on a connection of its own, and note the result."""
        self.suspect = False
        request = b"GET /health HTTP/1.1\r\n" + self.host_line + b"connection: close\r\n\r\n"
        reason, refused, sick = "", False, False
        try:
            response = await asyncio.wait_for(self.client.request(request, fresh=True), timeout_s)
            if not response.complete:
                response.connection.abort()
            if response.status != 200:
                reason, sick = f"/health answers {response.status}", True
        except UpstreamError as error:
            if error.kind == "exhausted":
                return  # which says nothing of the server
            reason, refused = str(error), error.kind == "refused"
        except (TimeoutError, asyncio.TimeoutError):
            reason = f"no answer to /health within {timeout_s:g} s"
        self.checked = True
        if reason:
            self._failed(reason, refused, sick)
        else:
            self.kv_layout = (response.header(_LAYOUT) or b"").decode("latin-1")
            self._passed("it is healthy")

    def back_off_s(self) -> float:
        """How long it is left alone after its failures so far, seconds."""
        return BACK_OFF_S[min(max(self.failures - 1, 0), len(BACK_OFF_S) - 1)]

    def _passed(self, reason: str) -> None:
        self.failures = 0
        self.open_until = 0.0
        self.refusing = self.sick = False
        self.healthy = True
        self._set_up(True, reason)

    def _failed(self, reason: str, refused: bool, sick: bool) -> None:
        self.failures += 1
        if refused and not self.refusing:
            self.refused_at = self._time()
        self.refusing, self.sick = refused, sick
        if refused or self.failures >= CIRCUIT_FAILURES:
            self.open_until = self._time() + self.back_off_s()
            self.healthy = False
            self._set_up(False, reason)

    def _set_up(self, up: bool, reason: str) -> None:
        if self.up != up:
            self.up = up
            level = logging.INFO if up else logging.WARNING
            log.log(level, "%s server %s is %s: %s", self.role, self.name, "up" if up else "down", reason)
