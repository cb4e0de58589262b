"""Serving in this process: the listening socket, TLS, limits of the process and the uvicorn server."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import logging
import resource
import socket
import ssl
import sys
from types import FrameType

import uvicorn

from disagg_prefill_lmcache_v1.proxy.access_log import AccessLog
from disagg_prefill_lmcache_v1.proxy.app import create_app
from disagg_prefill_lmcache_v1.proxy.client_connection import ClientConnection
from disagg_prefill_lmcache_v1.proxy.metrics import Metrics
from disagg_prefill_lmcache_v1.proxy.settings import Settings, SettingsError

log = logging.getLogger("disagg_proxy")

START_FAILED = 3
"""Exit status of a process that could not begin to serve."""

_TRACING = "disagg_prefill_lmcache_v1.proxy.tracing"
_BACKLOG = 2048
_TCP_NOTSENT_LOWAT = getattr(socket, "TCP_NOTSENT_LOWAT", 25)
_UNSENT_BYTES = 128 * 1024
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 32 * 1024 * 1024
_GC_THRESHOLDS = (10_000, 20, 20)
_MAX_DESCRIPTORS = 1 << 20


class _Server(uvicorn.Server):
    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            self.force_exit = True
        super().handle_exit(sig, frame)


def check_tls(settings: Settings) -> None:
    """Try the certificate and its key, before any process relies on them. Raises SettingsError."""
    if not settings.ssl_certfile:
        return
    encrypted = False

    def no_password() -> str:
        nonlocal encrypted
        encrypted = True
        return ""

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(settings.ssl_certfile, settings.ssl_keyfile, no_password)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        reason = "the key is encrypted" if encrypted else str(error)
        raise SettingsError(
            f"--ssl-certfile {settings.ssl_certfile!r}, --ssl-keyfile {settings.ssl_keyfile!r}: {reason}; "
            "allowed: a PEM certificate and its key, not encrypted"
        ) from None


def check_tracing(settings: Settings) -> None:
    """Raises SettingsError where traces are asked for and the library is not there."""
    if settings.otlp_traces_endpoint:
        try:
            importlib.import_module(_TRACING)
        except ImportError as error:
            raise SettingsError(
                f"--otlp-traces-endpoint: {error.name} is not installed; allowed with opentelemetry-sdk and "
                "opentelemetry-exporter-otlp-proto-http"
            ) from None


def raise_descriptor_limit() -> None:
    """Take as many file descriptors as the system allows: each request needs two connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MAX_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


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


def serve(settings: Settings, sock: socket.socket, metrics: Metrics) -> int:
    """Serve in this process until a signal ends it; the exit status."""
    access_log = AccessLog(sys.stdout.fileno(), metrics) if settings.access_log else None
    tracing = None
    if settings.otlp_traces_endpoint:
        tracing = importlib.import_module(_TRACING).Tracing(settings.otlp_traces_endpoint)
    config = uvicorn.Config(
        create_app(settings, metrics, access_log, tracing),
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
    server = _Server(config)
    try:
        config.load()
        _spare_memory_work()
        server.run(sockets=[sock])
    except (OSError, SettingsError) as error:  # the certificate was exchanged for a bad one since it was checked
        log.error("the proxy cannot start: %s", error)
    finally:
        if access_log is not None:
            access_log.close()  # what was cut short at the end is told too
    return 0 if server.started else START_FAILED


def _spare_memory_work() -> None:
    """Have garbage collection and the C library do less: each costs more than what it saves here."""
    # Giving memory back after each long prompt costs more than copying it.
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
    # What start-up made stays; scanning it again and again would cost each request a little. Requests leave few cycles.
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_GC_THRESHOLDS)
