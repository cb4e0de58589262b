"""Load generator and mock servers of benchmarks/proxy_overhead.py, on raw epoll: cheaper than what they measure."""

from __future__ import annotations

import contextlib
import heapq
import json
import re
import select
import socket
import time
from collections.abc import Callable
from typing import Any

DEADLINE_S = 60.0

_KV_PARAMS = {
    "do_remote_prefill": True, "do_remote_decode": False, "remote_engine_id": "mock", "remote_block_ids": [1, 2, 3],
    "remote_host": "127.0.0.1", "remote_port": 5600,
}  # fmt: skip
_USAGE = {"prompt_tokens": 500, "total_tokens": 516, "completion_tokens": 16,
          "prompt_tokens_details": {"cached_tokens": 499}}  # fmt: skip
_ANSWER = {
    "id": "cmpl-0123456789abcdef", "object": "text_completion", "created": 1700000000, "model": "mock",
    "choices": [{"index": 0, "text": "word " * 16, "logprobs": None, "finish_reason": "length"}],
    "usage": _USAGE,
}  # fmt: skip
_HEAD = b"HTTP/1.1 200 OK\r\ndate: Tue, 24 Nov 2026 00:00:00 GMT\r\nserver: uvicorn\r\n"
_EVENT = (
    b'data: {"id":"cmpl-0123456789abcdef","object":"text_completion","created":1700000000,"model":"mock","t":%016d,'
    b'"choices":[{"index":0,"text":" word","logprobs":null,"finish_reason":null,"stop_reason":null}],"usage":null}\n\n'
)
_EVENT_BYTES = len(_EVENT % 0)
_DONE = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
_stamps = re.compile(rb'"t":(\d{16})').findall
_length = re.compile(rb"content-length: *(\d+)", re.IGNORECASE).search


def _json_answer(value: Any, extra: bytes = b"") -> bytes:
    body = json.dumps(value).encode()
    return _HEAD + extra + b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)


PREFILL_ANSWER = _json_answer(
    {**_ANSWER, "kv_transfer_params": _KV_PARAMS}, b"x-kv-state: stored\r\nx-kv-wait-ms: 1.5\r\n"
)
DECODE_ANSWER = _json_answer(_ANSWER)
OTHER_ANSWER = _json_answer({"object": "list", "data": [{"id": "mock"}], "model_path": "mock", "status": "ok"})
STREAM_HEAD = _HEAD + b"content-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"


class Endpoint:
    """One non-blocking socket in the epoll loop."""

    def __init__(self, loop: Loop, sock: socket.socket) -> None:
        self.loop = loop
        self.sock = sock
        self.fd = sock.fileno()
        self.unsent = memoryview(b"")
        self.closed = False
        loop.endpoints[self.fd] = self
        loop.epoll.register(self.fd, select.EPOLLIN)

    def send(self, data: bytes) -> None:
        """Write now, or as soon as the other side reads."""
        try:
            sent = self.sock.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.close()
            return
        if sent < len(data):
            self.unsent = memoryview(data)[sent:]
            self.loop.epoll.modify(self.fd, select.EPOLLIN | select.EPOLLOUT)

    def writable(self) -> None:
        """Go on with send()."""
        try:
            self.unsent = self.unsent[self.sock.send(self.unsent) :]
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        if not self.unsent:
            self.loop.epoll.modify(self.fd, select.EPOLLIN)

    def readable(self) -> None:
        """Read what there is."""
        try:
            data = self.sock.recv(262144)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            self.received(data)
        else:
            self.close()
            self.ended()

    def received(self, data: bytes) -> None:
        """Called with what was read."""

    def ended(self) -> None:
        """Called when the other side has closed."""

    def close(self) -> None:
        """Leave the loop."""
        if not self.closed:
            self.closed = True
            self.loop.endpoints.pop(self.fd, None)
            self.sock.close()


class Loop:
    """Minimal epoll loop with timers."""

    def __init__(self) -> None:
        self.epoll = select.epoll()
        self.endpoints: dict[int, Endpoint] = {}
        self.timers: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0

    def at(self, when: float, callback: Callable[[], None]) -> None:
        """Call back at a time of time.perf_counter()."""
        self._count += 1
        heapq.heappush(self.timers, (when, self._count, callback))

    def run(self, until: float, done: Callable[[], bool] | None = None) -> None:
        """Run until that time, or until ``done``."""
        timers, endpoints, poll = self.timers, self.endpoints, self.epoll.poll
        while True:
            now = time.perf_counter()
            if now >= until or (done is not None and done()):
                return
            while timers and timers[0][0] <= now:
                heapq.heappop(timers)[2]()
            wait = min(until, timers[0][0] if timers else until) - time.perf_counter()
            for fd, event in poll(max(wait, 0), 256):
                endpoint = endpoints.get(fd)
                if endpoint is None:
                    continue
                if event & select.EPOLLOUT and endpoint.unsent:
                    endpoint.writable()
                if event & ~select.EPOLLOUT and not endpoint.closed:
                    endpoint.readable()


