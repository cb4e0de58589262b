"""Chaos with real vLLM: two prefill and two decode servers are killed, frozen and restarted at random under load.

The same promises as in test_proxy_chaos.py, which runs on mock servers and in every test run: each request ends with
its whole answer or an error in OpenAI's shape, no stream that was cut ends as if it were complete, and afterwards the
proxy has no descriptor, request or memory left over. pytest does not collect this file: it takes about ten minutes and
10 GiB, most of it for restarts of vLLM.

    python tests/stack/chaos_real.py --minutes 8 --requests 2000

Everything runs on this machine's CPU, with the connector, an LMCache server and a small model built on the spot, on
free ports. Logs go to --run-dir.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / name) for name in ("helpers", "proxy")] + [str(ROOT)]

from launch_harness import LAUNCHER, PACKAGE, REPOSITORY, free_ports
from proxy_harness import ProxyProcess, wait_until
from test_proxy_chaos import Answer, idle

MODEL = "tiny-llama"
REQUEST_S = 120.0  # longest time for one request; all limits of the proxy together are below it
START_S = 300.0  # longest time for a vLLM server to start, four at once and under load
LIMITS = ["--prefill-timeout-s", "20", "--decode-timeout-s", "30", "--stream-idle-timeout-s", "10",
          "--health-interval-s", "1", "--health-timeout-s", "5", "--log-level", "warning"]  # fmt: skip


class Server:
    """One server of the launch script, in a process group of its own, as it would be on a machine of its own."""

    def __init__(self, role: str, name: str, port: int, kv_port: int, model: Path, run_dir: Path) -> None:
        self.role, self.name, self.port = role, name, port
        flag = {"kv-server": "--kv-port"}.get(role, f"--{role}-port")
        self.command = [
            "bash", str(PACKAGE / LAUNCHER), role, "--device=cpu", f"--model={model}", f"--served-model-name={MODEL}",
            "--max-model-len=2048", "--kv-load=always", f"--run-dir={run_dir}", f"--kv-port={kv_port}",
            f"{flag}={port}",
        ]  # fmt: skip
        self.log = run_dir / f"{name}.log"
        self.starts = 0
        self.start()

    def start(self) -> None:
        with self.log.open("a") as out:
            self.process = subprocess.Popen(
                self.command, env={**os.environ, "DISAGG_PREPARED": "1", "DISAGG_PYTHON": sys.executable},
                stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
            )  # fmt: skip
        self.starts += 1

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.process.wait()

    def healthy(self) -> bool:
        if self.process.poll() is not None:
            raise RuntimeError(f"{self.name} ended by itself with {self.process.returncode}; see {self.log}")
        try:
            if self.role == "kv-server":
                socket.create_connection(("127.0.0.1", self.port), timeout=2).close()
                return True
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2) as response:
                return response.status == 200
        except OSError:
            return False


async def one_request(port: int, number: int, rng: random.Random) -> str:
    """Send one request; the way it ended. Raises AssertionError for an end that must not be."""
    stream, tokens = rng.random() < 0.6, rng.choice([1, 8, 40])
    prompt = [rng.randrange(300, 1000) for _ in range(rng.choice([3, 60, 300]))]
    fields = {"model": MODEL, "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "stream": stream}
    if stream:
        fields["stream_options"] = {"include_usage": True}
    body = json.dumps(fields).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nx-request-id: r%d\r\n"
            b"content-length: %d\r\n\r\n%b" % (number, len(body), body)
        )
        answer = Answer()
        if rng.random() < 0.05:  # some clients hang up
            await asyncio.sleep(rng.random())
            return "hung up"
        await answer.read(reader)
    finally:
        writer.transport.abort()
    status, text = answer.parser.get_status_code(), answer.body[-500:]
    if status == 200 and stream:
        events = answer.body.split(b"\n\n")
        assert events.pop() == b"", f"an event was cut: {text}"
        if not answer.complete:
            error = json.loads(events.pop().removeprefix(b"data: "))["error"]
            assert error["request_id"] == f"r{number}", text
            assert b"[DONE]" not in answer.body, text
            return "stream cut, told by the proxy"
        assert events.pop() == b"data: [DONE]", text
        last = json.loads(events.pop().removeprefix(b"data: "))
        if "error" in last:
            return "stream cut, told by vLLM"
        assert last["usage"]["completion_tokens"] == tokens, text
        return "ok"
    assert answer.complete, (status, text)
    value = json.loads(answer.body)
    if status == 200:
        assert value["usage"]["completion_tokens"] == tokens, text
        return "ok"
    error = value["error"]
    assert status >= 500, (status, text)
    assert {"message", "type", "code"} <= set(error), text
    if "stage" not in error:
        return f"error {status} of vLLM"
    assert status in (502, 503, 504), text
    assert error["request_id"] == f"r{number}", text
    return f"error {status} of the proxy"


class Run:
    """Counts of one run."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.ends: collections.Counter[str] = collections.Counter()
        self.troubles: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []
        self.restarts: list[float] = []
        self.one_restart = asyncio.Semaphore(1)

    async def load(self, port: int, count: int, concurrency: int, seconds: float = 0.0) -> None:
        """Send ``count`` requests, or as many as begin within ``seconds``."""
        deadline = time.monotonic() + (seconds or 3600.0)
        numbers = iter(range(count))

        async def client() -> None:
            for number in numbers:
                if time.monotonic() > deadline:
                    return
                try:
                    end = await asyncio.wait_for(one_request(port, number, self.rng), REQUEST_S)
                except (AssertionError, ValueError, KeyError, OSError, TimeoutError, asyncio.TimeoutError) as error:
                    end = "WRONG"
                    self.wrong.append(f"r{number}: {type(error).__name__}: {error}")
                self.ends[end] += 1
                if end not in ("ok", "hung up"):
                    await asyncio.sleep(self.rng.uniform(0.5, 2))  # as a client that tries again would

        await asyncio.gather(*(client() for _ in range(concurrency)))

    async def disturb(self, servers: list[Server]) -> None:
        """Kill and restart, or freeze, one of these servers after the other."""
        while True:
            await asyncio.sleep(self.rng.uniform(2, 10))
            server = self.rng.choice(servers)
            role = server.role
            if self.rng.random() < 0.5:
                self.troubles[f"{role} frozen"] += 1
                server.signal(signal.SIGSTOP)
                try:
                    await asyncio.sleep(self.rng.choice([2, 5, 15, 40]))
                finally:
                    server.signal(signal.SIGCONT)
                continue
            if self.one_restart.locked():
                continue  # starts of vLLM take so long here that most of the time nobody could answer
            async with self.one_restart:
                self.troubles[f"{role} killed and restarted"] += 1
                await asyncio.to_thread(server.kill)
                await asyncio.sleep(self.rng.uniform(0, 5))
                begin = time.monotonic()
                server.start()
                while not await asyncio.to_thread(server.healthy):
                    await asyncio.sleep(0.5)
                self.restarts.append(time.monotonic() - begin)


