"""What one client sends must not hurt another one: bodies that look like requests, heads without end, and more.

Real proxy process, mock servers.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import time
from collections.abc import Iterator

import httpx
import pytest
from proxy_harness import DEADLINE_S, ProxyProcess, Stack, dead_port, stack, wait_until

TIMEOUT_S = 0.6  # --client-timeout-s of the impatient stack
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
SMUGGLED = b"DELETE /v1/admin/secret HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n"
MIB = 1 << 20


@pytest.fixture(scope="module")
def made() -> Iterator[Stack]:
    """A stack shared by the tests that leave it as it was."""
    with stack() as one:
        yield one


@pytest.fixture(scope="module")
def impatient() -> Iterator[Stack]:
    """The same with short client timeouts, for tests that wait for them: a busy machine stops clients that long."""
    with stack("--client-timeout-s", str(TIMEOUT_S)) as one:
        yield one


@pytest.fixture(scope="module")
def locked() -> Iterator[Stack]:
    """The same with an API key."""
    with stack(env={"DISAGG_PROXY_API_KEY": "secret"}) as one:
        yield one


def until_end(sock: socket.socket) -> bytes:
    """Everything that comes until the connection ends."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while chunk := sock.recv(65536):
            received += chunk
    return received


def exchange(one: Stack, data: bytes) -> bytes:
    """What comes back for these bytes, until the connection ends."""
    with one.proxy.connect() as sock:
        sock.sendall(data)
        return until_end(sock)


def statuses(data: bytes) -> list[int]:
    """Statuses of the answers in there."""
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", data)]


def post(one: Stack, path: str, body: object, **headers: str) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    sent = {"content-type": "application/json", **headers}
    return httpx.post(one.url + path, content=content, headers=sent, timeout=DEADLINE_S)


def paths(one: Stack) -> list[object]:
    """Paths that any server was asked for, but for health checks."""
    return [r["path"] for s in (one.prefill, one.decode) for r in list(s.requests) if r["path"] != "/health"]


# -- nothing is read after an answer that closes


def test_the_rest_of_a_stalled_body_is_no_request(impatient: Stack) -> None:
    with impatient.proxy.connect() as sock:
        sock.sendall(HEAD + b"content-length: 200\r\n\r\n{")
        answer = sock.recv(65536)
        assert answer.startswith(b"HTTP/1.1 408")
        assert b"connection: close" in answer
        with contextlib.suppress(ConnectionError):
            for _ in range(3):
                sock.sendall(SMUGGLED)
        rest = until_end(sock)
    assert statuses(rest) == []
    assert "/v1/admin/secret" not in paths(impatient)


@pytest.mark.parametrize(
    "first",
    [
        HEAD + b"content-length: 2000\r\n\r\n",  # 401 before the body
        HEAD + b"connection: close\r\ncontent-length: 2\r\n\r\n{}",
        b"GARBAGE\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nhost: y\r\ncontent-length: 2\r\n\r\n{}",
        b"GET /v1/models HTTP/1.0\r\nconnection: keep-alive\r\n\r\n",
    ],
)
@pytest.mark.parametrize("at_once", [True, False])
def test_no_request_after_an_answer_that_closes(locked: Stack, first: bytes, at_once: bool) -> None:
    following = SMUGGLED.replace(b"host: x", b"host: x\r\nauthorization: Bearer secret") * 3
    with locked.proxy.connect() as sock:
        sock.sendall(first + following if at_once else first)
        received = sock.recv(65536)
        if not at_once:
            with contextlib.suppress(ConnectionError):
                sock.sendall(following)
        received += until_end(sock)
    assert len(statuses(received)) == 1
    assert b"connection: close" in received
    assert "/v1/admin/secret" not in paths(locked)


def test_a_body_longer_than_told_is_no_request_either(made: Stack) -> None:
    answer = exchange(made, HEAD + b"transfer-encoding: chunked\r\n\r\n2\r\n{}\r\nzz\r\n" + SMUGGLED)
    assert statuses(answer) == [400]
    assert "/v1/admin/secret" not in paths(made)


# -- memory and time


