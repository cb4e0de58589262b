"""A server that is to be stopped: its requests are counted, and waited for."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn
from launch_harness import free_ports, wait_until

from disagg_prefill_lmcache_v1.kv.in_flight import PATH, CountRequests
from disagg_prefill_lmcache_v1.launch import drain

ROOT = Path(__file__).resolve().parents[2]


class Held:
    """An application whose answers are held, as those of the prefill server are for their KV, until they are let go."""

    def __init__(self) -> None:
        self.let_go = asyncio.Event()
        self.begun = 0

    async def __call__(self, scope, receive, send) -> None:
        if scope["method"] == "POST":
            self.begun += 1
            await self.let_go.wait()
            if scope["path"] == "/fails":
                raise RuntimeError("on purpose")
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})


class Serving:
    """It behind the counter, in a thread."""

    def __init__(self) -> None:
        self.held = Held()
        config = uvicorn.Config(CountRequests(self.held), port=0, log_level="critical", lifespan="off")
        self.server = uvicorn.Server(config)
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        self.loop.run_until_complete(self.server.serve(sockets=[self.socket]))

    def let_go(self) -> None:
        self.loop.call_soon_threadsafe(self.held.let_go.set)


@pytest.fixture
def serving() -> Iterator[Serving]:
    each = Serving()
    each.thread.start()
    wait_until(lambda: each.server.started, "the server listens")
    yield each
    each.let_go()
    each.server.should_exit = True
    each.thread.join(30)
    each.socket.close()


def ask(url: str, path: str = "/v1/completions") -> threading.Thread:
    def post() -> None:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(urllib.request.Request(url + path, data=b"{}"), timeout=60).read()

    thread = threading.Thread(target=post, daemon=True)
    thread.start()
    return thread


def test_requests_are_counted_until_their_answers_are_out(serving: Serving) -> None:
    assert drain.PATH == PATH
    assert drain.in_flight(serving.url) == 0
    with urllib.request.urlopen(f"{serving.url}/health", timeout=30) as answer:
        assert answer.read() == b"ok"
    clients = [ask(serving.url), ask(serving.url, "/fails")]
    wait_until(lambda: serving.held.begun == 2, "both requests have begun")
    assert drain.in_flight(serving.url) == 2
    serving.let_go()
    for client in clients:
        client.join(30)
    wait_until(lambda: drain.in_flight(serving.url) == 0, "nothing is in progress, not even what failed")


def test_draining_waits_for_what_is_held_and_no_longer(serving: Serving) -> None:
    client = ask(serving.url)
    wait_until(lambda: serving.held.begun == 1, "the request has begun")
    command = [sys.executable, "-m", "disagg_prefill_lmcache_v1.launch.drain", "--url", serving.url, "--settle", "0"]
    with subprocess.Popen([*command, "--limit", "60"], cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == f"drain: {serving.url}: 1 requests in progress\n"
        assert process.poll() is None
        serving.let_go()
        assert process.wait(30) == 0
    client.join(30)
    assert not client.is_alive()


def test_draining_has_an_end(serving: Serving, capsys: pytest.CaptureFixture[str]) -> None:
    ask(serving.url)
    wait_until(lambda: serving.held.begun == 1, "the request has begun")
    assert drain.main(["--url", serving.url, "--settle", "0", "--limit", "0"]) == 1
    assert "1 requests in progress" in capsys.readouterr().err


def test_a_server_that_is_gone_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(drain, "_PAUSE_S", 0.01)
    url = f"http://127.0.0.1:{free_ports(1)[0]}"
    begin = time.monotonic()
    assert drain.main(["--url", url, "--settle", "0"]) == 1
    assert time.monotonic() - begin < 60
    assert "it does not tell" in capsys.readouterr().err


def test_without_a_url_it_only_waits(capsys: pytest.CaptureFixture[str]) -> None:
    assert drain.main(["--settle", "0.01"]) == 0
    assert drain.main(["--url", "nowhere"]) == 2
    assert capsys.readouterr().err == "drain: error: --url 'nowhere': allowed: http://HOST:PORT\n"


SERVER = """
import asyncio, sys
import uvicorn
from disagg_prefill_lmcache_v1.kv.in_flight import CountRequests

async def app(scope, receive, send):
    if scope["method"] == "POST":
        await asyncio.sleep(1)
    body = b'{"choices": [], "usage": {}}'
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})

uvicorn.run(CountRequests(app), port=int(sys.argv[1]), log_level="critical", lifespan="off")
"""


def test_scaling_down_behind_the_proxy_loses_no_request(tmp_path: Path) -> None:
    """A decode server leaves the upstreams file, is drained, then killed, under load; every request is answered."""
    prefiller, first, second, port = free_ports(4)
    members = tmp_path / "upstreams.json"

    def say(*decoders: int) -> None:
        urls = [f"http://127.0.0.1:{each}" for each in decoders]
        new = tmp_path / "new.json"
        new.write_text(json.dumps({"prefillers": [f"http://127.0.0.1:{prefiller}"], "decoders": urls}))
        new.replace(members)

    say(first, second)
    statuses: list[int] = []
    stop = threading.Event()

    def load() -> None:
        body = json.dumps({"model": "m", "prompt": "p", "max_tokens": 1}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions", body, {"content-type": "application/json"}
        )
        while not stop.is_set():
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    statuses.append(answer.status)
            except OSError as error:
                statuses.append(getattr(error, "code", 0))

    proxy = [sys.executable, "disagg_prefill_lmcache_v1/disagg_proxy_server.py", "--port", str(port)]
    with contextlib.ExitStack() as stack:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        for words in (
            *([sys.executable, "-c", SERVER, str(each)] for each in (prefiller, first, second)),
            [*proxy, "--upstreams-file", str(members), "--access-log", "false"],
        ):
            process = stack.enter_context(subprocess.Popen(words, cwd=ROOT, env=environment))
            stack.callback(process.kill)
            if words[-1] == str(second):
                leaving = process
        url = f"http://127.0.0.1:{second}"
        wait_until(lambda: url in ready(f"http://127.0.0.1:{port}/ready"), "the proxy is ready")
        clients = [threading.Thread(target=load, daemon=True) for _ in range(8)]
        for client in clients:
            client.start()
        wait_until(lambda: drain.in_flight(url) > 0, "the one that leaves has requests")
        say(first)
        wait_until(lambda: url not in ready(f"http://127.0.0.1:{port}/ready"), "the proxy knows that it leaves")
        assert drain.main(["--url", url, "--settle", "0", "--limit", "60"]) == 0
        leaving.send_signal(signal.SIGKILL)
        answered = len(statuses)
        wait_until(lambda: len(statuses) > answered + 16, "requests go on without it")
        stop.set()
        for client in clients:
            client.join(60)
    assert set(statuses) == {200}


def ready(url: str) -> str:
    """What the proxy says of its servers, "" while it is not ready."""
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.read().decode()
    except OSError:
        return ""
