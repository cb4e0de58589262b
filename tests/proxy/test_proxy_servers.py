"""What servers can do to the proxy, and what one client's requests can do to the servers and so to other clients."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from proxy_harness import DEADLINE_S, MockThread, ProxyProcess, dead_port, stack, wait_until

COMPLETIONS = "/v1/completions"


def post(url: str, mock: str = "", **fields: Any) -> httpx.Response:
    headers = {"x-mock": mock} if mock else {}
    return httpx.post(url, json={"prompt": "x", **fields}, headers=headers, timeout=DEADLINE_S)


@contextlib.contextmanager
def fleet(prefillers: int, decoders: int, *flags: str) -> Iterator[tuple[ProxyProcess, list[Any], list[Any]]]:
    """The proxy before so many mock servers, and the states of these."""
    mocks = MockThread()
    found = [[mocks.add(role) for _ in range(count)] for role, count in (("prefill", prefillers), ("decode", decoders))]
    names = ("--prefiller", "--decoder")
    urls = [part for name, members in zip(names, found, strict=True) for port, _ in members
            for part in (name, f"http://127.0.0.1:{port}")]  # fmt: skip
    proxy = ProxyProcess(*urls, *flags)
    try:
        yield proxy, *([state for _, state in members] for members in found)
    finally:
        proxy.stop()
        mocks.close()


class RawServer:
    """A server of raw bytes: ``answer`` gets the request's head and yields what to send; health checks are answered."""

    def __init__(self, answer: Callable[[bytes], Iterator[bytes]]) -> None:
        self._answer = answer
        self.requests: list[bytes] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._serve, args=(self._listener.accept()[0],), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError):
            head = b""
            while b"\r\n\r\n" not in head:
                head += sock.recv(65536) or exit_thread()
            if head.startswith(b"GET /health"):
                sock.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
                return
            self.requests.append(head)
            for part in self._answer(head):
                sock.sendall(part)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # ends the accept() that waits in the thread
        self._listener.close()


def exit_thread() -> bytes:
    raise OSError("the other side is gone")


def slowly(data: bytes, pause_s: float = 0.1) -> Iterator[bytes]:
    for position in range(len(data)):
        yield data[position : position + 1]
        time.sleep(pause_s)


# -- one request, one server


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("mock", ["cut=0", "prefill.cut=0;decode.cut=0"])
def test_a_request_that_servers_die_of_reaches_one_of_each_kind(warm: bool, mock: str) -> None:
    with fleet(2, 3) as (proxy, prefillers, decoders):
        if warm:  # on connections that are kept from before, too
            for _ in range(12):
                assert post(proxy.url + COMPLETIONS).status_code == 200
        before = [state.served for state in (*prefillers, *decoders)]
        answer = post(proxy.url + COMPLETIONS, mock)
        assert answer.status_code == 503
        after = [state.served for state in (*prefillers, *decoders)]
        delivered = [now - then for now, then in zip(after, before, strict=True)]
        assert (sum(delivered[:2]), sum(delivered[2:])) == (1, 1)
        assert post(proxy.url + COMPLETIONS, prompt="another").status_code == 200


def served(*pools: list[Any]) -> list[int]:
    """How many requests the servers of each pool got."""
    return [sum(state.served for state in pool) for pool in pools]


def test_what_a_server_of_each_kind_died_of_is_refused_when_it_comes_again() -> None:
    with fleet(2, 2) as (proxy, prefillers, decoders):
        assert post(proxy.url + COMPLETIONS, "cut=0", prompt="poison").status_code == 503
        before = served(prefillers, decoders)
        for mock in ("cut=0", ""):  # as an honest server might answer it, too: nobody knows
            refused = post(proxy.url + COMPLETIONS, mock, prompt="poison")
            error = refused.json()["error"]
            assert (refused.status_code, error["stage"]) == (503, "proxy")
            assert "2 servers failed" in error["message"]
            assert "--suspect-request-s" in error["message"]
            assert proxy.access_line(error["request_id"])["outcome"] == "suspect"
        assert served(prefillers, decoders) == before
        assert post(proxy.url + COMPLETIONS, prompt="honest").status_code == 200


def test_what_a_prefill_server_died_of_gets_no_prefill_again() -> None:
    """The decode server has answered it, so it may be innocent; other requests that ran there are answered too."""
    with fleet(2, 1) as (proxy, prefillers, decoders):
        assert post(proxy.url + COMPLETIONS, "prefill.cut=0", prompt="poison").status_code == 200
        for _ in range(3):
            assert post(proxy.url + COMPLETIONS, "prefill.cut=0", prompt="poison").status_code == 200
        assert served(prefillers, decoders) == [1, 4]
        assert 'disagg_prefill_skipped_total{reason="suspect"} 3.0' in httpx.get(proxy.url + "/metrics").text


