"""Addresses of a server's name, looked up again every few seconds, so that a name with changing addresses works."""

from __future__ import annotations

import asyncio
import ipaddress
import socket

from disagg_prefill_lmcache_v1.proxy.upstream.errors import UpstreamError

_KEPT_S = 5.0


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


class Resolver:
    """Looks one name up. A look-up is never cancelled, and one serves all who wait: it cannot be stopped anyway."""

    def __init__(self, host: str, port: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._host, self._port = host, port
        self._fixed = _is_address(host)
        self._addresses = [host] if self._fixed else []
        self._next_look_up = 0.0
        self._running: asyncio.Task[None] | None = None
        self._turn = 0

    async def addresses(self, timeout_s: float) -> list[str]:
        """All addresses, beginning with another one each time. Raises UpstreamError if none is known in time."""
        if not self._fixed and self._loop.time() >= self._next_look_up:
            if self._running is None:
                self._running = self._loop.create_task(self._look_up())
            if not self._addresses:  # else the old ones do until the new ones are known
                await asyncio.wait((self._running,), timeout=timeout_s)
        known = self._addresses
        if not known:
            raise UpstreamError("refused", f"the name {self._host} has no address", taken=False)
        self._turn = (self._turn + 1) % len(known)
        return known[self._turn :] + known[: self._turn]

    def failed(self, address: str) -> None:
        """No connection to this address: leave it out until the next look-up, unless it is the last."""
        if len(self._addresses) > 1 and address in self._addresses:
            self._addresses.remove(address)

    async def _look_up(self) -> None:
        try:
            found = await self._loop.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
            self._addresses = list(dict.fromkeys(str(address[0]) for *_, address in found))
            self._next_look_up = self._loop.time() + _KEPT_S
        except (OSError, UnicodeError):
            pass  # what was known before is tried on
        finally:
            self._running = None