def test_bodies_are_not_read_before_the_key(locked: Stack) -> None:
    before = locked.proxy.resident_bytes()
    peak = before
    socks = [locked.proxy.connect() for _ in range(4)]
    try:
        for sock in socks:
            sock.setblocking(False)
            sock.sendall(HEAD + b"content-length: %d\r\n\r\n" % (120 * MIB))
        part, deadline = b"x" * MIB, time.monotonic() + 4 * TIMEOUT_S
        open_ones = list(socks)
        while open_ones and time.monotonic() < deadline:
            for sock in list(open_ones):
                try:
                    sock.send(part)
                except BlockingIOError:
                    time.sleep(0.001)
                except OSError:
                    open_ones.remove(sock)
            peak = max(peak, locked.proxy.resident_bytes())
    finally:
        for sock in socks:
            sock.close()
    assert peak - before < 20 * MIB, f"{(peak - before) / MIB:.0f} MiB"


def test_a_head_has_a_limit(made: Stack) -> None:
    line = b"GET /v1/models HTTP/1.1\r\nhost: x\r\n"
    one = b"x-long: " + b"a" * 70_000 + b"\r\n\r\n"
    many = b"".join(b"x-%d: y\r\n" % number for number in range(9000)) + b"\r\n"
    url = b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n"
    for data in (line + one, line + many, url):
        answer = exchange(made, data)
        assert answer.startswith(b"HTTP/1.1 431"), answer[:100]
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == 431
    below = line + b"x-long: " + b"a" * 50_000 + b"\r\nconnection: close\r\n\r\n"
    assert exchange(made, below).startswith(b"HTTP/1.1 200")


def test_a_head_without_end_costs_little(made: Stack) -> None:
    before, memory = cpu_s(made), made.proxy.resident_bytes()
    sent = 0
    with made.proxy.connect() as sock, contextlib.suppress(ConnectionError):
        sock.sendall(b"GET /v1/models HTTP/1.1\r\nhost: x\r\nx-long: ")
        for _ in range(48):
            sock.sendall(b"a" * MIB)
            sent += MIB
        sock.sendall(b"\r\n\r\n")
        until_end(sock)
    assert cpu_s(made) - before < 0.5
    assert made.proxy.resident_bytes() - memory < 10 * MIB


def test_many_small_chunks_cost_what_they_carry(made: Stack) -> None:
    """Kept one by one, each chunk of two bytes would cost fifty."""
    count = 1_000_000
    before = made.proxy.resident_bytes()
    with made.proxy.connect() as sock:
        sock.sendall(HEAD + b"transfer-encoding: chunked\r\n\r\n" + b"2\r\n  \r\n" * count)
        wait_until(lambda: cpu_rests(made), "all of it is read")
        grown = made.proxy.resident_bytes() - before
        sock.sendall(b"2\r\n{}\r\n0\r\n\r\n")
        assert sock.recv(65536).startswith(b"HTTP/1.1 200")
    assert grown < 10 * count, f"{grown / MIB:.0f} MiB"


def test_a_body_of_framing_alone_is_refused(made: Stack) -> None:
    chunks = b"1;" + b"x" * 4000 + b"\r\n{\r\n"
    answer = exchange(made, HEAD + b"transfer-encoding: chunked\r\n\r\n" + chunks * 200)
    assert answer.startswith(b"HTTP/1.1 400")


def test_trailers_have_a_limit_and_are_dropped(made: Stack) -> None:
    body = HEAD + b"x-request-id: trailers\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n"
    assert exchange(made, body + b"x-t: 1\r\n\r\n").startswith(b"HTTP/1.1 200")
    got = next(r for r in made.decode.requests if r["headers"].get("x-request-id") == "trailers")
    assert "x-t" not in got["headers"]
    assert got["headers"]["content-length"] == "2"
    answer = exchange(made, body.replace(b"trailers", b"long") + b"x-t: " + b"a" * MIB + b"\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400")


def cpu_rests(one: Stack) -> bool:
    """Whether the proxy has had nothing to do for a while."""
    before = cpu_s(one)
    time.sleep(0.1)
    return cpu_s(one) == before


