"""What the proxy costs, beside Rust routers, on mock servers.

    python benchmarks/proxy_overhead.py            # everything, about 8 minutes; own set-up included
    python benchmarks/proxy_overhead.py --quick    # one short round, no peers: a check that it works

The proxy under test is pinned to one CPU, as shipped (metrics, access log to a file). Load generator and mock servers
(they are mocks, no model runs) share another CPU, in this process, on raw epoll, so that they cost less than what they
measure. Contenders take turns in every round; the tables show the median over the rounds and, after +-, half of the
distance between the largest and the smallest value. CPU time is user and system time of the whole process tree.
The peers, vllm-router and sglang-router, are installed from PyPI into .venv-bench/ at the top of the repository.
Written to --out: results.json, results.txt, results.png (needs matplotlib).
"""

from __future__ import annotations

import argparse
import contextlib
import heapq
import json
import os
import platform
import re
import select
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
PROXY = REPOSITORY / "disagg_prefill_lmcache_v1" / "disagg_proxy_server.py"
BENCH_VENV = REPOSITORY / ".venv-bench"
PEERS = {"vllm-router": "vllm-router==0.1.17", "sglang-router": "sglang-router==0.3.2"}
PLOTTER = "matplotlib==3.11.2"
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


# -- processes


def tree(pid: int) -> list[int]:
    """A process and its descendants."""
    found = [pid]
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children") as file:
                for child in file.read().split():
                    found += tree(int(child))
    return found


def cpu_seconds(pid: int) -> float:
    """User and system time of a process tree, all threads, to the nanosecond."""
    total = 0
    for each in tree(pid):
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{each}/task"):
                with contextlib.suppress(OSError), open(f"/proc/{each}/task/{task}/schedstat") as file:
                    total += int(file.read().split()[0])
    return total / 1e9


def resident_bytes(pid: int) -> int:
    """Resident memory of a process tree."""
    total = 0
    for each in tree(pid):
        with contextlib.suppress(OSError), open(f"/proc/{each}/statm") as file:
            total += int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return total


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def pin(cpus: set[int]) -> None:
    """Keep this process on these CPUs; with --realtime, also ahead of whatever else the machine does."""
    os.sched_setaffinity(0, cpus)
    if Contender.realtime:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))