async def chaos(run: Run, port: int, servers: list[Server], arguments: argparse.Namespace) -> None:
    """Load and trouble together; the trouble ends with the load. Two at work, so that both of a role may be away."""
    trouble = [asyncio.create_task(run.disturb(servers[half::2])) for half in range(2)]
    try:
        await run.load(port, arguments.requests, arguments.concurrency, arguments.minutes * 60)
        for task in trouble:
            if task.done():
                task.result()  # a server that did not come back
    finally:
        for task in trouble:
            task.cancel()
        await asyncio.gather(*trouble, return_exceptions=True)


def told(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def check(arguments: argparse.Namespace, run_dir: Path) -> list[str]:
    """The whole run; what was wrong."""
    from disagg_prefill_lmcache_v1.measure import tiny_model

    model = run_dir / MODEL
    subprocess.run([sys.executable, "-m", tiny_model.__name__, "--output", str(model)], check=True, cwd=REPOSITORY)
    ports = free_ports(5)
    roles = ["kv-server", "prefiller", "prefiller", "decoder", "decoder"]
    servers: list[Server] = []
    proxy = None
    try:
        for number, (role, port) in enumerate(zip(roles, ports, strict=True)):
            servers.append(Server(role, f"{role}-{number}", port, ports[0], model, run_dir))
            if role == "kv-server":  # vLLM does not start without it
                wait_until(servers[0].healthy, "the KV server listens", START_S)
        victims = servers[1:]
        begin = time.monotonic()
        wait_until(lambda: all(server.healthy() for server in victims), "four vLLM servers answer", START_S)
        told(f"four vLLM servers answer after {time.monotonic() - begin:.0f} s; logs: {run_dir}")
        flags = [f for v in victims for f in (f"--{v.role}", f"http://127.0.0.1:{v.port}")]
        proxy = ProxyProcess(*flags, *LIMITS)
        warm_up = Run(arguments.seed)
        asyncio.run(warm_up.load(proxy.port, 4 * arguments.concurrency, arguments.concurrency))
        wait_until(lambda: idle(proxy), "the proxy is idle")
        descriptors, memory = proxy.descriptors(), proxy.resident_bytes()
        told(f"undisturbed: {dict(warm_up.ends)}; proxy: {descriptors} descriptors, {memory / 2**20:.1f} MiB")

        run = Run(arguments.seed + 1)
        begin = time.monotonic()
        asyncio.run(chaos(run, proxy.port, victims, arguments))
        told(f"{sum(run.ends.values())} requests in {time.monotonic() - begin:.0f} s: {dict(run.ends.most_common())}")
        told(f"trouble: {dict(run.troubles)}; restarts took {', '.join(f'{s:.0f}' for s in run.restarts) or 'none'} s")

        for victim in victims:
            victim.signal(signal.SIGCONT)
            if victim.process.poll() is not None:
                victim.start()
        wait_until(lambda: all(victim.healthy() for victim in victims), "all servers are back", START_S)
        wait_until(lambda: idle(proxy), "the proxy is idle", 60)
        after = Run(arguments.seed + 2)
        asyncio.run(after.load(proxy.port, 4 * arguments.concurrency, arguments.concurrency))
        wait_until(lambda: idle(proxy), "the proxy is idle", 60)
        deadline = time.monotonic() + 10  # memory is given back a moment after the last request
        while proxy.resident_bytes() > 1.1 * memory and time.monotonic() < deadline:
            time.sleep(0.1)
        left, grown = proxy.descriptors() - descriptors, proxy.resident_bytes() - memory
        told(f"afterwards: {dict(after.ends)}; descriptors {left:+d}, memory {grown / memory:+.1%}")

        wrong = [*warm_up.wrong, *run.wrong, *after.wrong]
        wrong += [line for line in proxy.messages if "ERROR" in line or "Traceback" in line]
        if left > len(victims):
            wrong.append(f"{left} more descriptors than before")
        if grown > 0.1 * memory:
            wrong.append(f"memory grew by {grown} bytes from {memory}")
        if after.ends["ok"] + after.ends["hung up"] < sum(after.ends.values()):
            wrong.append(f"not all requests are answered after the trouble: {dict(after.ends)}")
        if not run.troubles:
            wrong.append("nothing was disturbed")
        return wrong
    finally:
        if proxy is not None:
            proxy.stop(signal.SIGKILL)
        for server in servers:
            if server.process.poll() is None:
                server.kill()


def main() -> int:
    """Command line entry; exit status 1 if a promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=2000, help="at most so many (default: %(default)s)")
    parser.add_argument("--concurrency", type=int, default=64, help="clients at once (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=8.0, help="no new request after that (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of requests and trouble (default: %(default)s)")
    parser.add_argument("--run-dir", type=Path, help="where logs go (default: a temporary directory)")
    arguments = parser.parse_args()
    run_dir = arguments.run_dir or Path(tempfile.mkdtemp(prefix="chaos-"))
    run_dir.mkdir(parents=True, exist_ok=True)
    wrong = check(arguments, run_dir.resolve())
    for text in wrong:
        print("WRONG:", text[:1000], file=sys.stderr)
    told("FAILED" if wrong else "passed")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