def cpu_s(one: Stack) -> float:
    """CPU seconds of the proxy."""
    with open(f"/proc/{one.proxy.process.pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize(
    ("second", "status"),
    [
        (b"GET /v1/models HTTP/1.1\r\nhost: x\r\nx-slow: ", b""),
        (b"POST /health HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n", b"408"),
        (b"GET /metrics HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n", b"408"),
        (HEAD + b"content-length: 100000\r\n\r\n", b"408"),
    ],
)
def test_a_later_request_that_drips_is_ended(impatient: Stack, second: bytes, status: bytes) -> None:
    """One byte at a time, each in time: the whole has a deadline all the same."""
    with impatient.proxy.connect() as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n" + second)
        assert sock.recv(65536).startswith(b"HTTP/1.1 200")
        begin, received = time.monotonic(), b""
        sock.settimeout(TIMEOUT_S / 4)
        while True:
            try:
                part = sock.recv(65536)
                if not part:
                    break
                received += part
            except TimeoutError:
                with contextlib.suppress(ConnectionError):
                    sock.sendall(b"a")
            except ConnectionError:
                break
            assert time.monotonic() - begin < DEADLINE_S
    assert received[9:12] == status


def test_a_slow_body_that_keeps_coming_is_taken(impatient: Stack) -> None:
    """Each part in time and 1 KiB/s on the whole: longer than the timeout in all."""
    part, count = b" " * 2048, 6
    deadline = time.monotonic() + DEADLINE_S
    while True:
        slowest, sent = 0.0, time.monotonic()
        with impatient.proxy.connect() as sock, contextlib.suppress(ConnectionError):
            sock.sendall(HEAD + b"content-length: %d\r\n\r\n" % (len(part) * count + 2))
            for i in range(count + 1):
                sock.sendall(part if i < count else b"{}")
                slowest, sent = max(slowest, time.monotonic() - sent), time.monotonic()
                time.sleep(TIMEOUT_S / 3 if i < count else 0)  # the client's pace
            answer = sock.recv(65536)
            if answer.startswith(b"HTTP/1.1 200"):
                break
        # A busy machine may not have let this client keep its pace: then it says nothing.
        assert slowest > TIMEOUT_S / 2, answer
        assert time.monotonic() < deadline, "the machine is too busy for the client's pace"


# -- bodies


@pytest.mark.parametrize("depth", [1100, 100_000])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_deep_json_is_a_bad_request(made: Stack, depth: int, path: str) -> None:
    told = len(made.proxy.messages)
    answer = post(made, path, b'{"prompt":' + b"[" * depth + b"]" * depth + b"}")
    assert answer.status_code == 400
    assert "nested too deeply" in answer.json()["error"]["message"]
    assert made.proxy.messages[told:] == []


# -- HTTP that is legal, and HTTP that is not


@pytest.mark.parametrize("upgrade", [b"h2c", b"websocket", b"TLS/1.0, HTTP/1.1"])
@pytest.mark.parametrize("chunked", [False, True])
def test_an_upgrade_is_ignored(made: Stack, upgrade: bytes, chunked: bool) -> None:
    """Java's HTTP client asks for h2c in each first request of a connection."""
    body = b'{"prompt":"all of it"}'
    framing = b"transfer-encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    if not chunked:
        framing = b"content-length: %d\r\n\r\n%b" % (len(body), body)
    name = b"up-%b-%d" % (upgrade[:2], chunked)
    ask = HEAD + b"connection: Upgrade, HTTP2-Settings\r\nupgrade: %b\r\nhttp2-settings: AAMAAABk\r\n" % upgrade
    last = b"GET /v1/models HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    for cut in (10_000, len(ask) + 60):
        data = ask + b"x-request-id: %b\r\n" % name + framing + ask + framing + last
        with made.proxy.connect() as sock:
            sock.sendall(data[:cut])
            sock.sendall(data[cut:])
            assert until_end(sock).count(b"HTTP/1.1 200") == 3
        assert made.bodies(made.decode, name.decode())[-1] == body
    got = next(r for r in made.decode.requests if r["headers"].get("x-request-id") == name.decode())
    assert not {"upgrade", "http2-settings", "connection"} & set(got["headers"])


