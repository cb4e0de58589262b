"""Remembers the requests that servers have died of, so that sent again they do not end a whole fleet.

A server that dies at work gives no reason: the request may be innocent, others ran beside it. So one decode server may
still answer what a prefill server died of, and an answer clears a request. What is known of it afterwards:

- a prefill server died and none has answered since: no prefill for it, the decode server computes the prompt;
- two servers died: it is refused.

A lost connection counts as a death, and so does status 500 of a server that then refuses connections: vLLM's answer
when its engine has died.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict

from disagg_prefill_lmcache_v1.proxy.errors import ProxyError
from disagg_prefill_lmcache_v1.proxy.health import Death
from disagg_prefill_lmcache_v1.proxy.pool import DECODE, PREFILL
from disagg_prefill_lmcache_v1.proxy.request import RequestContext

_DEATHS = 2  # a request that so many servers have died of is refused
_MOST = 4096  # requests remembered


class Suspects:
    """The suspicious requests of one worker process, each known by its path and body for ``keep_s`` seconds."""

    def __init__(self, keep_s: float) -> None:
        self._keep_s = keep_s
        self._time = asyncio.get_running_loop().time
        self._known: OrderedDict[bytes, list[Death]] = OrderedDict()

    def roles(self, path: str, body: bytes) -> list[str]:
        """The roles of the servers that have died of this request. Raises ProxyError if it is refused."""
        self._forget()
        if not self._known:  # nearly always: nothing is hashed then
            return []
        deaths = self._known.get(_digest(path, body), ())
        roles = [death.role for death in deaths if death.is_sure()]
        if len(roles) >= _DEATHS:
            raise ProxyError(
                503, f"{len(roles)} servers failed while they worked on this very request; it is sent to no more "
                f"for {self._keep_s:g} s (--suspect-request-s): change it, or have the servers' logs looked at",
                "proxy", "suspect",
            )  # fmt: skip
        return roles

    def note(self, request: RequestContext, body: bytes, whole: bool) -> None:
        """Remember what a request that has ended did to servers; ``whole``: it has been answered."""
        deaths = request.deaths if self._keep_s else ()
        if not deaths and not self._known:
            return
        key = _digest(request.path, body)
        known = self._known.get(key, [])
        answered = []
        if request.prefill_outcome == "ok":
            answered.append(PREFILL)
        if whole and request.stage == DECODE and request.status < 500:
            answered.append(DECODE)
        known = [death for death in known if death.role not in answered]
        known += deaths
        if known:
            self._known[key] = known[-_DEATHS:]
            self._known.move_to_end(key)
            if len(self._known) > _MOST:
                self._known.popitem(last=False)
        else:
            self._known.pop(key, None)

    def _forget(self) -> None:
        """Leave out what is too old."""
        while self._known and next(iter(self._known.values()))[-1].at + self._keep_s < self._time():
            self._known.popitem(last=False)


def _digest(path: str, body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=16, key=path.encode()[:64]).digest()