def test_without_decoding_alone_two_prefill_servers_may_die() -> None:
    with fleet(3, 1, "--prefill-failure", "fail") as (proxy, prefillers, decoders):
        for _ in range(4):
            assert post(proxy.url + COMPLETIONS, "prefill.cut=0", prompt="poison").status_code == 503
        assert served(prefillers, decoders) == [2, 0]


def test_a_cut_stream_counts_and_an_answer_clears() -> None:
    with fleet(1, 1) as (proxy, _, decoders):
        for mock in ("decode.cut=2", "", "decode.cut=2", "", "decode.cut=2", "decode.cut=2"):
            with pytest.raises(httpx.RemoteProtocolError) if mock else contextlib.nullcontext():
                assert post(proxy.url + COMPLETIONS, mock, prompt="p", stream=True).status_code == 200
        assert post(proxy.url + COMPLETIONS, prompt="p", stream=True).status_code == 503
        assert served(decoders) == [6]


def test_deaths_are_forgotten_in_time_or_not_remembered() -> None:
    for seconds, refused in (("0.5", True), ("0", False)):
        with fleet(1, 1, "--suspect-request-s", seconds) as (proxy, prefillers, decoders):
            assert post(proxy.url + COMPLETIONS, "cut=0").status_code == 503
            if refused:
                wait_until(lambda url=proxy.url: post(url + COMPLETIONS).status_code == 200, "it is taken again")
            else:
                assert post(proxy.url + COMPLETIONS).status_code == 200
            assert served(prefillers, decoders) == [2, 2]


def test_500_of_a_server_that_ends_counts_and_of_one_that_stays_does_not() -> None:
    """vLLM answers 500 when its engine dies, and ends."""

    def answer(head: bytes) -> Iterator[bytes]:
        yield b"HTTP/1.1 500 Internal Server Error\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}"

    dying = [RawServer(answer), RawServer(answer)]
    flags = [part for name, one in zip(("--prefiller", "--decoder"), dying, strict=True) for part in (name, one.url)]
    proxy = ProxyProcess(*flags, "--health-interval-s", "0.1")
    try:
        for _ in range(3):  # they stay: each is asked anew
            assert post(proxy.url + COMPLETIONS, prompt="poison").status_code == 500
        assert [len(one.requests) for one in dying] == [3, 3]
        for one in dying:
            one.close()
        wait_until(lambda: httpx.get(proxy.url + "/ready").status_code == 503, "both are found to be down")
        answers = post(proxy.url + COMPLETIONS, prompt="poison")
        assert (answers.status_code, answers.json()["error"]["stage"]) == (503, "proxy")
        other = post(proxy.url + COMPLETIONS, prompt="honest")
        assert (other.status_code, other.json()["error"]["stage"]) == (503, "decode")
    finally:
        proxy.stop()


@pytest.mark.parametrize("warm", [False, True])
def test_other_routes_are_sent_once(warm: bool) -> None:
    with fleet(1, 3) as (proxy, _, decoders):
        if warm:
            for _ in range(6):
                assert httpx.get(proxy.url + "/v1/models").status_code == 200
        before = sum(state.served for state in decoders)
        assert post(proxy.url + "/tokenize", "cut=0").status_code == 503
        assert sum(state.served for state in decoders) == before + 1


def test_what_was_not_sent_goes_to_another_server() -> None:
    """Health checks are too rare here to help: the connection that cannot be made is noticed by requests alone."""
    with fleet(1, 1, "--decoder", f"http://127.0.0.1:{dead_port()}", "--health-interval-s", "3600") as found:
        proxy, _, decoders = found
        for _ in range(8):
            assert post(proxy.url + COMPLETIONS).status_code == 200
        assert decoders[0].served == 8


# -- decode servers alone


def test_decode_only_shares_requests_between_whole_servers() -> None:
    with fleet(0, 2, "--decode-only", "--prefix-affinity", "off") as (proxy, _, decoders):
        ready = httpx.get(proxy.url + "/ready")
        assert (ready.status_code, list(ready.json()["servers"])) == (200, ["decode"])
        with concurrent.futures.ThreadPoolExecutor(4) as pool:  # four at a time: two each
            answers = list(pool.map(lambda _: post(proxy.url + COMPLETIONS, "delay=0.3", prompt=[1, 2, 3]), range(4)))
        assert [answer.status_code for answer in answers] == [200] * 4
        assert [state.served for state in decoders] == [2, 2]
        bodies = [seen["body"] for state in decoders for seen in state.requests if seen["body"]]
        assert [json.loads(body) for body in bodies] == [{"prompt": [1, 2, 3]}] * 4  # the clients' own, nothing else
        lines = [proxy.access_line(answer.headers["x-request-id"]) for answer in answers]
        assert {line["outcome"] for line in lines} == {"ok"}
        assert not any("prefill" in line for line in lines)
        assert not any("x-kv-state" in answer.headers for answer in answers)