def test_exactly_one_host(made: Stack) -> None:
    ends = b"connection: close\r\n\r\n"
    line = b"GET /v1/models HTTP/1.1\r\n"
    for hosts in (b"", b"host: a\r\nhost: b\r\n", b"host: a\r\nHost: a\r\n"):
        answer = exchange(made, line + hosts + ends)
        assert answer.startswith(b"HTTP/1.1 400"), hosts
        assert b"Host" in answer
    assert exchange(made, line + b"host: a\r\n" + ends).startswith(b"HTTP/1.1 200")
    assert exchange(made, b"GET /v1/models HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "data",
    [
        HEAD + b"content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        HEAD + b"content-length: 2\r\ncontent-length: 3\r\n\r\n{}",
        HEAD + b"content-length: 2\r\ncontent-length: 2\r\n\r\n{}",
        HEAD + b"content-length: +2\r\n\r\n{}",
        HEAD + b"content-length: -2\r\n\r\n{}",
        HEAD + b"content-length: 2 2\r\n\r\n{}",
        HEAD + b"content-length: 0x2\r\n\r\n{}",
        HEAD + b"transfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        HEAD + b"transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        HEAD + b"transfer-encoding: xchunked\r\n\r\n0\r\n\r\n",
        HEAD + b"transfer-encoding:\x0bchunked\r\n\r\n0\r\n\r\n",
        HEAD + b"transfer-encoding: chunked\r\n\r\n-1\r\n{}\r\n0\r\n\r\n",
        HEAD + b"transfer-encoding: chunked\r\n\r\n2\n{}\r\n0\r\n\r\n",
        HEAD + b"transfer-encoding: chunked\r\n\r\n2\r\n{}0\r\n\r\n",
        HEAD.replace(b"1.1", b"1.0") + b"transfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        HEAD + b"x-fold: a\r\n b\r\ncontent-length: 2\r\n\r\n{}",
        HEAD + b"x-nul: a\x00b\r\ncontent-length: 2\r\n\r\n{}",
        HEAD + b"x-cr: a\rb\r\ncontent-length: 2\r\n\r\n{}",
        HEAD + b"content-length : 2\r\n\r\n{}",
        HEAD + b" content-length: 2\r\n\r\n{}",
        HEAD + b"content-length\r\n\r\n{}",
        HEAD.replace(b"\r\n", b"\n") + b"content-length: 2\n\n{}",
        HEAD.replace(b"1.1", b"2.0") + b"content-length: 2\r\n\r\n{}",
        HEAD.replace(b"1.1", b"1.2") + b"content-length: 2\r\n\r\n{}",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"POST /v1/completions\r\n\r\n",
        b"CONNECT a:80 HTTP/1.1\r\nhost: a:80\r\n\r\n",
        b"GET v1/models HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET /v1/models#part HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET /v1/\xc3\xa9 HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET ftp://x/v1/models HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET http://user@x/v1/models HTTP/1.1\r\nhost: x\r\n\r\n",
    ],
)
def test_doubtful_framing_is_refused(made: Stack, data: bytes) -> None:
    before = len(paths(made))
    answer = exchange(made, data)
    assert answer.startswith(b"HTTP/1.1 400"), answer[:80]
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["stage"] == "proxy"
    assert b"connection: close" in answer
    assert len(paths(made)) == before


def test_forms_of_the_target(made: Stack) -> None:
    for target in (b"http://any.host/v1/models?a=b", b"HTTP://h:80/v1/models?a=b", b"/v1/models?a=b"):
        got = len(made.decode.requests)
        ask = b"GET %b HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n" % target
        assert exchange(made, ask).startswith(b"HTTP/1.1 200")
        assert "/v1/models?a=b" in [r["path"] for r in made.decode.requests[got:]]
    encoded = HEAD.replace(b"completions", b"%63ompletions") + b"connection: close\r\ncontent-length: 14\r\n\r\n"
    prefills = made.prefill.served
    assert exchange(made, encoded + b'{"prompt":"x"}').startswith(b"HTTP/1.1 200")
    assert made.prefill.served == prefills + 1


