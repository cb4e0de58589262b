"""For benchmarks/mutation.py: the proxy runs in a thread of the tests, which spares most of a mutant's time.

A pytest plugin (-p mutation_plugin). Tests that look at the proxy's process, its memory or its signals are left out,
and those that count parts of a second.
"""

from __future__ import annotations

import inspect
import json
import logging
import os
import threading
from typing import Any

import proxy_harness
import pytest
import uvicorn

from disagg_prefill_lmcache_v1.proxy import serve
from disagg_prefill_lmcache_v1.proxy.access_log import AccessLog
from disagg_prefill_lmcache_v1.proxy.app import create_app
from disagg_prefill_lmcache_v1.proxy.client_connection import ClientConnection
from disagg_prefill_lmcache_v1.proxy.metrics import Metrics
from disagg_prefill_lmcache_v1.proxy.settings import load_settings

PROCESS_WORDS = (
    ".process", "resident_bytes", "descriptors", "cpu_s", "streaming(", "metric_of_time", "cpu_rests", "ssl",
    "HANG_UP_S",
)  # fmt: skip


class ProxyThread:
    """Stands in for proxy_harness.ProxyProcess."""

    def __init__(self, *flags: str, env: dict[str, str] | None = None) -> None:
        settings = load_settings(["--port", "0", *flags], env or {})
        sock = serve.listen(settings)
        self.port = sock.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.messages: list[str] = ["listening"]
        self.access_lines: list[dict[str, Any]] = []
        read, write = os.pipe()
        metrics = Metrics()
        self._log = AccessLog(write, metrics)
        self._write = write
        threading.Thread(target=self._read, args=(read,), daemon=True).start()
        handler = logging.Handler()
        handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
        handler.emit = lambda record: self.messages.append(handler.format(record))  # type: ignore[method-assign]
        logging.getLogger("disagg_proxy").addHandler(handler)
        logging.getLogger("disagg_proxy").setLevel(logging.INFO)
        config = uvicorn.Config(
            create_app(settings, metrics, self._log), http=ClientConnection, ws="none", lifespan="on", log_config=None,
            access_log=False, proxy_headers=False, server_header=False, date_header=False, timeout_graceful_shutdown=1,
        )  # fmt: skip
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([sock],), daemon=True)
        self._thread.start()
        proxy_harness.wait_until(lambda: self._server.started, "the proxy has started", 10)

    connect = proxy_harness.ProxyProcess.connect
    access_line = proxy_harness.ProxyProcess.access_line

    def _read(self, descriptor: int) -> None:
        with open(descriptor) as lines:
            for line in lines:
                self.access_lines.append(json.loads(line))

    def stop(self, number: int = 0) -> int:
        """End it."""
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(10)
        self._log.close()
        return 0


WAIT_S = 5.0  # for a condition that may never come true
proxy_harness.ProxyProcess = ProxyThread  # type: ignore[assignment,misc]
proxy_harness.DEADLINE_S = WAIT_S
proxy_harness.wait_until.__defaults__ = (WAIT_S,)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what needs a process."""
    needy = [item for item in items if any(word in inspect.getsource(item.function) for word in PROCESS_WORDS)]
    config.hook.pytest_deselected(items=needy)
    items[:] = [item for item in items if item not in needy]
