"""The standing adversary: hostile clients of every kind at once, while honest ones stream through the real proxy."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path

import httptools
import pytest
from proxy_harness import DEADLINE_S, MockThread, ProxyProcess, wait_until

HOSTILE = Path(__file__).resolve().parents[1] / "helpers" / "hostile_clients.py"
KEY = "secret"
CLIENTS, REQUESTS, CHUNKS = 20, 15, 10
HOSTILE_OF_EACH_KIND = 8
ADDED_TTFT_S = 0.050
ROUNDS = 20  # the best of each kind counts: what else runs on the machine, or is left of a round, can only add
MEMORY_BYTES = 150 << 20  # for 112 hostile connections
TIMEOUT_S = 4.0


class HostileProcess:
    """Hostile clients in a process of their own."""

    def __init__(self, port: int) -> None:
        command = [sys.executable, str(HOSTILE), str(port), KEY, str(HOSTILE_OF_EACH_KIND)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout.readline() == "at work\n"

    def stop(self) -> dict[str, int]:
        """End them; how many connections of each kind there were."""
        told, _ = self.process.communicate(timeout=DEADLINE_S)
        return json.loads(told)


class Answer:
    """Parser of one streamed answer; ``first`` is when its first event came."""

    def __init__(self) -> None:
        self.parser = httptools.HttpResponseParser(self)
        self.body = b""
        self.first = 0.0
        self.complete = False

    def on_body(self, body: bytes) -> None:
        self.first = self.first or time.perf_counter()
        self.body += body

    def on_message_complete(self) -> None:
        self.complete = True


async def honest(port: int) -> list[float]:
    """Times to the first event of one client's requests. Raises AssertionError if any of them fails."""
    body = json.dumps({"prompt": "x" * 2000, "stream": True}).encode()
    request = (
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nauthorization: Bearer %b\r\n"
        b"x-mock: decode.chunks=%d;decode.gap=0.01\r\ncontent-length: %d\r\n\r\n%b"
        % (KEY.encode(), CHUNKS, len(body), body)
    )
    times = []
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for _ in range(REQUESTS):
            answer = Answer()
            begin = time.perf_counter()
            writer.write(request)
            while not answer.complete:
                data = await asyncio.wait_for(reader.read(65536), DEADLINE_S)
                assert data, "the connection of an honest client ended"
                answer.parser.feed_data(data)
            assert answer.parser.get_status_code() == 200
            assert answer.body.count(b"data: ") == CHUNKS + 1
            assert answer.body.endswith(b"data: [DONE]\n\n")
            times.append(answer.first - begin)
    finally:
        writer.close()
    return times


async def honest_ones(port: int) -> float:
    """The 99th percentile of their times to the first event, seconds."""
    times = sorted(t for found in await asyncio.gather(*(honest(port) for _ in range(CLIENTS))) for t in found)
    return times[int(len(times) * 0.99)]


def test_hostile_clients_do_not_hurt_honest_ones() -> None:
    mocks = MockThread()
    (prefill_port, prefill), (decode_port, decode) = mocks.add("prefill"), mocks.add("decode")
    flags = (
        "--prefiller-port", str(prefill_port), "--decoder-port", str(decode_port), "--client-timeout-s", str(TIMEOUT_S),
        "--stream-idle-timeout-s", str(TIMEOUT_S), "--max-body-bytes", str(64 << 20),
    )  # fmt: skip
    proxy, other = (ProxyProcess(*flags, env={"DISAGG_PROXY_API_KEY": KEY}) for _ in range(2))
    try:
        asyncio.run(honest_ones(proxy.port))  # memory and connections as they are in use
        memory, descriptors = proxy.resident_bytes(), proxy.descriptors()
        rounds, peak = [], 0
        for _ in range(ROUNDS):
            times = []
            for attacked in (other, proxy):  # the machine's work is the same
                hostile = HostileProcess(attacked.port)
                try:
                    times.append(asyncio.run(honest_ones(proxy.port)))
                    peak = max(peak, proxy.resident_bytes())
                finally:
                    attempts = hostile.stop()
                assert min(attempts.values()) >= HOSTILE_OF_EACH_KIND, attempts
            rounds.append(times)
            alone, beside = map(min, zip(*rounds, strict=True))
            if beside - alone < ADDED_TTFT_S:
                break
        else:
            pytest.fail(f"p99 of TTFT in s, beside hostile clients of another proxy and of this one: {rounds}")
        assert peak - memory < MEMORY_BYTES, f"{(peak - memory) >> 20} MiB"
        wait_until(lambda: proxy.descriptors() <= descriptors, "descriptors are back")
        wait_until(lambda: proxy.resident_bytes() < 1.15 * memory, f"memory is back at {memory >> 20} MiB")
        asked = {r["path"] for state in (prefill, decode) for r in state.requests}
        assert asked == {"/v1/completions", "/health"}
        assert proxy.messages[1:] == []
    finally:
        proxy.stop()
        other.stop()
        mocks.close()