# -- what is the operator's alone


def test_internal_headers_of_clients_are_dropped(made: Stack) -> None:
    headers = {"x-kv-hold": "off", "X-KV-Reason": "mine", "x-request-id": "internal", "x-kept": "1"}
    assert post(made, "/v1/completions", {"prompt": "x"}, **headers).status_code == 200
    for state in (made.prefill, made.decode):
        got = next(r["headers"] for r in state.requests if r["headers"].get("x-request-id") == "internal")
        assert got["x-kept"] == "1"
        assert not [name for name in got if name.startswith("x-kv-")]


STEERING = [
    ("/v1/completions", {"prompt": "x", "kv_transfer_params": {}}, "kv_transfer_params"),
    ("/v1/completions", {"prompt": "x", "kv_transfer_params": {"lmcache.tag.r": "a"}}, "kv_transfer_params"),
    ("/v1/chat/completions", {"messages": [], "ec_transfer_params": {"a": 1}}, "ec_transfer_params"),
    ("/v1/completions", {"prompt": "x" * 40_000, "kv_transfer_params": 1}, "kv_transfer_params"),
    (
        "/v1/responses",
        {"input": "x", "vllm_xargs": {"kv_transfer_params": "disagg_spec"}},
        "vllm_xargs.kv_transfer_params",
    ),
    ("/v1/messages", {"messages": [], "vllm_xargs": {"ec_transfer_params": [1]}}, "vllm_xargs.ec_transfer_params"),
    (
        "/inference/v1/generate",
        {"token_ids": [1], "sampling_params": {"extra_args": {"kv_transfer_params": {}}}},
        "sampling_params.extra_args.kv_transfer_params",
    ),
    ("/inference/v1/generate", {"token_ids": [1], "kv_transfer_params": {"a": 1}}, "kv_transfer_params"),
]


@pytest.mark.parametrize(("path", "body", "field"), STEERING)
def test_fields_that_steer_the_transfer_are_refused(made: Stack, path: str, body: object, field: str) -> None:
    before = len(paths(made))
    text = json.dumps(body)
    for form in (text, text.replace("transfer", "tr\\u0061nsfer")):
        answer = post(made, path, form.encode())
        assert answer.status_code == 400
        assert answer.json()["error"]["message"].startswith(field + " is not taken")
    assert len(paths(made)) == before


def test_what_only_looks_like_steering_passes(made: Stack) -> None:
    for path, body in (
        ("/v1/completions", {"prompt": "explain kv_transfer_params", "kv_transfer_params": None}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": '{"kv_transfer_params": 1}'}]}),
        ("/tokenize", {"prompt": 'what is "kv_transfer_params": {}?'}),
    ):
        assert post(made, path, body).status_code == 200
    form = b'--b\r\ncontent-disposition: form-data; name="kv_transfer_params"\r\n\r\n{}\r\n--b--\r\n'
    answer = post(made, "/v1/audio/transcriptions", form, **{"content-type": "multipart/form-data; boundary=b"})
    assert answer.status_code == 400


def test_the_operator_may_trust_clients() -> None:
    with stack("--trusted-kv-transfer-params") as one:
        for number, (path, body, _) in enumerate(STEERING):
            name = f"trusted-{number}"
            assert post(one, path, body, **{"x-request-id": name}).status_code == 200
            assert json.loads(one.bodies(one.decode, name)[0]) == body


def test_errors_name_no_server() -> None:
    ports = [dead_port(), dead_port()]
    flags = ("--prefiller-port", str(ports[0]), "--decoder-port", str(ports[1]))
    for more, stage in (((), "decode"), (("--prefill-failure", "fail"), "prefill")):
        proxy = ProxyProcess(*flags, *more)
        try:
            headers = {"x-request-id": "down"}
            answer = httpx.post(proxy.url + "/v1/completions", json={"prompt": "x"}, headers=headers)
            assert (answer.status_code, answer.json()["error"]["stage"]) == (503, stage)
            for text in ("127.0.0.1", *map(str, ports), "Errno"):
                assert text not in answer.text
            assert "refused" in proxy.access_line("down")["error"]  # the operator is told
        finally:
            proxy.stop()


def test_ready_and_metrics_need_the_key(locked: Stack) -> None:
    for path in ("/ready", "/metrics"):
        assert httpx.get(locked.url + path).status_code == 401
        assert httpx.head(locked.url + path).status_code == 401
        assert httpx.get(locked.url + path, headers={"authorization": "Bearer secret"}).status_code == 200
    assert httpx.get(locked.url + "/health").status_code == 200
    assert httpx.get(locked.url + "/health").json() == {"status": "ok"}


@pytest.mark.parametrize("value", ["Bearer secre", "Bearer secret2", "Bearer  x secret", "Bearer", "Basic secret", ""])
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "DELETE", "PUT", "TRACE"])
def test_a_wrong_key_opens_nothing(locked: Stack, method: str, value: str) -> None:
    before = len(paths(locked))
    answer = httpx.request(method, locked.url + "/v1/models", headers={"authorization": value} if value else {})
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert len(paths(locked)) == before


