"""Start the disaggregated-prefill proxy: prefill on one vLLM server, then decode on another.

    python disagg_proxy_server.py --port 8000 --prefiller-port 8100 --decoder-port 8200

``--help`` lists every setting. The first SIGINT or SIGTERM lets running requests end, up to --drain-timeout-s; a second
one ends at once. Exit status: 2 for a setting that is not allowed, 1 if the address cannot be used.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from types import FrameType

if not __package__:  # run as a script: make the package importable, and none of its modules shadow others
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import uvicorn

from disagg_prefill_lmcache_v1.proxy.access_log import AccessLog
from disagg_prefill_lmcache_v1.proxy.app import create_app
from disagg_prefill_lmcache_v1.proxy.client_connection import ClientConnection
from disagg_prefill_lmcache_v1.proxy.metrics import Metrics
from disagg_prefill_lmcache_v1.proxy.pool import read_members
from disagg_prefill_lmcache_v1.proxy.settings import Settings, SettingsError, load_settings

log = logging.getLogger("disagg_proxy")

PROG = "disagg_proxy_server.py"
# Set by the parent for its worker processes: listening descriptor, slot number, metrics directory, parent's pid.
_WORKER_ENV = "DISAGG_PROXY_INTERNAL_WORKER"
_BACKLOG = 2048
_TCP_NOTSENT_LOWAT = getattr(socket, "TCP_NOTSENT_LOWAT", 25)
_UNSENT_BYTES = 128 * 1024
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 32 * 1024 * 1024
_GC_THRESHOLDS = (10_000, 20, 20)


class _Server(uvicorn.Server):
    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            self.force_exit = True
        super().handle_exit(sig, frame)


def listen(settings: Settings) -> socket.socket:
    """Bound socket. Raises OSError."""
    infos = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, kind, protocol, _, address = infos[0]
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # A client that does not read shall hold little memory, in the kernel too; accepted sockets inherit this.
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, _UNSENT_BYTES)
        sock.bind(address)
        sock.listen(_BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


def serve(settings: Settings, sock: socket.socket, metrics: Metrics) -> None:
    """Serve in this process until a signal ends it."""
    access_log = AccessLog(sys.stdout.fileno(), metrics) if settings.access_log else None
    app = create_app(settings, metrics, access_log)
    config = uvicorn.Config(
        app,
        http=ClientConnection,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        date_header=False,
        backlog=_BACKLOG,
        timeout_graceful_shutdown=settings.drain_timeout_s,  # type: ignore[arg-type]
        ssl_keyfile=settings.ssl_keyfile or None,
        ssl_certfile=settings.ssl_certfile or None,
    )
    _keep_freed_memory()
    # What start-up made stays; scanning it again and again would cost each request a little. Requests leave few cycles.
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_GC_THRESHOLDS)
    try:
        _Server(config).run(sockets=[sock])
    finally:
        if access_log is not None:
            access_log.close()


def _keep_freed_memory() -> None:
    """Have the C library keep some freed memory: giving it back after each long prompt costs more than copying it."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


class Supervisor:
    """Keeps ``settings.workers`` worker processes running on one listening socket."""

    def __init__(self, settings: Settings, sock: socket.socket, argv: Sequence[str]) -> None:
        self._settings = settings
        self._sock = sock
        self._argv = argv
        self._directory = tempfile.mkdtemp(prefix="disagg-proxy-")
        self._workers: dict[int, subprocess.Popen[bytes]] = {}
        self._started: dict[int, float] = {}
        self._signals: list[int] = []

    def run(self) -> int:
        """Run until a signal; the exit status."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)
        sent = 0
        try:
            for slot in range(self._settings.workers):
                self._start(slot)
            while self._workers or not self._signals:
                while sent < len(self._signals):
                    for worker in self._workers.values():
                        with contextlib.suppress(OSError):
                            worker.send_signal(signal.SIGTERM)
                    sent += 1
                for slot, worker in list(self._workers.items()):
                    if worker.poll() is None:
                        continue
                    del self._workers[slot]
                    if self._signals:
                        continue
                    log.error("worker %d (pid %d) ended with status %d", slot, worker.pid, worker.returncode)
                    # A worker that dies right after its start must not be restarted in a tight loop.
                    delay = 1.0 if time.monotonic() - self._started[slot] < 2.0 else 0.0
                    self._started[slot] = time.monotonic() + delay
                for slot in range(self._settings.workers):
                    if slot not in self._workers and not self._signals and time.monotonic() >= self._started[slot]:
                        self._start(slot)
                time.sleep(0.05)
        finally:
            for worker in self._workers.values():
                worker.kill()
                worker.wait()
            shutil.rmtree(self._directory, ignore_errors=True)
        return 128 + self._signals[0] if self._signals else 1

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signals.append(number)

    def _start(self, slot: int) -> None:
        descriptor = self._sock.fileno()
        env = {**os.environ, _WORKER_ENV: f"{descriptor},{slot},{os.getpid()},{self._directory}"}
        command = [sys.executable, os.path.abspath(__file__), *self._argv]
        # Its own session: a terminal's Ctrl-C reaches the parent only, which passes it on once.
        self._workers[slot] = subprocess.Popen(command, env=env, pass_fds=(descriptor,), start_new_session=True)
        self._started[slot] = time.monotonic()


def _watch_parent(parent: int) -> None:
    """End this worker when its parent is gone, so that nothing is left running."""
    import threading

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True, name="parent-watch").start()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the proxy; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        settings = load_settings(argv, os.environ, PROG)
        if settings.upstreams_file:
            read_members(settings.upstreams_file)
    except SettingsError as error:
        print(f"{PROG}: error: {error}", file=sys.stderr)
        return 2
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        # Started in the background of a script: INT is to stop it all the same.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    worker = os.environ.pop(_WORKER_ENV, "")
    if worker:
        descriptor, slot, parent, directory = worker.split(",", 3)
        _watch_parent(int(parent))
        serve(settings, socket.socket(fileno=int(descriptor)), Metrics(directory, int(slot)))
        return 0
    try:
        sock = listen(settings)
    except OSError as error:
        print(f"{PROG}: error: --host {settings.host} --port {settings.port}: {error}", file=sys.stderr)
        return 1
    scheme = "https" if settings.ssl_certfile else "http"
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    print(f"{PROG}: listening on {scheme}://{host}:{sock.getsockname()[1]}", file=sys.stderr, flush=True)
    if settings.workers > 1:
        return Supervisor(settings, sock, argv).run()
    serve(settings, sock, Metrics())
    return 0


if __name__ == "__main__":
    sys.exit(main())