class Listener(Endpoint):
    """Listening socket of a mock server."""

    def __init__(self, loop: Loop, role: str) -> None:
        sock = socket.socket()
        sock.bind(("127.0.0.1", 0))
        sock.listen(4096)
        sock.setblocking(False)
        self.role = role
        self.port = sock.getsockname()[1]
        super().__init__(loop, sock)

    def readable(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                sock, _ = self.sock.accept()
                sock.setblocking(False)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                MockEndpoint(self.loop, sock, self.role)


class MockEndpoint(Endpoint):
    """Server side of one connection of a mock server."""

    chunks, gap = 0, 0.0  # of streamed answers, set for each scenario

    def __init__(self, loop: Loop, sock: socket.socket, role: str) -> None:
        super().__init__(loop, sock)
        self.role = role
        self.buffer = b""
        self.missing = 0
        self.head = b""
        self.left = 0
        self.due = 0.0

    def received(self, data: bytes) -> None:
        if self.missing:
            self.missing -= len(data)
            if self.missing <= 0:
                self.missing = 0
                self.answer(self.head)
            return
        if self.buffer:
            data, self.buffer = self.buffer + data, b""
        end = data.find(b"\r\n\r\n")
        if end < 0:
            self.buffer = data
            return
        found = _length(data, 0, end)
        missing = (int(found[1]) if found else 0) - (len(data) - end - 4)
        if missing > 0:
            self.missing, self.head = missing, data
        elif b"transfer-encoding: chunked" in data[:end].lower() and not data.endswith(b"0\r\n\r\n"):
            self.buffer = data
        else:
            self.answer(data)

    def answer(self, request: bytes) -> None:
        """Answer one whole request."""
        if not request.startswith(b"POST /v1/c"):
            self.send(OTHER_ANSWER)
        elif self.role == "prefill":
            self.send(PREFILL_ANSWER)
        elif b'"stream":true' in request:
            self.left, self.due = MockEndpoint.chunks, time.perf_counter()
            self.send(STREAM_HEAD)
            self.event()
        else:
            self.send(DECODE_ANSWER)

    def event(self) -> None:
        """Send the next event of a stream."""
        if self.closed:
            return
        if self.left:
            self.left -= 1
            now = time.perf_counter_ns()
            self.send(b"%x\r\n%b\r\n" % (_EVENT_BYTES, _EVENT % (now // 1000)))
            self.due += MockEndpoint.gap
            self.loop.at(self.due, self.event)
        else:
            self.send(_DONE)


class UnaryClient(Endpoint):
    """Client that sends the next request when the answer to the last one is complete."""

    def __init__(self, loop: Loop, port: int, request: bytes, results: Results) -> None:
        super().__init__(loop, connect(port))
        self.request = request
        self.results = results
        self.buffer = b""
        self.missing = 0
        self.go()

    def go(self) -> None:
        """Send the request."""
        self.begin = time.perf_counter()
        self.send(self.request)

    def received(self, data: bytes) -> None:
        if self.buffer:
            data, self.buffer = self.buffer + data, b""
        end = data.find(b"\r\n\r\n")
        found = _length(data, 0, end) if end >= 0 else None
        complete = len(data) >= end + 4 + int(found[1]) if found else data.endswith(b"0\r\n\r\n")
        if end < 0 or not complete:
            self.buffer = data
            return
        if not data.startswith(b"HTTP/1.1 200"):
            self.results.errors += 1
        self.results.latencies.append(time.perf_counter() - self.begin)
        if self.results.running:
            self.go()

    def ended(self) -> None:
        self.results.errors += 1


class StreamClient(Endpoint):
    """Client that starts the next stream when the last one is complete."""

    def __init__(self, loop: Loop, port: int, request: bytes, results: Results) -> None:
        super().__init__(loop, connect(port))
        self.request = request
        self.results = results
        self.first = True
        self.go()

    def go(self) -> None:
        """Send the request."""
        if self.closed:
            return
        self.begin = time.perf_counter()
        self.first = True
        self.send(self.request)

    def received(self, data: bytes) -> None:
        results = self.results
        stamps = _stamps(data)
        if stamps:
            now = time.perf_counter()
            if self.first:
                self.first = False
                results.ttfts.append(now - self.begin)
            else:
                results.transits.append(now - int(stamps[0]) / 1e6)
            results.chunks += len(stamps)
        if data.endswith(b"0\r\n\r\n"):
            results.latencies.append(time.perf_counter() - self.begin)
            if results.running:
                self.go()
        elif data.startswith(b"HTTP/1.1 ") and not data.startswith(b"HTTP/1.1 200"):
            results.errors += 1

    def ended(self) -> None:
        self.results.errors += 1


class Results:
    """What one scenario measured. Times in seconds."""

    def __init__(self) -> None:
        self.running = True
        self.errors = 0
        self.chunks = 0
        self.latencies: list[float] = []
        self.ttfts: list[float] = []
        self.transits: list[float] = []


def connect(port: int) -> socket.socket:
    """Connected, non-blocking socket."""
    sock = socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setblocking(False)
    return sock


def request_bytes(prompt: Any, stream: bool) -> bytes:
    """One completion request."""
    body = json.dumps({"model": "mock", "prompt": prompt, "max_tokens": 16, "temperature": 0.0, "stream": stream},
                      separators=(",", ":")).encode()  # fmt: skip
    return (
        b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\naccept: application/json\r\naccept-encoding: gzip\r\n"
        b"user-agent: AsyncOpenAI/Python 1.0\r\nauthorization: Bearer EMPTY\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\n\r\n%b" % (len(body), body)
    )


STREAMS = ((64, 6400.0), (1, 100.0), (512, 6400.0))  # clients, events each second over all of them
PROMPT = "The quick brown fox jumps over the lazy dog. " * 45  # about 500 tokens