def test_options_without_a_key_carries_no_body(locked: Stack) -> None:
    assert httpx.request("OPTIONS", locked.url + "/v1/models", content=b"x").status_code == 401
    assert httpx.options(locked.url + "/v1/models").status_code == 200


# -- hang-ups


def test_a_hang_up_is_noticed_while_another_request_waits(made: Stack) -> None:
    body = b'{"prompt":"x","stream":true}'
    slow = HEAD + b"x-mock: decode.delay=60\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
    before = made.decode.aborted
    for ahead in (slow, slow[:-10], HEAD, slow + slow):
        sock = made.proxy.connect()
        sock.sendall(slow)
        wait_until(lambda: made.decode.running, "the request runs")
        sock.sendall(ahead)
        sock.close()
        wait_until(lambda: made.decode.running == 0, "the decoder sees the hang-up")
    assert made.decode.aborted == before + 4


def test_requests_ahead_of_their_turn_are_served_in_order(made: Stack) -> None:
    first = (
        HEAD + b"x-mock: decode.delay=0.2\r\nx-request-id: ahead-0\r\ncontent-length: 14\r\n\r\n" + b'{"prompt":"x"}'
    )
    long = json.dumps({"prompt": "y" * 1_000_000}).encode()
    second = HEAD + b"x-request-id: ahead-1\r\ncontent-length: %d\r\n\r\n%b" % (len(long), long)
    third = HEAD + b"x-request-id: ahead-2\r\nconnection: close\r\ncontent-length: 2\r\n\r\n{}"
    with made.proxy.connect() as sock:
        sock.sendall(first)
        wait_until(lambda: made.decode.running, "the first one runs")
        sock.sendall(second + third)
        answer = until_end(sock)
    ids = [part.split(b"\r\n")[0] for part in answer.split(b"x-request-id: ")[1:]]
    assert ids == [b"ahead-0", b"ahead-1", b"ahead-2"]
    assert answer.count(b"HTTP/1.1 200") == 3
    assert made.bodies(made.decode, "ahead-1") == [long]


def test_hundreds_of_requests_in_one_write(made: Stack) -> None:
    answer = exchange(made, b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n" * 2000)
    assert set(statuses(answer)) == {200}
    assert len(statuses(answer)) < 200
    assert answer.count(b"connection: close") == 1


def test_a_whole_answer_that_nobody_reads_is_ended() -> None:
    with stack("--stream-idle-timeout-s", "0.5", "--client-timeout-s", "0.4") as one:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", one.proxy.port))
        sock.sendall(HEAD + b"x-mock: decode.size=7000000\r\ncontent-length: 14\r\n\r\n" + b'{"prompt":"x"}')
        ports = f":{one.proxy.port:04X} 0100007F:{sock.getsockname()[1]:04X} "

        def is_open() -> bool:
            """Whether the proxy has its end of the connection."""
            with open("/proc/net/tcp") as connections:
                return any(ports in line and line.split()[3] == "01" for line in connections)

        try:
            assert is_open()
            wait_until(lambda: one.decode.served, "the answer is made")
            wait_until(lambda: not is_open(), "the connection is closed")
        finally:
            sock.close()
