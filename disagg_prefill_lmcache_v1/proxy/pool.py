"""The prefill and decode servers: which one a request goes to, and which ones are healthy."""

from __future__ import annotations

import asyncio
import logging
import zlib
from collections import OrderedDict
from collections.abc import Collection, Sequence

from disagg_prefill_lmcache_v1.proxy.health import Upstream
from disagg_prefill_lmcache_v1.proxy.metrics import Metrics
from disagg_prefill_lmcache_v1.proxy.settings import Settings, parse_url
from disagg_prefill_lmcache_v1.proxy.upstream import Client

log = logging.getLogger("disagg_proxy")

PREFILL, DECODE = "prefill", "decode"

_PREFIX_BLOCK = 512  # bytes of prompt text per step of the prefix table
_PREFIX_BLOCKS = 32
_PREFIX_TABLE = 65536
_STICKY_SLACK = 4  # how many more requests than the least loaded server the sticky one may have
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
        self._prefixes: OrderedDict[int, Upstream] = OrderedDict()
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

    def choose(self, prefix: bytes | None = None, excluded: Collection[Upstream] = ()) -> Upstream | None:
        """Server for a new request, or None if none is left.

        Healthy servers go first. Among them the least loaded one, unless ``prefix`` (the beginning of the prompt) was
        seen before and the server that had it is not much busier.
        """
        upstreams = self.upstreams
        if len(upstreams) == 1:
            only = upstreams[0]
            return None if only in excluded else only
        now = self._time()
        candidates = [u for u in upstreams if u not in excluded]
        healthy = [u for u in candidates if u.up and u.open_until <= now]
        candidates = healthy or candidates
        if not candidates:
            return None
        least = min(u.in_flight for u in candidates)
        if prefix:
            return self._sticky(prefix, candidates, least)
        self._turn += 1
        count = len(candidates)
        for step in range(count):
            upstream = candidates[(self._turn + step) % count]
            if upstream.in_flight == least:
                return upstream
        return candidates[0]

    def _sticky(self, prefix: bytes, candidates: list[Upstream], least: int) -> Upstream:
        table = self._prefixes
        hashes, value = [], 0
        for start in range(0, min(len(prefix), _PREFIX_BLOCK * _PREFIX_BLOCKS), _PREFIX_BLOCK):
            value = zlib.crc32(prefix[start : start + _PREFIX_BLOCK], value)
            hashes.append(value << 8 | len(hashes))
        chosen = None
        for key in reversed(hashes):
            known = table.get(key)
            if known is not None and known in candidates and known.in_flight <= least + _STICKY_SLACK:
                chosen = known
                break
        if chosen is None:
            # A new prefix: the same choice in every worker process, if load allows.
            free = [u for u in candidates if u.in_flight <= least + _STICKY_SLACK]
            chosen = max(free, key=lambda u: zlib.crc32(u.name.encode(), hashes[0] & 0xFFFFFFFF))
        for key in hashes:
            table[key] = chosen
            table.move_to_end(key)
        while len(table) > _PREFIX_TABLE:
            table.popitem(last=False)
        return chosen

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
