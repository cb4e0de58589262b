"""Background work of one worker process: timeouts, changes of the servers, memory given back at rest."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import logging
from collections.abc import Callable
from typing import Any

from disagg_prefill_lmcache_v1.proxy.kv_layouts import LayoutWatch
from disagg_prefill_lmcache_v1.proxy.members import file_stamp, read_members
from disagg_prefill_lmcache_v1.proxy.pool import Pool
from disagg_prefill_lmcache_v1.proxy.settings import Settings, SettingsError

log = logging.getLogger("disagg_proxy")


class Upkeep:
    """Runs beside the requests until stop().

    ``finished`` tells how many requests have ended, ``in_flight`` how many are in progress.
    """

    def __init__(
        self, settings: Settings, prefill: Pool, decode: Pool, finished: Callable[[], int],
        in_flight: Callable[[], float], stamp: tuple[int, int], layouts: LayoutWatch,
    ) -> None:  # fmt: skip
        self._settings = settings
        self._prefill = prefill
        self._decode = decode
        self._finished = finished
        self._in_flight = in_flight
        self._stamp = stamp
        self._layouts = layouts
        self._last_finished = self._freed_at = 0
        self._tasks: list[asyncio.Task[Any]] = []
        self._malloc_trim = None
        with contextlib.suppress(OSError, AttributeError):  # glibc only
            self._malloc_trim = ctypes.CDLL(None).malloc_trim

    def start(self) -> None:
        """Begin the background work."""
        loop = asyncio.get_running_loop()
        for work in (self._prefill.watch(), self._decode.watch(), self._tick()):
            self._tasks.append(loop.create_task(work))

    async def stop(self) -> None:
        """End the background work and close all idle connections."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._prefill.close()
        self._decode.close()

    async def _tick(self) -> None:
        s = self._settings
        limits = [t for t in (s.prefill_timeout_s, s.decode_timeout_s, s.stream_idle_timeout_s) if t]
        seconds = min([1.0, *(limit / 4 for limit in limits)])
        time = asyncio.get_running_loop().time
        last = time()
        while True:
            await asyncio.sleep(seconds)
            now = time()
            # A stopped or starved proxy must not blame the servers for its own pause.
            passed, last = min(now - last, 2 * seconds), now
            for work in (
                lambda: self._prefill.sweep(passed),  # noqa: B023 (it is called at once)
                lambda: self._decode.sweep(passed),  # noqa: B023
                self._read_upstreams_again,
                lambda: self._layouts.look(self._prefill.upstreams, self._decode.upstreams),
                self._free_memory_at_rest,
            ):
                try:
                    work()
                except Exception:
                    log.exception("background work failed; it goes on")

    def _read_upstreams_again(self) -> None:
        path = self._settings.upstreams_file
        if not path:
            return
        stamp = file_stamp(path)
        if stamp in (self._stamp, (0, 0)):
            return
        self._stamp = stamp
        try:
            prefillers, decoders = read_members(path)
        except SettingsError as error:
            log.error("%s; the servers in use stay the same", error)
            return
        self._prefill.set_members(prefillers)
        self._decode.set_members(decoders)
        log.info("servers now: prefill %s; decode %s", ", ".join(prefillers), ", ".join(decoders))

    def _free_memory_at_rest(self) -> None:
        """Give memory back to the system once the last request has ended; while there are some, they would pay."""
        finished = self._finished()
        at_rest = finished == self._last_finished and not self._in_flight()
        self._last_finished = finished
        if at_rest and finished != self._freed_at:
            self._freed_at = finished
            gc.collect()
            if self._malloc_trim is not None:
                self._malloc_trim(0)