class Contender:
    """A proxy under test as a process pinned to some CPUs."""

    realtime = False

    def __init__(self, name: str, command: list[str], port: int, cpus: set[int], log: Path) -> None:
        self.name = name
        self.port = port
        with open(log, "wb") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=file, start_new_session=True, preexec_fn=lambda: pin(cpus)
            )

    @property
    def pid(self) -> int:
        """Root of the process tree."""
        return self.process.pid

    def stop(self) -> None:
        """End the process tree."""
        with contextlib.suppress(OSError):
            os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(OSError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def command_of(name: str, port: int, prefill: int, decode: int) -> list[str]:
    """How a contender is started."""
    servers = (f"http://127.0.0.1:{prefill}", f"http://127.0.0.1:{decode}")
    if name.startswith("ours"):
        workers = name.partition("x")[2] or "1"
        return [sys.executable, str(PROXY), "--port", str(port), "--prefiller", servers[0], "--decoder", servers[1],
                "--workers", workers]  # fmt: skip
    program = str(BENCH_VENV / "bin" / name)
    common = ["--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(free_port())]
    common += ["--prefill", servers[0], "--decode", servers[1], "--policy", "round_robin"]
    if name == "vllm-router":
        return [program, "--vllm-pd-disaggregation", "--kv-connector", "nixl", *common]
    return [program, "launch", "--pd-disaggregation", *common]


def peers_ready(names: list[str]) -> list[str]:
    """Install the peers if needed; those that can be started."""
    if not names:
        return []
    missing = [name for name in names if not (BENCH_VENV / "bin" / name).exists()]
    if not list(BENCH_VENV.glob("lib/python*/site-packages/matplotlib")):
        missing.append("matplotlib")
    if missing:
        print(f"installing {', '.join(missing)} into {BENCH_VENV} ...", flush=True)
        if not (BENCH_VENV / "bin" / "python").exists():
            venv.create(BENCH_VENV, with_pip=True)
        command = [str(BENCH_VENV / "bin" / "python"), "-m", "pip", "install", "--quiet"]
        for name in missing:
            subprocess.run([*command, PEERS.get(name, PLOTTER)], check=False)
    found = [name for name in names if (BENCH_VENV / "bin" / name).exists()]
    for name in set(names) - set(found):
        print(f"{name} could not be installed and is left out", flush=True)
    return found


# -- scenarios


class Bench:
    """Load generator and mock servers, and what they measured."""

    def __init__(self, proxy_cpus: set[int], out: Path) -> None:
        self.loop = Loop()
        self.prefill = Listener(self.loop, "prefill")
        self.decode = Listener(self.loop, "decode")
        self.proxy_cpus = proxy_cpus
        self.out = out
        self.rows: dict[str, dict[str, list[float]]] = {}

    def note(self, contender: str, measure: str, value: float) -> None:
        """Keep one value."""
        self.rows.setdefault(contender, {}).setdefault(measure, []).append(value)

    @contextlib.contextmanager
    def started(self, name: str, cpus: set[int] | None = None) -> Iterator[Contender]:
        """A contender that answers requests."""
        port = free_port()
        command = command_of(name, port, self.prefill.port, self.decode.port)
        contender = Contender(name, command, port, cpus or self.proxy_cpus, self.out / f"{name}.log")
        try:
            deadline = time.perf_counter() + DEADLINE_S
            request = request_bytes("warm up", False)
            while True:
                results = Results()
                with contextlib.suppress(OSError):
                    results.running = False
                    client = UnaryClient(self.loop, port, request, results)
                    limit = time.perf_counter() + 2
                    self.loop.run(limit, lambda r=results, c=client: bool(r.latencies) or c.closed)
                    client.close()
                    if results.latencies and not results.errors:
                        break
                if contender.process.poll() is not None or time.perf_counter() > deadline:
                    raise RuntimeError(f"{name} does not answer; see {self.out / (name + '.log')}")
                self.loop.run(time.perf_counter() + 0.2)
            yield contender
        finally:
            contender.stop()
            self.loop.run(time.perf_counter() + 0.1)

    def load(
        self, kind: type[UnaryClient] | type[StreamClient], port: int, pid: int, clients: int, seconds: float,
        request: bytes, warm_up: float = 0.5,
    ) -> tuple[Results, float, float]:  # fmt: skip
        """Run clients; results, seconds and CPU seconds of the measured part."""
        results = Results()
        begin = time.perf_counter()
        made: list[Endpoint] = []

        def add() -> None:
            made.append(kind(self.loop, port, request, results))

        spread = MockEndpoint.gap * MockEndpoint.chunks if kind is StreamClient else 0.0
        for number in range(clients):
            self.loop.at(begin + spread * number / clients, add)
        self.loop.run(begin + warm_up + spread, None)
        results.latencies.clear()
        results.ttfts.clear()
        results.transits.clear()
        results.chunks = 0
        begin, cpu = time.perf_counter(), cpu_seconds(pid) if pid else 0.0
        self.loop.run(begin + seconds)
        elapsed, cpu = time.perf_counter() - begin, (cpu_seconds(pid) if pid else 0.0) - cpu
        results.running = False
        measured = Results()
        measured.__dict__.update({k: list(v) if isinstance(v, list) else v for k, v in results.__dict__.items()})
        for endpoint in made:
            endpoint.close()
        self.loop.run(time.perf_counter() + 0.1)
        return measured, elapsed, cpu

    def unary(self, name: str, port: int, pid: int, clients: int, seconds: float) -> None:
        """Non-streamed requests, each client one at a time."""
        results, elapsed, cpu = self.load(UnaryClient, port, pid, clients, seconds, request_bytes(PROMPT, False))
        count = len(results.latencies)
        self.note(name, f"unary {clients}: errors", results.errors)
        self.note(name, f"unary {clients}: requests/s", count / elapsed)
        self.note(name, f"unary {clients}: p50 ms", percentile(results.latencies, 50) * 1e3)
        self.note(name, f"unary {clients}: p99 ms", percentile(results.latencies, 99) * 1e3)
        if pid:
            self.note(name, f"unary {clients}: CPU us/request", cpu / max(count, 1) * 1e6)

    def stream(self, name: str, port: int, pid: int, clients: int, rate: float, seconds: float) -> None:
        """Streams; ``rate`` events each second over all of them."""
        MockEndpoint.gap = clients / rate
        MockEndpoint.chunks = 20 if clients in (1, 512) else 60
        results, _, cpu = self.load(StreamClient, port, pid, clients, seconds, request_bytes(PROMPT, True))
        self.note(name, f"stream {clients}: errors", results.errors)
        for label, values in (("TTFT", results.ttfts), ("event delay", results.transits)):
            self.note(name, f"stream {clients}: {label} p50 ms", percentile(values, 50) * 1e3)
            self.note(name, f"stream {clients}: {label} p99 ms", percentile(values, 99) * 1e3)
        self.note(name, f"stream {clients}: events/s", results.chunks / seconds)
        if pid:
            self.note(name, f"stream {clients}: CPU us/event", cpu / max(results.chunks, 1) * 1e6)

    def open_streams(self, name: str, port: int, pid: int, count: int) -> None:
        """Memory of streams that are open, with an event now and then."""
        MockEndpoint.gap, MockEndpoint.chunks = 2.0, 1000
        before = resident_bytes(pid)
        results = Results()
        request = request_bytes(PROMPT, True)
        clients: list[StreamClient] = []
        begin = time.perf_counter()
        for number in range(count):
            self.loop.at(begin + 2.0 * number / count,
                         lambda: clients.append(StreamClient(self.loop, port, request, results)))  # fmt: skip
        self.loop.run(begin + 30, lambda: len(results.ttfts) >= count or results.errors > 0)
        self.loop.run(time.perf_counter() + 3)
        self.note(name, f"{count} open streams: errors", results.errors + count - len(results.ttfts))
        self.note(name, f"{count} open streams: kB each", (resident_bytes(pid) - before) / count / 1000)
        for client in clients:
            client.close()
        self.loop.run(time.perf_counter() + 0.5)

    def long_prompts(self, name: str, port: int, pid: int, seconds: float) -> None:
        """CPU time of requests with long prompts."""
        for label, prompt in long_prompt_cases():
            request = request_bytes(prompt, False)
            results, _, cpu = self.load(UnaryClient, port, pid, 4, seconds, request)
            self.note(name, f"{label}: errors", results.errors)
            self.note(name, f"{label}: CPU us/request", cpu / max(len(results.latencies), 1) * 1e6)


def long_prompt_cases() -> list[tuple[str, Any]]:
    """Prompts of 32k and 128k tokens, as text and as token ids."""
    text = "The quick brown fox jumps over the lazy dog.\\n "
    cases = []
    for thousands in (32, 128):
        count = thousands * 1024
        cases.append((f"{thousands}k text", (text * (count * 4 // len(text) + 1))[: count * 4]))
        cases.append((f"{thousands}k ids", [(n * 7919) % 128_000 for n in range(count)]))
    return cases


def copy_once(bench: Bench, seconds: float) -> None:
    """CPU time of reading the same bytes from a socket and writing them to another one, once, and nothing else."""
    for label, prompt in long_prompt_cases():
        request = request_bytes(prompt, False)
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        code = (
            "import os,socket,sys\n"
            f"os.sched_setaffinity(0, {bench.proxy_cpus!r})\n"
            f"a=socket.create_connection(('127.0.0.1',{listener.getsockname()[1]}))\n"
            f"b=socket.create_connection(('127.0.0.1',{bench.prefill.port}))\n"
            f"size={len(request)}\n"
            "buffer=memoryview(bytearray(262144))\n"
            "while True:\n"
            "    left=size\n"
            "    while left:\n"
            "        n=a.recv_into(buffer)\n"
            "        if not n: sys.exit()\n"
            "        b.sendall(buffer[:n]); left-=n\n"
            "    a.sendall(b.recv(65536))\n"
        )
        process = subprocess.Popen([sys.executable, "-c", code])
        sock, _ = listener.accept()
        listener.close()
        sock.setblocking(False)
        results = Results()

        class Client(UnaryClient):
            def __init__(self, loop: Loop, sock: socket.socket, request: bytes, results: Results) -> None:
                Endpoint.__init__(self, loop, sock)
                self.request, self.results, self.buffer = request, results, b""
                self.go()

        client = Client(bench.loop, sock, request, results)
        bench.loop.run(time.perf_counter() + 0.3)
        before, cpu = len(results.latencies), cpu_seconds(process.pid)
        bench.loop.run(time.perf_counter() + seconds)
        count, cpu = len(results.latencies) - before, cpu_seconds(process.pid) - cpu
        client.close()
        process.kill()
        process.wait()
        bench.note("read and write once", f"{label}: CPU us/request", cpu / max(count, 1) * 1e6)


# -- report


def percentile(values: list[float], percent: float) -> float:
    """Percentile by nearest rank; NaN without values."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * percent / 100), len(ordered) - 1)]


def machine() -> str:
    """The machine in words."""
    model = platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return f"{model}, {os.cpu_count()} CPUs, Linux {platform.release()}, Python {platform.python_version()}"


def table(rows: dict[str, dict[str, list[float]]]) -> str:
    """All measures, one column for each contender."""
    names = list(rows)
    measures = list(dict.fromkeys(measure for row in rows.values() for measure in row))
    width = max(map(len, measures)) + 2
    lines = ["".ljust(width) + "".join(name.rjust(22) for name in names)]
    for measure in measures:
        cells = []
        for name in names:
            values = rows[name].get(measure)
            if not values:
                cells.append("-")
                continue
            spread = (max(values) - min(values)) / 2
            cells.append(f"{statistics.median(values):.4g}" + (f" +-{spread:.2g}" if len(values) > 1 else ""))
        lines.append(measure.ljust(width) + "".join(cell.rjust(22) for cell in cells))
    return "\n".join(lines)


def targets(rows: dict[str, dict[str, list[float]]]) -> str:
    """How the proxy stands against the aims."""

    def ratio(measure: str) -> float:
        try:
            return statistics.median(rows["ours"][measure]) / statistics.median(rows["vllm-router"][measure])
        except (KeyError, ZeroDivisionError, statistics.StatisticsError):
            return float("nan")

    lines = [
        f"requests/s at 64 clients against vllm-router: {ratio('unary 64: requests/s'):.2f} (aim: 1.25 or more)",
        f"CPU per request at 64 clients against vllm-router: {ratio('unary 64: CPU us/request'):.2f}",
        f"CPU per event at 64 streams against vllm-router: {ratio('stream 64: CPU us/event'):.2f} (aim: 0.90 or less)",
    ]
    for clients in (64, 512):
        found = ratio(f"stream {clients}: TTFT p99 ms")
        lines.append(f"TTFT p99 at {clients} streams against vllm-router: {found:.2f} (aim: 1.00 or less)")
    once = rows.get("read and write once", {})
    for measure, values in once.items():
        mine = rows.get("ours", {}).get(measure)
        if mine and statistics.median(values):
            found = statistics.median(mine) / statistics.median(values)
            lines.append(f"{measure} against reading and writing once: {found:.2f} (aim: 1.50 or less)")
    return "\n".join(lines)


def plot(rows: dict[str, dict[str, list[float]]], where: str, path: Path) -> bool:
    """Bar charts of the main measures; False if matplotlib is not there."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [name for name in ("ours", *PEERS) if name in rows]
    measures = ["unary 64: requests/s", "unary 64: CPU us/request", "stream 64: CPU us/event",
                "stream 64: TTFT p99 ms", "stream 512: TTFT p99 ms", "stream 512: event delay p99 ms"]  # fmt: skip
    figure, axes = pyplot.subplots(2, 3, figsize=(12, 6))
    for axis, measure in zip(axes.flat, measures, strict=True):
        values = [rows[name].get(measure, [0.0]) for name in names]
        middles = [statistics.median(v) for v in values]
        errors = [[m - min(v) for m, v in zip(middles, values, strict=True)],
                  [max(v) - m for m, v in zip(middles, values, strict=True)]]  # fmt: skip
        axis.bar(names, middles, yerr=errors, color=["#2a7", "#888", "#bbb"][: len(names)], capsize=4)
        axis.set_title(measure, fontsize=10)
    figure.suptitle(f"Proxy on one CPU, mock servers ({where})", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    return True


def main() -> int:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="how often each contender runs (default: 5)")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of one measurement (default: 3)")
    parser.add_argument("--peers", default=",".join(PEERS), help="peers to run, comma separated; empty for none")
    parser.add_argument("--parts", default="main,open,long,workers", help="parts to run, comma separated")
    parser.add_argument("--out", type=Path, default=None, help="folder for the results (default: a new one in /tmp)")
    parser.add_argument("--plot", type=Path, help="only draw results.png beside this results.json")
    parser.add_argument("--realtime", action="store_true", help="real-time priority, for a busy machine (root only)")
    parser.add_argument("--quick", action="store_true", help="one short round without peers")
    arguments = parser.parse_args()
    if arguments.plot:
        found = json.loads(arguments.plot.read_text())
        return 0 if plot(found["rows"], found["machine"], arguments.plot.with_suffix(".png")) else 1
    if arguments.quick:
        arguments.rounds, arguments.seconds, arguments.peers = 1, 0.5, ""
    unknown = set(filter(None, arguments.peers.split(","))) - set(PEERS)
    if unknown or arguments.rounds < 1 or arguments.seconds <= 0:
        parser.error(f"--peers: allowed: {', '.join(PEERS)}; --rounds 1 or more; --seconds more than 0")
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        parser.error("two CPUs are needed: one for the proxy, one for the load")
    out = arguments.out or Path(tempfile.mkdtemp(prefix="proxy-overhead-"))
    out.mkdir(parents=True, exist_ok=True)
    peers = peers_ready([name for name in arguments.peers.split(",") if name])
    parts = arguments.parts.split(",")
    Contender.realtime = arguments.realtime
    pin({cpus[-1]})
    _raise_descriptor_limit()
    bench = Bench({cpus[0]}, out)
    seconds = arguments.seconds
    print(machine(), flush=True)
    for round_number in range(arguments.rounds if "main" in parts else 0):
        for name in ["ours", *peers]:
            print(f"round {round_number + 1} of {arguments.rounds}: {name}", flush=True)
            with bench.started(name) as contender:
                for clients in (64, 1, 512):
                    bench.unary(name, contender.port, contender.pid, clients, seconds)
                for clients, rate in STREAMS:
                    bench.stream(name, contender.port, contender.pid, clients, rate, seconds)
        for clients, rate in STREAMS:
            bench.stream("direct", bench.decode.port, 0, clients, rate, seconds / 2)
    if "open" in parts:
        for name in ["ours", *peers]:
            print(f"open streams: {name}", flush=True)
            with bench.started(name) as contender:
                bench.open_streams(name, contender.port, contender.pid, 200 if arguments.quick else 2000)
    if "long" in parts:
        for round_number in range(min(arguments.rounds, 3)):
            print(f"long prompts, round {round_number + 1}", flush=True)
            copy_once(bench, seconds / 2)
            for name in ["ours", *peers]:
                with bench.started(name) as contender:
                    bench.long_prompts(name, contender.port, contender.pid, seconds / 2)
    if "workers" in parts:
        # Clients, mocks and workers share the same CPUs here: CPU time per request is what tells.
        for round_number in range(min(arguments.rounds, 3)):
            for name in ("oursx1", "oursx2"):
                print(f"workers, round {round_number + 1}: {name}", flush=True)
                with bench.started(name, set(cpus)) as contender:
                    bench.loop.run(time.perf_counter() + 1.0)
                    bench.unary(name, contender.port, contender.pid, 64, seconds)
    text = f"{machine()}\n\n{table(bench.rows)}\n\n{targets(bench.rows)}\n"
    print("\n" + text)
    (out / "results.txt").write_text(text)
    (out / "results.json").write_text(json.dumps({"machine": machine(), "peers": PEERS, "rows": bench.rows}, indent=1))
    drawn = False
    if (BENCH_VENV / "bin" / "python").exists():  # matplotlib is there, not beside the proxy
        command = [str(BENCH_VENV / "bin" / "python"), __file__, "--plot", str(out / "results.json")]
        drawn = subprocess.run(command, check=False).returncode == 0
    print(f"written to {out}" + ("" if drawn else " (no plot: matplotlib could not be used)"))
    return 0


def _raise_descriptor_limit() -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 65536) if hard > 0 else 65536, hard))
    if min(hard, 65536) < 10_000:
        print(f"descriptor limit {soft}: the test of open streams may fail", flush=True)


if __name__ == "__main__":
    sys.exit(main())