# -- one client's requests are not a server's health


@pytest.mark.parametrize(
    "mock", ["prefill.status=500", "prefill.cut=0", "prefill.delay=30", "decode.status=500", "decode.cut=0"]
)
def test_requests_that_fail_do_not_close_the_way_for_others(mock: str) -> None:
    limits = ("--prefill-timeout-s", "2") if "delay" in mock else ()  # long enough for others on a busy machine
    with stack(*limits) as made:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda _: post(made.url + COMPLETIONS, mock), range(8)))
        assert not any("is down" in line for line in made.proxy.messages), made.proxy.messages
        for _ in range(10):
            answer = post(made.url + COMPLETIONS, prompt="of others")
            assert (answer.status_code, answer.headers["x-kv-state"]) == (200, "stored")


def test_a_prefill_server_that_answers_500_is_not_replaced_by_another() -> None:
    with fleet(3, 1) as (proxy, prefillers, _):
        assert post(proxy.url + COMPLETIONS, "prefill.status=500").headers["x-kv-state"] == "none"
        assert sum(state.served for state in prefillers) == 1


def test_a_server_that_is_gone_is_told_by_its_health_check_and_found_again() -> None:
    mocks = MockThread()
    ports = [mocks.add(role)[0] for role in ("prefill", "decode")]
    server = RawServer(lambda head: iter(()))
    proxy = ProxyProcess("--prefiller-port", str(ports[0]), "--decoder", f"http://127.0.0.1:{ports[1]}", "--decoder",
                         server.url, "--health-interval-s", "0.2")  # fmt: skip

    def ready() -> dict[str, bool]:
        return httpx.get(proxy.url + "/ready", timeout=DEADLINE_S).json()["servers"]["decode"]

    try:
        wait_until(lambda: all(ready().values()), "both are up")
        server.close()
        wait_until(lambda: not ready()[server.url], "one is down")
        assert httpx.get(proxy.url + "/ready").status_code == 200  # because of the other one
    finally:
        proxy.stop()
        mocks.close()


def test_ready_asks_no_server() -> None:
    with stack("--health-interval-s", "60") as made:
        for _ in range(50):
            assert httpx.get(made.url + "/ready").status_code == 200
        checks = [r for state in (made.prefill, made.decode) for r in state.requests if r["path"] == "/health"]
        assert len(checks) == 2  # those at the start


# -- limits of time


@pytest.fixture
def slow_server() -> Iterator[RawServer]:
    def answer(head: bytes) -> Iterator[bytes]:
        yield from slowly(b"HTTP/1.1 200 OK\r\nx-slow: y\r\ncontent-length: 5000\r\n\r\n", 0.05)
        yield from slowly(b"x" * 5000)  # more than eight minutes

    server = RawServer(answer)
    yield server
    server.close()


def test_the_limits_hold_for_a_server_that_sends_byte_by_byte(slow_server: RawServer) -> None:
    with stack("--prefiller", slow_server.url, "--prefill-timeout-s", "1") as made:
        begin = time.perf_counter()
        answer = post(made.url + COMPLETIONS)
        assert 0.9 < time.perf_counter() - begin < DEADLINE_S
        assert (answer.status_code, answer.headers["x-kv-state"]) == (200, "none")
    with stack("--decoder", slow_server.url, "--decode-timeout-s", "1") as made:
        begin = time.perf_counter()
        answer = post(made.url + COMPLETIONS)
        assert 0.9 < time.perf_counter() - begin < DEADLINE_S
        assert (answer.status_code, answer.json()["error"]["stage"]) == (504, "decode")


# -- names of servers


@pytest.mark.parametrize(
    ("location", "wanted"),
    [
        ("http://{host}/v1/completions", "/v1/completions"),
        ("http://{host}/v1/completions?a=b", "/v1/completions?a=b"),
        ("//{host}//evil.example/x", "/evil.example/x"),
        ("http://{host}", "/"),
        ("/v1/completions", "/v1/completions"),
        ("https://example.org/docs", "https://example.org/docs"),
    ],
)
def test_a_redirect_does_not_lead_around_the_proxy(location: str, wanted: str) -> None:
    def answer(head: bytes) -> Iterator[bytes]:
        host = head.partition(b"host: ")[2].partition(b"\r\n")[0].decode()
        target = location.format(host=host)
        yield f"HTTP/1.1 307 Temporary Redirect\r\nLocation: {target}\r\ncontent-length: 0\r\n\r\n".encode()

    server = RawServer(answer)
    with stack("--decoder", server.url) as made:
        found = post(made.url + COMPLETIONS + "/")
        assert (found.status_code, found.headers["location"]) == (307, wanted)
    server.close()


