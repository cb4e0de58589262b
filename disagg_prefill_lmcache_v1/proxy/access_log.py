"""Access log: one JSON line per request, written by a thread so that a stuck reader never stops the proxy."""

from __future__ import annotations

import os
import threading
import time
from collections import deque

from disagg_prefill_lmcache_v1.proxy.metrics import Metrics
from disagg_prefill_lmcache_v1.proxy.request import RequestContext
from disagg_prefill_lmcache_v1.proxy.timing import as_json

_MAX_LINES = 100_000  # lines kept while the log is not read; about 30 MB
_FLUSH_S = 0.2


class AccessLog:
    """Buffered writer of access log lines to a file descriptor."""

    def __init__(self, descriptor: int, metrics: Metrics) -> None:
        self._descriptor = descriptor
        self._metrics = metrics
        self._lines: deque[str] = deque()
        self._wake = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="access-log", daemon=True)
        self._thread.start()

    def write(self, request: RequestContext, total_s: float) -> None:
        """Add the line of a finished request that took ``total_s`` seconds."""
        if len(self._lines) >= _MAX_LINES:
            self._metrics.add("disagg_log_lines_dropped")
            return
        path = request.path if request.route != "other" else _escaped(request.path)
        text = (
            f'{{"time":{time.time():.3f},"request_id":"{request.request_id}","method":"{request.method}",'
            f'"path":"{path}","status":{request.status},"outcome":"{request.outcome}","stage":"{request.stage}",'
            f'"total_ms":{total_s * 1000:.1f}'
        )
        if request.prefill_outcome:
            text += f',"prefill":"{request.prefill_outcome}","prefiller":"{request.prefiller}"'
            if request.prefill_s >= 0:
                text += f',"prefill_ms":{request.prefill_s * 1000:.1f}'
            text += f',"kv_state":"{request.kv_state}"'
            if request.kv_wait_ms >= 0:
                text += f',"kv_wait_ms":{request.kv_wait_ms:.1f}'
        if request.way:
            text += f',"route":"{request.way}","route_reason":"{request.way_reason}"'
            if request.expected_s >= 0:
                text += f',"expected_ttft_ms":{request.expected_s * 1000:.1f}'
        if request.decoder:
            text += f',"decoder":"{request.decoder}"'
            if request.decode_s >= 0:
                text += f',"decode_ms":{request.decode_s * 1000:.1f}'
        if request.ttft_s >= 0:
            text += f',"ttft_ms":{request.ttft_s * 1000:.2f},"ttft_parts_ms":{as_json(request.parts)}'
        if request.prompt_tokens >= 0:
            text += f',"prompt_tokens":{request.prompt_tokens},"reused_tokens":{request.reused_tokens}'
            text += f',"cached_tokens":{request.cached_tokens}'
        if request.error_detail:
            text += f',"error":"{_escaped(request.error_detail)}"'
        self._lines.append(f'{text},"bytes":{request.sent}}}\n')

    def _run(self) -> None:
        while not self._closed:
            self._wake.wait(_FLUSH_S)
            self._flush()

    def _flush(self) -> None:
        lines = [self._lines.popleft() for _ in range(len(self._lines))]
        data = memoryview("".join(lines).encode())
        while data:
            try:
                data = data[os.write(self._descriptor, data) :]
            except BlockingIOError:
                time.sleep(_FLUSH_S)
            except OSError:
                return  # nobody is left to read

    def close(self) -> None:
        """Write what is left, for at most a second."""
        self._closed = True
        self._wake.set()
        self._thread.join(1.0)


def _escaped(text: str) -> str:
    return "".join(c if c.isprintable() and c not in '"\\' else f"\\u{min(ord(c), 0xFFFF):04x}" for c in text)
