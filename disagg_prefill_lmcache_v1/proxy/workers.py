"""Several worker processes on one listening socket, and the parent that keeps them running."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from disagg_prefill_lmcache_v1.proxy.metrics import Metrics, new_slots
from disagg_prefill_lmcache_v1.proxy.serve import START_FAILED

log = logging.getLogger("disagg_proxy")

WORKER_ENV = "DISAGG_PROXY_INTERNAL_WORKER"
"""Set by the parent for its workers: descriptors of the socket and the metrics, slot number and the parent's pid."""
_SHORT_LIFE_S = 2.0  # a worker that ends sooner waits before its next start,
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 10.0  # longer and longer


@dataclass
class _Slot:
    """One worker's place."""

    worker: subprocess.Popen[bytes] | None = None
    starts: int = 0
    started: float = 0.0
    next_start: float = 0.0
    pause_s: float = _FIRST_PAUSE_S


class Supervisor:
    """Keeps ``count`` worker processes running on one listening socket. ``command`` starts one."""

    def __init__(self, count: int, sock: socket.socket, command: Sequence[str]) -> None:
        self._sock = sock
        self._command = command
        self._metrics = new_slots(count)
        self._slots = [_Slot() for _ in range(count)]
        self._signals: list[int] = []
        self._failed = False

    def run(self) -> int:
        """Run until a signal; the exit status."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, frame: self._signals.append(number))
        passed_on = 0
        try:
            while self._running() or not (self._signals or self._failed):
                if self._signals or self._failed:
                    # The workers close the socket too: only so are clients told at once that nobody takes them.
                    self._sock.close()
                else:
                    self._start_due()
                while passed_on < len(self._signals) + self._failed:
                    self._stop_all()
                    passed_on += 1
                self._collect()
                time.sleep(0.05)
        finally:
            for slot in self._running():
                slot.worker.kill()
                slot.worker.wait()
        return 128 + self._signals[0] if self._signals else 1

    def _running(self) -> list[_Slot]:
        return [slot for slot in self._slots if slot.worker is not None]

    def _stop_all(self) -> None:
        for slot in self._running():
            with contextlib.suppress(OSError):
                slot.worker.send_signal(signal.SIGTERM)

    def _collect(self) -> None:
        """Take note of the workers that have ended."""
        for number, slot in enumerate(self._slots):
            worker = slot.worker
            if worker is None or worker.poll() is None:
                continue
            slot.worker = None
            if self._signals or self._failed:
                continue
            log.error("worker %d (pid %d) ended with status %d", number, worker.pid, worker.returncode)
            now = time.monotonic()
            if worker.returncode == START_FAILED and slot.starts == 1:
                self._failed = True  # it has told why; trying again would change nothing
            elif now - slot.started < _SHORT_LIFE_S:
                slot.next_start = now + slot.pause_s
                slot.pause_s = min(2 * slot.pause_s, _LONGEST_PAUSE_S)
            else:
                slot.pause_s = _FIRST_PAUSE_S

    def _start_due(self) -> None:
        now = time.monotonic()
        for number, slot in enumerate(self._slots):
            if slot.worker is None and now >= slot.next_start:
                slot.worker = self._start(number)
                slot.started = now
                slot.starts += 1

    def _start(self, number: int) -> subprocess.Popen[bytes]:
        descriptors = (self._sock.fileno(), *self._metrics)
        told = f"{','.join(map(str, descriptors))};{number};{os.getpid()}"
        # Its own session: a terminal's Ctrl-C reaches the parent only, which passes it on once.
        return subprocess.Popen(
            self._command, env={**os.environ, WORKER_ENV: told}, pass_fds=descriptors, start_new_session=True
        )


def worker_parts(environ: Mapping[str, str]) -> tuple[socket.socket, Metrics] | None:
    """In a worker: its socket and metrics, and from now on it ends with its parent. None in any other process."""
    told = environ.get(WORKER_ENV, "")
    if not told:
        return None
    descriptors, number, parent = told.split(";")
    listening, *metrics = map(int, descriptors.split(","))
    _end_with(int(parent))
    parts = socket.socket(fileno=listening), Metrics(metrics, int(number))
    for descriptor in metrics:  # they are mapped now
        os.close(descriptor)
    return parts


def _end_with(parent: int) -> None:
    """End this worker when its parent is gone, so that nothing is left running."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True, name="parent-watch").start()
