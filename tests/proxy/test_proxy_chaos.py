"""Chaos: mock servers are killed, frozen and restarted at random while clients go on; nothing may hang or leak."""

from __future__ import annotations

import asyncio
import json
import random
import re
import signal
import subprocess
import sys
import time

import httptools
import httpx
from proxy_harness import DEADLINE_S, MOCK, ProxyProcess, wait_until

REQUESTS = 2000
CONCURRENCY = 64
LIMIT_S = 240.0  # for the load; about 15 s on two free cores


class MockProcess:
    """A mock server as a process that can be killed, frozen and started again on its port."""

    def __init__(self, role: str) -> None:
        self.role = role
        self.port = 0
        self.start()

    def start(self) -> None:
        command = [sys.executable, str(MOCK), "--port", str(self.port), "--role", self.role, "--forget"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        line = self.process.stdout.readline().decode()
        self.port = int(re.search(r"listening on (\d+)", line)[1])

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


class Answer:
    """Parser of one answer."""

    def __init__(self) -> None:
        self.parser = httptools.HttpResponseParser(self)
        self.body = b""
        self.headers: dict[bytes, bytes] = {}
        self.complete = False

    async def read(self, reader: asyncio.StreamReader) -> None:
        """Until it is complete or cut."""
        while not self.complete and (data := await reader.read(65536)):
            self.parser.feed_data(data)

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.lower()] = value

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.complete = True


async def one_request(port: int, number: int, rng: random.Random) -> str:
    """Send one request; the way it ended. Raises AssertionError for an end that must not be."""
    stream = rng.random() < 0.6
    chunks = rng.choice([1, 5, 40])
    # Each another, for what servers die of twice is refused; at its end, for the proxy remembers how prompts begin.
    prompt = "x" * rng.choice([1, 500, 20_000]) + f":{number}"
    body = json.dumps({"prompt": prompt, "stream": stream}).encode()
    gap, delay, size = rng.choice([0, 0.005, 0.03]), rng.choice([0, 0.1]), rng.choice([5, 3000])
    mock = f"decode.chunks={chunks};decode.gap={gap};delay={delay};size={size}"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nx-request-id: r%d\r\n"
            b"x-mock: %b\r\ncontent-length: %d\r\n\r\n%b" % (number, mock.encode(), len(body), body)
        )
        answer = Answer()
        if rng.random() < 0.05:  # some clients hang up
            await asyncio.sleep(rng.random() * 0.05)
            return "hung_up"
        await answer.read(reader)
    finally:
        writer.transport.abort()
    status = answer.parser.get_status_code()
    event_stream = answer.headers.get(b"content-type", b"").startswith(b"text/event-stream")
    if status == 200 and stream:
        assert event_stream
        events = answer.body.split(b"\n\n")
        assert events.pop() == b"", "an event was cut"
        if answer.complete:
            assert events.pop() == b"data: [DONE]"
            assert len(events) == chunks
            return "ok"
        assert "error" in json.loads(events.pop().removeprefix(b"data: "))
        assert b"[DONE]" not in answer.body
        return "cut"
    assert answer.complete
    if status == 200:
        assert json.loads(answer.body)["choices"]
        return "ok"
    error = json.loads(answer.body)["error"]
    assert status in (502, 503, 504), (status, answer.body)
    assert error["request_id"] == f"r{number}"
    return f"error {status}"


def test_chaos() -> None:
    mocks = [MockProcess(role) for role in ("prefill", "prefill", "decode", "decode")]
    names = {"prefill": "--prefiller", "decode": "--decoder"}
    flags = [flag for mock in mocks for flag in (names[mock.role], f"http://127.0.0.1:{mock.port}")]
    limits = ["--prefill-timeout-s", "0.4", "--decode-timeout-s", "0.8", "--stream-idle-timeout-s", "0.8",
              "--health-interval-s", "0.2", "--health-timeout-s", "0.5", "--log-level", "error"]  # fmt: skip
    proxy = None
    try:
        proxy = ProxyProcess(*flags, *limits)
        asyncio.run(load(proxy.port, 300, 1, None))  # memory and connections as they are in use
        wait_until(lambda: idle(proxy), "the proxy is idle")
        descriptors, memory = proxy.descriptors(), proxy.resident_bytes()
        ends = asyncio.run(load(proxy.port, REQUESTS, 2, mocks))
        assert sum(ends.values()) == REQUESTS
        assert ends["ok"] > REQUESTS / 2, ends
        assert len(ends) > 2, f"nothing was disturbed: {ends}"
        wait_until(
            lambda: idle(proxy) and proxy.descriptors() <= descriptors + len(mocks), "all descriptors are closed"
        )
        wait_until(lambda: proxy.resident_bytes() < 1.1 * memory, f"memory is back at {memory} bytes")
        assert asyncio.run(load(proxy.port, 100, 3, None))["ok"] > 80
        assert proxy.messages[1:] == [], "something failed inside the proxy"
    finally:
        if proxy is not None:
            proxy.stop(signal.SIGKILL)
        for mock in mocks:
            mock.process.send_signal(signal.SIGCONT)
            mock.kill()


def idle(proxy: ProxyProcess) -> bool:
    """Whether no request is in progress; of the kept connections only those of the health checks are left."""
    text = httpx.get(proxy.url + "/metrics", timeout=DEADLINE_S).text
    values = re.findall(r"^disagg_(in_flight|upstream_idle_connections)\{.*\} (\S+)$", text, re.MULTILINE)
    return bool(values) and all(float(value) <= (name == "upstream_idle_connections") for name, value in values)


async def load(port: int, count: int, seed: int, mocks: list[MockProcess] | None) -> dict[str, int]:
    """Send requests, and disturb the mocks if given; how many ended in which way."""
    rng = random.Random(seed)
    numbers = iter(range(count))
    ends: dict[str, int] = {}
    deadline = time.monotonic() + LIMIT_S

    async def client() -> None:
        for number in numbers:
            end = await asyncio.wait_for(one_request(port, number, rng), deadline - time.monotonic())
            ends[end] = ends.get(end, 0) + 1
            if end in ("error 502", "error 503"):  # refused at once: without a pause they would soon be all the load
                await asyncio.sleep(0.1)

    async def disturb(victims: list[MockProcess]) -> None:
        while True:
            mock = rng.choice(victims)
            if rng.random() < 0.6:
                await asyncio.to_thread(mock.kill)
                await asyncio.sleep(rng.random() * 0.5)
                await asyncio.to_thread(mock.start)
            else:
                mock.process.send_signal(signal.SIGSTOP)
                await asyncio.sleep(rng.random() * 1.5)
                mock.process.send_signal(signal.SIGCONT)
            await asyncio.sleep(rng.random() * 0.3)

    # Two at work, so that at times both servers of a role are away.
    trouble = [asyncio.create_task(disturb(mocks[half::2])) for half in range(2)] if mocks else []
    try:
        await asyncio.gather(*(client() for _ in range(CONCURRENCY)))
    finally:
        for task in trouble:
            task.cancel()
        await asyncio.gather(*trouble, return_exceptions=True)
        for mock in mocks or []:
            mock.process.send_signal(signal.SIGCONT)
            if mock.process.poll() is not None:
                mock.start()
    return ends