def test_a_name_that_has_no_address_is_a_plain_message() -> None:
    with stack("--decoder", "http://no-such-host.invalid:1") as made:
        answer = post(made.url + COMPLETIONS)
        assert (answer.status_code, answer.json()["error"]["stage"]) == (503, "decode")
        assert "no-such-host" not in answer.text
        wait_until(lambda: any("is down" in line for line in made.proxy.messages), "it is told as down")


# -- servers that come and go


def test_series_of_servers_that_are_gone_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "upstreams.json"
    with stack() as made:
        prefillers = [f"http://127.0.0.1:{made.prefill_port}"]
        decoder, gone = f"http://127.0.0.1:{made.decode_port}", f"http://127.0.0.1:{dead_port()}"
        path.write_text(json.dumps({"prefillers": prefillers, "decoders": [decoder, gone]}))
        proxy = ProxyProcess("--upstreams-file", str(path))

        def shown(url: str) -> int:
            return httpx.get(proxy.url + "/metrics", timeout=DEADLINE_S).text.count(f'upstream="{url}"')

        try:
            wait_until(lambda: shown(gone) == 3, "all series are there")
            path.write_text(json.dumps({"prefillers": prefillers, "decoders": [decoder]}))
            wait_until(lambda: shown(gone) == 0, "those of the server that is gone are left out")
            assert shown(decoder) == 3
        finally:
            proxy.stop()


def test_more_servers_than_there_is_room_for_in_the_metrics_stop_nothing(tmp_path: Path) -> None:
    path = tmp_path / "upstreams.json"
    with stack() as made:
        prefillers, decoder = [f"http://127.0.0.1:{made.prefill_port}"], f"http://127.0.0.1:{made.decode_port}"

        def write(*more: str) -> None:
            path.write_text(json.dumps({"prefillers": prefillers, "decoders": [decoder, *more]}))

        write()
        proxy = ProxyProcess("--upstreams-file", str(path), "--health-interval-s", "60", "--decode-timeout-s", "5")
        try:
            write(*(f"http://127.{n >> 16}.{n >> 8 & 255}.{n & 255}:1" for n in range(1, 5000)))
            wait_until(
                lambda: any("too many metric series" in line for line in proxy.messages), "the table is full", 60
            )
            told = len(proxy.messages)
            write()
            read_again = lambda: any(line.endswith(f"decode {decoder}") for line in proxy.messages[told:])  # noqa: E731
            wait_until(read_again, "the file is read again", 60)
            assert post(proxy.url + COMPLETIONS).status_code == 200
            assert post(proxy.url + COMPLETIONS, "decode.delay=30").status_code == 504  # timeouts are enforced still
            text = httpx.get(proxy.url + "/metrics", timeout=DEADLINE_S).text
            assert text.count("disagg_upstream_up{") == 2
        finally:
            proxy.stop()


# -- stored responses


def test_a_stored_response_is_looked_for_on_all_decoders_and_nothing_else_is() -> None:
    def plain(status: str) -> Callable[[bytes], Iterator[bytes]]:
        return lambda head: iter([f"HTTP/1.1 {status}\r\ncontent-length: 2\r\n\r\n{{}}".encode()])

    servers = [RawServer(plain(status)) for status in ("404 Not Found", "404 Not Found", "200 OK")]
    mocks = MockThread()
    prefill_port, _ = mocks.add("prefill")
    flags = [part for server in servers for part in ("--decoder", server.url)]
    proxy = ProxyProcess("--prefiller-port", str(prefill_port), *flags)
    try:
        for _ in range(3):
            assert httpx.get(proxy.url + "/v1/responses/resp_1").status_code == 200
            follow_up = {"model": "m", "input": "x", "previous_response_id": "resp_1"}
            assert httpx.post(proxy.url + "/v1/responses", json=follow_up).status_code == 200
        sent = sum(len(server.requests) for server in servers)
        for path in ("/v1/responses", COMPLETIONS):
            for _ in range(3):
                httpx.post(proxy.url + path, json={"model": "none", "prompt": "x", "input": "x"})
        assert httpx.get(proxy.url + "/v1/models/none").status_code in (200, 404)
        assert sum(len(server.requests) for server in servers) == sent + 7
    finally:
        proxy.stop()
        mocks.close()
        for server in servers:
            server.close()
