"""Start the disaggregated-prefill proxy: prefill on one vLLM server, then decode on another.

    python disagg_proxy_server.py --port 8000 --prefiller-port 8100 --decoder-port 8200

``--help`` lists every setting. The first SIGINT or SIGTERM lets running requests end, up to --drain-timeout-s; a second
one ends at once. Exit status: 2 for a setting or certificate that is not allowed, 1 if the address cannot be used or a
worker cannot start, 3 if the proxy itself cannot.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence

if not __package__:  # run as a script: make the package importable, and none of its modules shadow others
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from disagg_prefill_lmcache_v1.proxy.members import read_members
from disagg_prefill_lmcache_v1.proxy.metrics import Metrics
from disagg_prefill_lmcache_v1.proxy.serve import check_tls, check_tracing, listen, raise_descriptor_limit, serve
from disagg_prefill_lmcache_v1.proxy.settings import SettingsError, load_settings
from disagg_prefill_lmcache_v1.proxy.workers import WORKER_ENV, Supervisor, worker_parts
from disagg_prefill_lmcache_v1.settings import is_loopback

PROG = "disagg_proxy_server.py"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the proxy; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        settings = load_settings(argv, os.environ, PROG)
        if settings.upstreams_file:
            read_members(settings.upstreams_file)
        check_tls(settings)
        check_tracing(settings)
    except SettingsError as error:
        print(f"{PROG}: error: {error}", file=sys.stderr)
        return 2
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        # Started in the background of a script: INT is to stop it all the same.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    worker = worker_parts(os.environ)
    if worker is not None:
        del os.environ[WORKER_ENV]
        return serve(settings, *worker)
    raise_descriptor_limit()
    try:
        sock = listen(settings)
    except OSError as error:
        print(f"{PROG}: error: --host {settings.host} --port {settings.port}: {error}", file=sys.stderr)
        return 1
    scheme = "https" if settings.ssl_certfile else "http"
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    print(f"{PROG}: listening on {scheme}://{host}:{sock.getsockname()[1]}", file=sys.stderr, flush=True)
    if not (settings.api_key or settings.ssl_certfile or is_loopback(settings.host)):
        print(f"{PROG}: warning: whoever reaches {host} can use it: no TLS, no key", file=sys.stderr, flush=True)
    if settings.workers > 1:
        return Supervisor(settings.workers, sock, [sys.executable, os.path.abspath(__file__), *argv]).run()
    return serve(settings, sock, Metrics())


if __name__ == "__main__":
    sys.exit(main())
