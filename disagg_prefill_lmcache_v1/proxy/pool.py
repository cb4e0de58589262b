"""The prefill and decode servers: which one a request goes to, and which ones are healthy."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import zlib
from collections import OrderedDict
from collections.abc import Collection, Sequence

from disagg_prefill_lmcache_v1.proxy.metrics import Metrics
from disagg_prefill_lmcache_v1.proxy.settings import Settings, SettingsError, parse_url
from disagg_prefill_lmcache_v1.proxy.upstream import Client, UpstreamError

log = logging.getLogger("disagg_proxy")

PREFILL, DECODE = "prefill", "decode"

_CIRCUIT_FAILURES = 3  # failures in a row that close a server to new requests
_BACK_OFF_S = (0.5, 1.0, 2.0, 4.0, 8.0)
_PREFIX_BLOCK = 512  # bytes of prompt text per step of the prefix table
_PREFIX_BLOCKS = 32
_PREFIX_TABLE = 65536
_STICKY_SLACK = 4  # how many more requests than the least loaded server the sticky one may have


class Upstream:
    """One server."""

    __slots__ = (
        "authority",
        "client",
        "failures",
        "host_line",
        "in_flight",
        "name",
        "open_until",
        "refusing",
        "role",
        "up",
    )

    def __init__(self, role: str, client: Client) -> None:
        self.role = role
        self.client = client
        self.name = client.address.url
        self.authority = client.address.authority
        self.host_line = b"host: " + self.authority.encode() + b"\r\n"
        self.in_flight = 0
        self.up = True
        self.failures = 0
        self.open_until = 0.0
        self.refusing = False


class Pool:
    """All servers of one role. Belongs to one event loop."""

    def __init__(self, role: str, urls: Sequence[str], settings: Settings, metrics: Metrics) -> None:
        self.role = role
        self._settings = settings
        self._metrics = metrics
        self._loop = asyncio.get_running_loop()
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
            self._metrics.set("disagg_upstream_up", self.role, gone.name, to=0.0)
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
        now = self._loop.time()
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

    def succeeded(self, upstream: Upstream) -> None:
        """A request got an answer."""
        if upstream.failures or not upstream.up:
            upstream.failures = 0
            upstream.open_until = 0.0
            self._set_up(upstream, True, "it answers")

    def failed(self, upstream: Upstream, reason: str) -> None:
        """A request or health check found the server refused, silent or broken."""
        upstream.failures += 1
        upstream.refusing = "refused" in reason
        if upstream.refusing or upstream.failures >= _CIRCUIT_FAILURES:
            step = min(upstream.failures - 1, len(_BACK_OFF_S) - 1)
            upstream.open_until = self._loop.time() + _BACK_OFF_S[step]
            self._set_up(upstream, False, reason)

    def _set_up(self, upstream: Upstream, up: bool, reason: str) -> None:
        if upstream.up != up:
            upstream.up = up
            level = logging.INFO if up else logging.WARNING
            log.log(level, "%s server %s is %s: %s", self.role, upstream.name, "up" if up else "down", reason)

    @property
    def available(self) -> bool:
        """Whether any server looks healthy."""
        return any(upstream.up for upstream in self.upstreams)

    async def check(self, upstream: Upstream) -> bool:
        """Ask one server for its /health and note the result."""
        timeout = self._settings.health_timeout_s
        request = b"GET /health HTTP/1.1\r\n" + upstream.host_line + b"\r\n"
        try:
            response = await asyncio.wait_for(upstream.client.request(request), timeout)
        except UpstreamError as error:
            self.failed(upstream, str(error))
            return False
        except (TimeoutError, asyncio.TimeoutError):
            self.failed(upstream, f"no answer to /health within {timeout:g} s")
            return False
        if not response.complete:
            response.connection.abort()
        if response.status != 200:
            self.failed(upstream, f"/health answers {response.status}")
            return False
        self.succeeded(upstream)
        return True

    async def watch(self) -> None:
        """Check all servers for ever; a server that is down is asked at growing intervals."""
        due: dict[Upstream, float] = {}
        running: dict[Upstream, asyncio.Task[bool]] = {}
        interval = self._settings.health_interval_s
        try:
            while True:
                now = self._loop.time()
                for upstream in self.upstreams:
                    task = running.get(upstream)
                    if (task is not None and not task.done()) or due.get(upstream, 0.0) > now:
                        continue
                    running[upstream] = self._loop.create_task(self.check(upstream))
                    step = min(max(upstream.failures - 1, 0), len(_BACK_OFF_S) - 1)
                    due[upstream] = now + (interval if upstream.up else max(_BACK_OFF_S[step], interval / 4))
                self._publish()
                await asyncio.sleep(min(interval, _BACK_OFF_S[0]) / 2)
                for gone in [u for u in running if u not in self.upstreams]:
                    running.pop(gone).cancel()
                    due.pop(gone, None)
        finally:
            for task in running.values():
                task.cancel()

    def _publish(self) -> None:
        for upstream in self.upstreams:
            self._metrics.set("disagg_upstream_up", self.role, upstream.name, to=float(upstream.up))
            self._metrics.set("disagg_upstream_in_flight", self.role, upstream.name, to=float(upstream.in_flight))
            idle = float(upstream.client.idle_connections)
            self._metrics.set("disagg_upstream_idle_connections", self.role, upstream.name, to=idle)

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


def read_members(path: str) -> tuple[list[str], list[str]]:
    """Prefill and decode URLs from an upstreams file. Raises SettingsError."""
    allowed = 'allowed: {"prefillers": [URL, ...], "decoders": [URL, ...]}'
    try:
        with open(path, encoding="utf-8") as file:
            value = json.load(file)
        prefillers, decoders = value["prefillers"], value["decoders"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SettingsError(f"--upstreams-file {path!r}: {error!r}; {allowed}") from None
    for urls in (prefillers, decoders):
        if not isinstance(urls, list) or not urls or not all(isinstance(url, str) for url in urls):
            raise SettingsError(f"--upstreams-file {path!r}: {allowed}, each with one URL or more")
        for url in urls:
            parse_url(url, f"--upstreams-file {path!r}")
    return prefillers, decoders


def file_stamp(path: str) -> tuple[int, int]:
    """Changes whenever the file does; (0, 0) while it is missing."""
    try:
        status = os.stat(path)
    except OSError:
        return (0, 0)
    return (status.st_mtime_ns, status.st_size)
