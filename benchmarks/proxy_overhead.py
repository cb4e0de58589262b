"""What the proxy costs, beside Rust routers, on mock servers.

    python benchmarks/proxy_overhead.py            # everything, about 8 minutes; own set-up included
    python benchmarks/proxy_overhead.py --quick    # one short round, no peers: a check that it works

The proxy under test is pinned to one CPU, as shipped (metrics, access log to a file). Load generator and mock servers
(they are mocks, no model runs) share another CPU, in this process, on raw epoll, so that they cost less than what they
measure. Contenders take turns in every round; the tables show the median over the rounds and, after +-, half of the
distance between the largest and the smallest value. CPU time is user and system time of the whole process tree.
The peers, vllm-router and sglang-router, are installed from PyPI into .venv-bench/ at the top of the repository. nginx
(Debian's package, if it is there) shows the floor: a plain reverse proxy, one hop, to the decode server alone.
Written to --out: results.json, results.txt, results.png (needs matplotlib).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mock_load import (
    DEADLINE_S,
    PROMPT,
    STREAMS,
    Endpoint,
    Listener,
    Loop,
    MockEndpoint,
    Results,
    StreamClient,
    UnaryClient,
    request_bytes,
)
from proxy_contenders import (
    BENCH_VENV,
    NGINX,
    PEERS,
    Contender,
    command_of,
    cpu_seconds,
    free_port,
    peers_ready,
    pin,
    resident_bytes,
)
from proxy_report import machine, percentile, plot, table, targets


class Bench:
    """Load generator and mock servers, and what they measured."""

    def __init__(self, proxy_cpus: set[int], all_cpus: set[int], out: Path) -> None:
        self.loop = Loop()
        self.prefill = Listener(self.loop, "prefill")
        self.decode = Listener(self.loop, "decode")
        self.proxy_cpus = proxy_cpus
        self.all_cpus = all_cpus
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


def arguments_of() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    rivals = (*PEERS, NGINX)
    parser.add_argument("--rounds", type=int, default=5, help="how often each contender runs (default: 5)")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of one measurement (default: 3)")
    parser.add_argument("--peers", default=",".join(rivals), help="peers to run, comma separated; empty for none")
    parser.add_argument("--parts", default="main,open,long,workers", help="parts to run, comma separated")
    parser.add_argument("--out", type=Path, default=None, help="folder for the results (default: a new one in /tmp)")
    parser.add_argument("--plot", type=Path, help="only draw results.png beside this results.json")
    parser.add_argument("--realtime", action="store_true", help="real-time priority, for a busy machine (root only)")
    parser.add_argument("--quick", action="store_true", help="one short round without peers")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.seconds, arguments.peers = 1, 0.5, ""
    arguments.peers = [name for name in arguments.peers.split(",") if name]
    if set(arguments.peers) - set(rivals) or arguments.rounds < 1 or arguments.seconds <= 0:
        parser.error(f"--peers: allowed: {', '.join(rivals)}; --rounds 1 or more; --seconds more than 0")
    if not arguments.plot and len(os.sched_getaffinity(0)) < 2:
        parser.error("two CPUs are needed: one for the proxy, one for the load")
    return arguments


def measure(bench: Bench, names: list[str], arguments: argparse.Namespace) -> None:
    """Run all parts that were asked for."""
    parts, seconds = arguments.parts.split(","), arguments.seconds
    for round_number in range(arguments.rounds if "main" in parts else 0):
        for name in names:
            print(f"round {round_number + 1} of {arguments.rounds}: {name}", flush=True)
            with bench.started(name) as contender:
                for clients in (64, 1, 512):
                    bench.unary(name, contender.port, contender.pid, clients, seconds)
                for clients, rate in STREAMS:
                    bench.stream(name, contender.port, contender.pid, clients, rate, seconds)
        for clients, rate in STREAMS:
            bench.stream("direct", bench.decode.port, 0, clients, rate, seconds / 2)
    for name in names if "open" in parts else ():
        print(f"open streams: {name}", flush=True)
        with bench.started(name) as contender:
            bench.open_streams(name, contender.port, contender.pid, 200 if arguments.quick else 2000)
    for round_number in range(min(arguments.rounds, 3) if "long" in parts else 0):
        print(f"long prompts, round {round_number + 1}", flush=True)
        copy_once(bench, seconds / 2)
        for name in names:
            with bench.started(name) as contender:
                bench.long_prompts(name, contender.port, contender.pid, seconds / 2)
    # Clients, mocks and workers share the same CPUs here: CPU time per request is what tells.
    for round_number in range(min(arguments.rounds, 3) if "workers" in parts else 0):
        for name in ("oursx1", "oursx2"):
            print(f"workers, round {round_number + 1}: {name}", flush=True)
            with bench.started(name, bench.all_cpus) as contender:
                bench.loop.run(time.perf_counter() + 1.0)
                bench.unary(name, contender.port, contender.pid, 64, seconds)


def main() -> int:
    """Command line entry."""
    arguments = arguments_of()
    if arguments.plot:
        found = json.loads(arguments.plot.read_text())
        return 0 if plot(found["rows"], found["machine"], arguments.plot.with_suffix(".png")) else 1
    cpus = sorted(os.sched_getaffinity(0))
    out = arguments.out or Path(tempfile.mkdtemp(prefix="proxy-overhead-"))
    out.mkdir(parents=True, exist_ok=True)
    peers = peers_ready(arguments.peers)
    Contender.realtime = arguments.realtime
    pin({cpus[-1]})
    _raise_descriptor_limit()
    print(machine(), flush=True)
    bench = Bench({cpus[0]}, set(cpus), out)
    measure(bench, ["ours", *peers], arguments)
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
