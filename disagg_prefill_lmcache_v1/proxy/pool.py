"""The prefill and decode servers: which one a request goes to, and which ones are healthy."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Sequence

from disagg_prefill_lmcache_v1.proxy.affinity import PrefixTable, Prompt
from disagg_prefill_lmcache_v1.proxy.health import Upstream
from disagg_prefill_lmcache_v1.proxy.metrics import Metrics
from disagg_prefill_lmcache_v1.proxy.settings import Settings, parse_url
from disagg_prefill_lmcache_v1.proxy.upstream import Client

log = logging.getLogger("disagg_proxy")

PREFILL, DECODE = "prefill", "decode"

_WATCH_S = 0.25  # longest time between two looks at which checks are due
_GAUGES = ("disagg_upstream_up", "disagg_upstream_in_flight", "disagg_upstream_idle_connections")


class Pool:
    """All servers of one role. Belongs to one event loop."""

    def __init__(self, role: str, urls: Sequence[str], settings: Settings, metrics: Metrics) -> None:
        self.role = role
        self._settings = settings
        self._metrics = metrics
        self._loop = asyncio.get_running_loop()
        self._time = self._loop.time
        self.upstreams: list[Upstream] = []
        self._retired: list[Upstream] = []
        self._turn = 0
        self._affinity = settings.prefix_affinity == "on"
        self._prefixes: PrefixTable[Upstream] = PrefixTable()
        self.set_members(urls)

    def set_members(self, urls: Sequence[str]) -> None:
        """Use exactly these servers from now on; running requests on others end in peace."""
        settings = self._settings
        known = {upstream.name: upstream for upstream in self.upstreams}
        members = []
        for url in dict.fromkeys(parse_url(url, f"{self.role} server").url for url in urls):
            upstream = known.pop(url, None)
            if upstream is None:
                client = Client(
                    parse_url(url, f"{self.role} server"),
                    connect_timeout_s=settings.connect_timeout_s,
                    idle_connection_s=settings.idle_connection_s,
                    max_head_bytes=settings.max_head_bytes,
                )
                upstream = Upstream(self.role, client)
            members.append(upstream)
        for gone in known.values():
            gone.client.close()
            self._retired.append(gone)
        self._metrics.remove([(gauge, self.role, name) for name in known for gauge in _GAUGES])
        self.upstreams = members
        self._prefixes.clear()

    def choose(self, prompt: Prompt | None = None, excluded: Collection[Upstream] = ()) -> Upstream | None:
        """Server for a new request, or None if none is left. A ``prompt`` is going to be computed there."""
        upstreams = self.upstreams
        if len(upstreams) == 1:
            only = upstreams[0]
            return None if only in excluded else only
        chosen, known = self.likely(prompt, excluded)
        self._turn += 1
        if prompt is not None and chosen is not None:
            prompt.known = known
            if self._affinity:
                self._prefixes.note(prompt, chosen)
        return chosen

    def likely(self, prompt: Prompt | None, excluded: Collection[Upstream] = ()) -> tuple[Upstream | None, int]:
        """The server that ``choose`` would take, and how many tokens of the prompt are thought to be known there.

        Healthy servers go first. Among them the one with the fewest tokens to compute (affinity.py); without a prompt,
        or where no decode server knows it, the one with the least to do, and equals take turns.
        """
        candidates = [u for u in self.upstreams if u not in excluded]
        if len(candidates) == 1:
            return candidates[0], 0
        now = self._time()
        candidates = [u for u in candidates if u.up and u.open_until <= now] or candidates
        if not candidates:
            return None, 0
        if prompt is not None and self._affinity:
            chosen, known = self._prefixes.find(prompt, candidates)
            if known or self.role == PREFILL:
                return chosen, known
        count, first = len(candidates), self._turn + 1
        return min((candidates[(first + step) % count] for step in range(count)), key=lambda each: each.work), 0

    # -- health

    async def health(self) -> dict[str, bool]:
        """Whether each server is healthy, by its URL, as far as is known; waits for the first checks."""
        deadline = self._time() + self._settings.health_timeout_s
        while not all(u.checked for u in self.upstreams) and self._time() < deadline:
            await asyncio.sleep(_WATCH_S / 10)
        return {u.name: u.healthy for u in self.upstreams}

    async def watch(self) -> None:
        """Check all servers for ever."""
        due: dict[Upstream, float] = {}
        running: dict[Upstream, asyncio.Task[None]] = {}
        try:
            while True:
                try:
                    self._check_due(due, running)
                    self._publish()
                except Exception:
                    log.exception("watching the %s servers failed; it goes on", self.role)
                await asyncio.sleep(min(self._settings.health_interval_s / 2, _WATCH_S))
        finally:
            for task in running.values():
                task.cancel()

    def _check_due(self, due: dict[Upstream, float], running: dict[Upstream, asyncio.Task[None]]) -> None:
        now, interval = self._time(), self._settings.health_interval_s
        for upstream in self.upstreams:
            task = running.get(upstream)
            if task is not None and not task.done():
                continue
            if upstream.suspect or now >= due.get(upstream, 0.0):
                due[upstream] = now + (interval if upstream.up else min(interval, upstream.back_off_s()))
                running[upstream] = self._loop.create_task(upstream.check(self._settings.health_timeout_s))
        for gone in running.keys() - set(self.upstreams):
            running.pop(gone).cancel()
            due.pop(gone, None)

    def _publish(self) -> None:
        for upstream in self.upstreams:
            now = (upstream.up, upstream.in_flight, upstream.client.idle_connections)
            for gauge, value in zip(_GAUGES, now, strict=True):
                self._metrics.set(gauge, self.role, upstream.name, to=float(value))
        if self.role == PREFILL:
            self._metrics.set("disagg_kv_degraded", to=float(not all(u.shares_kv for u in self.upstreams)))

    def sweep(self, seconds: float) -> None:
        """Enforce the timeouts of all connections; called every ``seconds``."""
        for upstream in self.upstreams:
            upstream.client.sweep(seconds)
        for upstream in list(self._retired):
            upstream.client.sweep(seconds)
            if not upstream.client.active:
                self._retired.remove(upstream)

    def close(self) -> None:
        """Close all connections that are not in use."""
        for upstream in self.upstreams:
            upstream.client.close()
