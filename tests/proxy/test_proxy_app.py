"""The proxy as a process in front of mock servers: what clients, servers and signals do to it."""

from __future__ import annotations

import concurrent.futures
import http.client
import json
import os
import signal
import socket
import ssl
import subprocess
import threading
import time
import types
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from proxy_harness import DEADLINE_S, MockThread, ProxyProcess, Stack, dead_port, stack, wait_until

from disagg_prefill_lmcache_v1.proxy.client_request import ClientRequest

JSON = {"content-type": "application/json"}
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@pytest.fixture(scope="module")
def plain() -> Iterator[Stack]:
    """A stack shared by the tests that leave it as it was: none may have a request refused that another one sends."""
    with stack("--suspect-request-s", "0") as made:
        yield made


def post(made: Any, path: str, body: Any, mock: str = "", request_id: str = "", **headers: str) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    extra = {name: value for name, value in (("x-mock", mock), ("x-request-id", request_id)) if value}
    return httpx.post(made.url + path, content=content, headers={**JSON, **extra, **headers}, timeout=DEADLINE_S)


def raw(made: Any, data: bytes, wait_for_end: bool = True) -> bytes:
    """Bytes that come back for these bytes, until the connection ends."""
    with made.proxy.connect() as sock:
        sock.sendall(data)
        received = b""
        while chunk := sock.recv(65536):
            received += chunk
            if not wait_for_end:
                break
        return received


def metric(made: Any, line: str) -> float:
    """Value of the metric line that begins with this text; 0 if there is none."""
    for found in httpx.get(made.url + "/metrics", timeout=DEADLINE_S).text.splitlines():
        if found.startswith(line + " "):
            return float(found.rpartition(" ")[2])
    return 0.0


def assert_openai_error(response: httpx.Response, status: int, stage: str) -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["stage"] == stage
    assert error["code"] == status
    assert set(error) >= {"message", "type", "param", "code"}
    assert response.headers["x-request-id"] in error["message"]


# -- transparent


def test_prefill_gets_the_shaped_body_and_decode_the_bytes(plain: Stack) -> None:
    body = b'{ "prompt":"h\\u00e9llo" ,"max_tokens" : 7, "n":2 }'
    response = post(plain, COMPLETIONS, body, request_id="shape-1", authorization="Bearer abc")
    assert response.status_code == 200, response.text
    assert plain.bodies(plain.decode, "shape-1") == [body]
    assert [json.loads(b) for b in plain.bodies(plain.prefill, "shape-1")] == [
        {"prompt": "héllo", "max_tokens": 1, "n": 1, "stream": False}
    ]
    for state in (plain.prefill, plain.decode):
        got = next(r for r in state.requests if r["headers"].get("x-request-id") == "shape-1")
        assert got["headers"]["authorization"] == "Bearer abc"
        assert "transfer-encoding" not in got["headers"]
    assert response.headers["x-request-id"] == "shape-1"
    assert response.headers["x-kv-state"] == "stored"
    assert float(response.headers["x-kv-wait-ms"]) == 1.5
    assert (response.headers["x-prompt-tokens"], response.headers["x-reused-tokens"]) == ("5", "4")


def test_an_id_is_made_for_both_stages(plain: Stack) -> None:
    for given in ("", "bad id", "x" * 300):
        made = post(plain, COMPLETIONS, {"prompt": "x"}, request_id=given).headers["x-request-id"]
        assert made != given
        assert plain.bodies(plain.prefill, made)
        assert plain.bodies(plain.decode, made)


@pytest.mark.parametrize("mock", ["", "split=7", "size=70000", "chunks=200"])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/v1/responses", "/v1/messages"])
def test_stream_equals_the_decoders(plain: Stack, path: str, mock: str) -> None:
    body = {"prompt": "x", "stream": True, "stream_options": {"include_usage": True}}
    direct = httpx.post(
        f"http://127.0.0.1:{plain.decode_port}{path}", json=body, headers={"x-mock": mock}, timeout=DEADLINE_S
    )
    through = post(plain, path, body, mock)
    assert through.content == direct.content
    assert through.content.endswith(b"data: [DONE]\n\n")
    assert through.headers["content-type"] == direct.headers["content-type"]
    assert through.headers["server"] == "mock"


def test_parts_come_as_they_are_made(plain: Stack) -> None:
    with httpx.stream(
        "POST", plain.url + COMPLETIONS, json={"prompt": "x", "stream": True}, headers={"x-mock": "decode.hang=2"}
    ) as response:
        events = response.iter_lines()
        got = [line for line in (next(events) for _ in range(4)) if line]
    assert len(got) == 2  # and the third has not been made yet


def test_other_routes_go_to_the_decoder_alone(plain: Stack) -> None:
    before = plain.prefill.served
    assert httpx.get(plain.url + "/v1/models").json()["data"][0]["id"] == "mock"
    assert httpx.get(plain.url + "/v1/models?a=1&b=%20").status_code == 200
    assert post(plain, "/tokenize", {"prompt": "x"}).status_code == 200
    assert httpx.delete(plain.url + "/v1/something/7").status_code == 200
    head = httpx.head(plain.url + "/v1/models")
    assert (head.status_code, head.headers["content-length"], head.content) == (200, "42", b"")
    assert plain.prefill.served == before
    assert "/v1/models?a=1&b=%20" in [r["path"] for r in plain.decode.requests]


def test_hop_by_hop_headers_stay_out(plain: Stack) -> None:
    data = (
        b"GET /v1/models HTTP/1.1\r\nhost: x\r\nconnection: close, x-private\r\nx-private: 1\r\nx-public: 2\r\n"
        b"te: trailers\r\nkeep-alive: timeout=5\r\nproxy-authorization: secret\r\nx-request-id: hop\r\n\r\n"
    )
    assert b"HTTP/1.1 200" in raw(plain, data)
    headers = next(r for r in plain.decode.requests if r["headers"].get("x-request-id") == "hop")["headers"]
    assert headers["x-public"] == "2"
    assert not {"x-private", "te", "keep-alive", "proxy-authorization", "connection"} & set(headers)
    assert headers["host"] == f"127.0.0.1:{plain.decode_port}"


def test_forms_of_http(plain: Stack) -> None:
    body = b'{"prompt":"x"}'
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    chunked = head + b"connection: close\r\ntransfer-encoding: chunked\r\n\r\n"
    for size in (1, 5):
        pieces = [body[i : i + size] for i in range(0, len(body), size)]
        chunks = b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in pieces)
        assert b"HTTP/1.1 200" in raw(plain, chunked + chunks + b"0\r\n\r\n")
    with plain.proxy.connect() as sock:
        sock.sendall(head + b"expect: 100-continue\r\ncontent-length: 14\r\n\r\n")
        assert sock.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(body)
        assert sock.recv(65536).startswith(b"HTTP/1.1 200")
    one = head + b"content-length: 14\r\n\r\n" + body
    last = head + b"connection: close\r\ncontent-length: 14\r\n\r\n" + body
    assert raw(plain, one + one + last).count(b"HTTP/1.1 200") == 3
    old = b"POST /v1/completions HTTP/1.0\r\ncontent-type: application/json\r\n"
    answer = raw(plain, old + b"content-length: 14\r\n\r\n" + body)
    assert b"connection: close" in answer
    stream = b'{"prompt":"x","stream":true}'
    answer = raw(plain, old + b"content-length: 28\r\n\r\n" + stream)
    assert b"transfer-encoding" not in answer
    assert answer.endswith(b"data: [DONE]\n\n")


def test_long_bodies_go_through_whole(plain: Stack) -> None:
    for size in (60_000, 70_000, 3_000_000):
        body = json.dumps({"prompt": "é" * size}).encode()
        request_id = f"long-{size}"
        assert post(plain, COMPLETIONS, body, request_id=request_id).status_code == 200
        assert plain.bodies(plain.decode, request_id) == [body]
        assert len(plain.bodies(plain.prefill, request_id)[0]) == len(body) + len(b',"max_tokens":1,"stream":false') - 1
    answer = post(plain, COMPLETIONS, {"prompt": "x"}, "decode.size=20000000")
    assert len(answer.json()["choices"][0]["text"]) == 20_000_000


# -- errors


def test_requests_that_the_proxy_refuses(plain: Stack) -> None:
    assert_openai_error(post(plain, COMPLETIONS, b"{"), 400, "proxy")
    text = httpx.post(plain.url + COMPLETIONS, content=b"{}", headers={"content-type": "text/plain"})
    assert_openai_error(text, 415, "proxy")
    assert_openai_error(httpx.post(plain.url + COMPLETIONS, content=b"{}"), 415, "proxy")
    good = httpx.post(plain.url + COMPLETIONS, content=b"{}", headers={"content-type": "Application/JSON; charset=x"})
    assert good.status_code == 200


def test_json_that_is_no_object_is_the_decoders_to_refuse(plain: Stack) -> None:
    skipped = lambda reason: metric(plain, f'disagg_prefill_skipped_total{{reason="{reason}"}}')  # noqa: E731
    before = (plain.prefill.served, skipped("no_prompt"), skipped("stored_response"))
    assert post(plain, COMPLETIONS, b"[1]").status_code == 200  # the mock takes anything
    assert (plain.prefill.served, skipped("no_prompt"), skipped("stored_response")) == (
        before[0],
        before[1] + 1,
        before[2],
    )
    assert post(plain, "/v1/responses", {"input": "x", "previous_response_id": "r"}).status_code == 200
    assert (plain.prefill.served, skipped("stored_response")) == (before[0], before[2] + 1)


@pytest.mark.parametrize("stage", ["prefill", "decode"])
@pytest.mark.parametrize("status", [400, 401, 404, 422, 429])
def test_4xx_comes_through_unchanged(plain: Stack, stage: str, status: int) -> None:
    port = plain.prefill_port if stage == "prefill" else plain.decode_port
    mock = f"{stage}.status={status}"
    direct = httpx.post(f"http://127.0.0.1:{port}{COMPLETIONS}", json={"prompt": "x"}, headers={"x-mock": mock})
    through = post(plain, COMPLETIONS, {"prompt": "x"}, mock)
    assert (through.status_code, through.content) == (direct.status_code, direct.content) == (status, direct.content)
    assert through.headers["content-type"] == "application/json"


def test_decode_5xx_comes_through_unchanged(plain: Stack) -> None:
    assert post(plain, COMPLETIONS, {"prompt": "x"}, "decode.status=500").json()["error"]["type"] == "mock"
    streamed = post(plain, COMPLETIONS, {"prompt": "x", "stream": True}, "decode.status=503")
    assert streamed.status_code == 503


def test_prefill_5xx_is_decoded_without_it(plain: Stack) -> None:
    response = post(plain, COMPLETIONS, {"prompt": "x"}, "prefill.status=500")
    assert response.status_code == 200, response.text
    assert response.headers["x-kv-state"] == "none"
    assert metric(plain, 'disagg_prefill_skipped_total{reason="server_error"}') >= 1


def test_refused_forced_tool_call_is_asked_again_of_the_decoder(plain: Stack) -> None:
    body = {"messages": [], "tools": [{}], "tool_choice": "required"}
    assert post(plain, CHAT, body, "prefill.status=400").status_code == 200


def cut_stream(made: Stack, mock: str) -> bytes:
    """Body of a stream that must not be complete."""
    headers = {**JSON, "x-mock": mock}
    connection = http.client.HTTPConnection("127.0.0.1", made.proxy.port, timeout=DEADLINE_S)
    connection.request("POST", COMPLETIONS, json.dumps({"prompt": "x", "stream": True}), headers)
    response = connection.getresponse()
    with pytest.raises(http.client.IncompleteRead) as caught:
        response.read()
    connection.close()
    return caught.value.partial


@pytest.mark.parametrize(
    "mock", ["decode.cut=2", "decode.cut=2;soft=1", "decode.cut=3;split=5", "decode.cut=1;size=99999"]
)
def test_a_cut_stream_ends_with_an_error_event(plain: Stack, mock: str) -> None:
    response = cut_stream(plain, mock)
    events = response.split(b"\n\n")
    assert events.pop() == b""
    error = json.loads(events.pop().removeprefix(b"data: "))["error"]
    assert (error["stage"], error["code"]) == ("decode", 503)
    for event in events:
        json.loads(event.removeprefix(b"data: "))  # none was cut
    assert b"[DONE]" not in response


def test_an_answer_cut_before_its_end_is_an_error(plain: Stack) -> None:
    assert_openai_error(post(plain, COMPLETIONS, {"prompt": "x"}, "decode.cut=0"), 503, "decode")


def test_body_limit() -> None:
    with stack("--max-body-bytes", "1000") as made:
        assert post(made, COMPLETIONS, {"prompt": "x" * 900}).status_code == 200
        assert_openai_error(post(made, COMPLETIONS, {"prompt": "x" * 1000}), 413, "proxy")

        def parts() -> Iterator[bytes]:
            for _ in range(200):
                yield b"x" * 100_000

        long = httpx.post(made.url + COMPLETIONS, content=parts(), headers=JSON, timeout=DEADLINE_S)
        assert_openai_error(long, 413, "proxy")
        assert made.prefill.served == 1


def test_slow_senders_are_ended() -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n"
    with stack("--client-timeout-s", "1") as made, concurrent.futures.ThreadPoolExecutor(3) as pool:
        stuck, silent, slow = pool.map(lambda data: raw(made, data), (head + b"{", b"", b"GET /v1/mod"))
    assert b"HTTP/1.1 408" in stuck
    assert (silent, slow) == (b"", b"")


def test_servers_that_are_down() -> None:
    with stack() as made:
        made.proxy.stop()
        flags = ("--decoder-port", str(made.decode_port), "--prefiller-port", str(dead_port()))
        proxy = ProxyProcess(*flags)
        try:
            for _ in range(3):
                assert httpx.post(proxy.url + COMPLETIONS, json={"prompt": "x"}).status_code == 200
            assert httpx.get(proxy.url + "/ready").status_code == 503
            assert httpx.get(proxy.url + "/health").status_code == 200
            proxy.stop()  # after which all of its messages are read
            assert sum("prefill failed" in line for line in proxy.messages) == 1
        finally:
            proxy.stop()
        proxy = ProxyProcess(*flags, "--prefill-failure", "fail")
        try:
            assert_openai_error(httpx.post(proxy.url + COMPLETIONS, json={"prompt": "x"}), 503, "prefill")
        finally:
            proxy.stop()
        proxy = ProxyProcess("--prefiller-port", str(made.prefill_port), "--decoder-port", str(dead_port()))
        try:
            for body in ({"prompt": "x"}, {"prompt": "x", "stream": True}):
                assert_openai_error(httpx.post(proxy.url + COMPLETIONS, json=body), 503, "decode")
        finally:
            proxy.stop()


def test_deadlines() -> None:
    with stack("--decode-timeout-s", "0.3") as made:
        assert_openai_error(post(made, COMPLETIONS, {"prompt": "x"}, "decode.delay=30"), 504, "decode")
    with stack("--prefill-timeout-s", "0.3") as made:
        slow_prefill = post(made, COMPLETIONS, {"prompt": "x"}, "prefill.delay=30")
        assert slow_prefill.status_code == 200
        assert slow_prefill.headers["x-kv-state"] == "none"
    with stack("--stream-idle-timeout-s", "0.3") as made:
        received = cut_stream(made, "decode.hang=2")
        assert b'"code": 504' in received
        assert b"[DONE]" not in received
        wait_until(lambda: made.decode.running == 0, "the decode mock is free")


# -- cancel and back-pressure


@pytest.mark.parametrize(
    ("mock", "stage", "stream"),
    [("prefill.delay=60", "prefill", False), ("prefill.delay=60", "prefill", True),
     ("decode.delay=60", "decode", False), ("decode.delay=60", "decode", True),
     ("decode.hang=2", "decode", True), ("decode.chunks=1000000;decode.gap=0.001", "decode", True)],
)  # fmt: skip
def test_hang_up_reaches_the_server(plain: Stack, mock: str, stage: str, stream: bool) -> None:
    state = plain.prefill if stage == "prefill" else plain.decode
    before = state.aborted
    body = json.dumps({"prompt": "x", "stream": stream}).encode()
    sock = plain.proxy.connect()
    sock.sendall(
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nx-request-id: gone\r\n"
        b"x-mock: %b\r\ncontent-length: %d\r\n\r\n%b" % (mock.encode(), len(body), body)
    )
    if "hang" in mock or "chunks" in mock:
        sock.recv(100)
    else:
        wait_until(lambda: state.running, "the request reaches the mock")
    sock.close()
    wait_until(lambda: state.aborted > before, "the mock sees the hang-up")  # long before it would answer
    wait_until(lambda: state.running == 0, "the mock is free")
    assert plain.proxy.access_line("gone")["outcome"] == "client_gone"


def test_a_connection_that_ended_takes_no_answer() -> None:
    """Between its end and connection_lost() uvloop's transport raises; the end of the client is no error."""

    class Ended:
        def is_closing(self) -> bool:
            return True

        def write(self, data: bytes) -> None:
            raise RuntimeError("the handler is closed")

        writelines = write

    channel = types.SimpleNamespace(transport=Ended(), write_paused=False)
    client = ClientRequest(channel, "GET", "/", b"/", [], "1.1", True)  # type: ignore[arg-type]
    client.answer(200, [], b"body")
    assert client.begin(200, []) is True
    client.send(b"part")


def test_slow_readers_bound_memory(plain: Stack) -> None:
    count = 200
    body = json.dumps({"prompt": "x", "stream": True}).encode()
    request = (
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        b"x-mock: decode.chunks=100000;decode.size=2000\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
    )
    assert post(plain, COMPLETIONS, {"prompt": "x"}).status_code == 200
    before = plain.proxy.resident_bytes()
    socks = []
    for _ in range(count):
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", plain.proxy.port))
        sock.sendall(request)
        socks.append(sock)

    def all_stuck() -> bool:
        # Nothing moves any more: every stream waits for its reader.
        first = metric_of_time(plain)
        time.sleep(0.3)
        return metric_of_time(plain) - first < 0.1 and plain.decode.running == count

    try:
        wait_until(all_stuck, "all streams wait for their readers", 60)
        grown = plain.proxy.resident_bytes() - before
        assert grown < count * 500_000, f"{grown / count:.0f} bytes for each stream"
        # Other clients are served meanwhile.
        assert post(plain, COMPLETIONS, {"prompt": "x"}).status_code == 200
    finally:
        for sock in socks:
            sock.close()
    wait_until(lambda: plain.decode.running == 0, "all decode requests were cancelled")


def metric_of_time(made: Stack) -> float:
    """CPU seconds of the proxy."""
    with open(f"/proc/{made.proxy.process.pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_memory_is_given_back_when_nothing_is_left_to_do() -> None:
    with stack() as made:
        assert post(made, COMPLETIONS, {"prompt": "x"}).status_code == 200
        memory = made.proxy.resident_bytes()
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            lengths = pool.map(lambda _: len(post(made, COMPLETIONS, {}, "decode.size=6000000").content), range(16))
            assert min(lengths) > 6_000_000
        wait_until(lambda: made.proxy.resident_bytes() < 1.1 * memory, f"memory is back at {memory} bytes")


def test_a_reader_that_never_reads_is_ended() -> None:
    with stack("--stream-idle-timeout-s", "0.4") as made:
        body = b'{"prompt":"x","stream":true}'
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", made.proxy.port))
        sock.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nx-request-id: stuck\r\n"
            b"x-mock: decode.chunks=100000;decode.size=5000\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
        )
        assert made.proxy.access_line("stuck")["outcome"] == "client_stalled"
        wait_until(lambda: made.decode.running == 0, "the decode request was cancelled")
        sock.close()


# -- health, metrics, log


def test_metrics_and_log() -> None:
    with stack() as made:
        for _ in range(3):
            post(made, COMPLETIONS, {"prompt": "hello"})
        streamed = {"prompt": "hello", "stream": True, "stream_options": {"include_usage": True}}
        post(made, CHAT, streamed, request_id="logged")
        post(made, COMPLETIONS, b"{")
        assert metric(made, 'disagg_requests_total{outcome="ok",route="/v1/completions",stage="decode"}') == 3
        assert metric(made, 'disagg_requests_total{outcome="bad_request",route="/v1/completions",stage="proxy"}') == 1
        assert metric(made, "disagg_prompt_tokens_total") == 20
        assert metric(made, "disagg_reused_tokens_total") == 16
        assert metric(made, "disagg_full_reuse_requests_total") == 4
        for name in ("prefill", "kv_wait"):
            assert metric(made, f"disagg_{name}_seconds_count") == 4
        assert metric(made, "disagg_ttft_seconds_count") == 1
        assert metric(made, "disagg_e2e_seconds_count") == 5
        assert metric(made, 'disagg_in_flight{stage="decode"}') == 0
        name = f'disagg_upstream_up{{role="decode",upstream="http://127.0.0.1:{made.decode_port}"}}'
        assert wait_until(lambda: metric(made, name), "the decoder is up") == 1
        line = made.proxy.access_line("logged")
        assert (line["status"], line["outcome"], line["prefill"], line["kv_state"]) == (200, "ok", "ok", "stored")
        assert (line["prompt_tokens"], line["reused_tokens"]) == (5, 4)
        for key in ("total_ms", "prefill_ms", "decode_ms", "ttft_ms"):
            assert 0 <= line[key] < 10_000


def test_tokens_of_messages_are_counted_with_the_cached_ones(plain: Stack) -> None:
    full = metric(plain, "disagg_full_reuse_requests_total")
    response = post(plain, "/v1/messages", {"messages": []})
    assert (response.headers["x-prompt-tokens"], response.headers["x-reused-tokens"]) == ("10", "7")
    body = {"messages": [], "stream": True, "stream_options": {"include_usage": True}}
    post(plain, "/v1/messages", body, request_id="messages")
    line = plain.proxy.access_line("messages")
    assert (line["prompt_tokens"], line["reused_tokens"]) == (10, 7)
    assert metric(plain, "disagg_full_reuse_requests_total") == full


@pytest.mark.parametrize("stream", [False, True])
def test_what_was_loaded_counts_not_what_vllm_calls_cached(stream: bool) -> None:
    with stack() as made:
        more = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
        told = {"x-request-id": "failed-load", "x-mock": "decode.told=2"}
        response = post(made, COMPLETIONS, {"prompt": "hello", **more}, **told)
        assert response.headers["x-reused-tokens"] == "2"
        assert not [name for name in response.headers if name.startswith("x-kv-reused")]
        line = made.proxy.access_line("failed-load")
        assert (line["prompt_tokens"], line["reused_tokens"], line["cached_tokens"]) == (5, 2, 4)
        assert metric(made, "disagg_reused_tokens_total") == 2
        assert metric(made, "disagg_full_reuse_requests_total") == 0


@pytest.mark.parametrize("told", ["-1", "many", "9" * 30, ""])
def test_a_number_that_is_none_is_not_told(told: str) -> None:
    with stack() as made:
        response = post(made, COMPLETIONS, {"prompt": "hello"}, **{"x-mock": f"decode.told={told}"})
        assert response.headers["x-reused-tokens"] == "4"


def test_degraded_store_is_told_once() -> None:
    with stack() as made:
        for state in ("stored", "timeout", "failed", "timeout", "stored", "stored"):
            response = post(made, COMPLETIONS, {"prompt": "x"}, f"prefill.kv={state}")
            assert response.status_code == 200, response.text
            assert response.headers["x-kv-state"] == state
            assert metric(made, "disagg_kv_degraded") == float(state != "stored")
        assert metric(made, 'disagg_kv_state_total{state="timeout"}') == 2
        made.proxy.stop()  # after which all of its messages are read
        told = [line for line in made.proxy.messages if "the store" in line]
        assert ["WARNING" in line for line in told] == [True, False]


def test_ready_names_the_servers(plain: Stack) -> None:
    found = httpx.get(plain.url + "/ready").json()
    assert found == {
        "ready": True,
        "servers": {
            "prefill": {f"http://127.0.0.1:{plain.prefill_port}": True},
            "decode": {f"http://127.0.0.1:{plain.decode_port}": True},
        },
    }


# -- key, CORS, TLS


def test_api_key() -> None:
    with stack(env={"DISAGG_PROXY_API_KEY": "secret"}) as made:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}):
            assert_openai_error(post(made, COMPLETIONS, {"prompt": "x"}, **headers), 401, "proxy")
        assert post(made, COMPLETIONS, {"prompt": "x"}, authorization="bearer secret").status_code == 200
        assert httpx.get(made.url + "/v1/models").status_code == 401
        assert httpx.get(made.url + "/health").status_code == 200
        assert made.prefill.served == 1


def test_cors_only_when_asked_for(plain: Stack) -> None:
    assert "access-control-allow-origin" not in post(plain, COMPLETIONS, {}, origin="http://page").headers
    with stack("--cors-origin", "http://page") as made:
        asked = {"origin": "http://page", "access-control-request-method": "POST"}
        preflight = httpx.options(made.url + COMPLETIONS, headers=asked)
        assert preflight.status_code == 204
        assert "POST" in preflight.headers["access-control-allow-methods"]
        assert post(made, COMPLETIONS, {}, origin="http://page").headers["access-control-allow-origin"] == "http://page"
        assert "access-control-allow-origin" not in post(made, COMPLETIONS, {}, origin="http://other").headers


def test_tls(tmp_path: Any) -> None:
    key, certificate = str(tmp_path / "key.pem"), str(tmp_path / "cert.pem")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate,
               "-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.create_default_context(cafile=certificate)
    with stack("--ssl-keyfile", key, "--ssl-certfile", certificate, "--max-body-bytes", "100000") as made:
        url = f"https://127.0.0.1:{made.proxy.port}{COMPLETIONS}"
        with httpx.Client(verify=context) as client:
            assert client.post(url, json={"prompt": "x"}).status_code == 200
            streamed = client.post(url, json={"prompt": "x", "stream": True})
            assert streamed.content.endswith(b"data: [DONE]\n\n")
            long = client.post(url, json={"prompt": "x" * 3_000_000})
            assert_openai_error(long, 413, "proxy")


# -- signals


def streaming(made: Stack, gap: float, chunks: int) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    connection = http.client.HTTPConnection("127.0.0.1", made.proxy.port, timeout=DEADLINE_S)
    headers = {**JSON, "x-mock": f"decode.gap={gap};decode.chunks={chunks}"}
    connection.request("POST", COMPLETIONS, json.dumps({"prompt": "x", "stream": True}), headers)
    response = connection.getresponse()
    assert response.read(1)
    return connection, response


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_first_signal_drains(number: int) -> None:
    with stack() as made:
        connection, response = streaming(made, 0.02, 30)
        made.proxy.process.send_signal(number)
        assert response.read().endswith(b"data: [DONE]\n\n")
        connection.sock.settimeout(30)
        assert connection.sock.recv(1) == b""  # no further request is awaited
        connection.close()
        assert made.proxy.process.wait(DEADLINE_S) == -number
        with pytest.raises(ConnectionRefusedError):
            made.proxy.connect()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_ends_at_once(number: int) -> None:
    with stack() as made:
        connection, response = streaming(made, 0.02, 100_000)
        made.proxy.process.send_signal(number)
        wait_until(lambda: refuses(made), "no new connections")
        made.proxy.process.send_signal(number)
        made.proxy.process.wait(DEADLINE_S)
        with pytest.raises(http.client.IncompleteRead):
            response.read()
        connection.close()
        wait_until(lambda: made.decode.running == 0, "decode was cancelled")


def refuses(made: Stack) -> bool:
    try:
        made.proxy.connect().close()
    except ConnectionError:
        return True
    return False


def test_drain_has_a_deadline() -> None:
    with stack("--drain-timeout-s", "0.5") as made:
        connection, response = streaming(made, 0.02, 100_000)
        made.proxy.process.send_signal(signal.SIGTERM)
        with pytest.raises(http.client.IncompleteRead) as caught:
            response.read()
        assert b"shutting down" in caught.value.partial
        assert b'"code": 503' in caught.value.partial
        connection.close()
        made.proxy.process.wait(DEADLINE_S)


# -- many servers, many workers


def test_many_servers(tmp_path: Any) -> None:
    mocks = MockThread()
    prefills = [mocks.add("prefill") for _ in range(3)]
    decodes = [mocks.add("decode") for _ in range(2)]
    urls = lambda found: [f"http://127.0.0.1:{port}" for port, _ in found]  # noqa: E731
    path = tmp_path / "upstreams.json"
    path.write_text(json.dumps({"prefillers": urls(prefills), "decoders": urls(decodes)}))
    proxy = ProxyProcess("--upstreams-file", str(path))
    try:
        with httpx.Client(base_url=proxy.url) as client:
            for number in range(40):
                prompt = f"conversation {number} " * 200
                for turn in range(3):
                    assert client.post(COMPLETIONS, json={"prompt": prompt + "more " * turn * 200}).status_code == 200
            # Each conversation stayed on one prefill server, and all of them have some.
            homes: dict[str, set[int]] = {}
            for port, state in prefills:
                for request in state.requests:
                    if request["method"] == "POST":
                        prompt = json.loads(request["body"])["prompt"]
                        homes.setdefault(prompt[:16], set()).add(port)
            assert all(len(ports) == 1 for ports in homes.values())
            assert len(set.union(*homes.values())) == 3
            assert all(state.served == 60 for _, state in decodes)
            # Membership changes while requests run.
            path.write_text(json.dumps({"prefillers": urls(prefills[:1]), "decoders": urls(decodes[:1])}))
            wait_until(lambda: any("servers now" in line for line in proxy.messages), "the file is read again")
            served = decodes[1][1].served
            for _ in range(6):
                assert client.post(COMPLETIONS, json={"prompt": "x"}).status_code == 200
            assert decodes[1][1].served == served
            path.write_text("{")
            wait_until(lambda: any("stay the same" in line for line in proxy.messages), "the bad file is told")
            assert client.post(COMPLETIONS, json={"prompt": "x"}).status_code == 200
    finally:
        proxy.stop()
        mocks.close()


def test_a_dead_server_is_left_out() -> None:
    mocks = MockThread()
    port, state = mocks.add("decode")
    prefill_port, _ = mocks.add("prefill")
    urls = [f"http://127.0.0.1:{p}" for p in (port, dead_port())]
    flags = [f for url in urls for f in ("--decoder", url)]
    proxy = ProxyProcess(*flags, "--prefiller-port", str(prefill_port))
    try:
        for _ in range(20):
            assert httpx.post(proxy.url + COMPLETIONS, json={"prompt": "x"}).status_code == 200
        assert state.served == 20
        for url, up in zip(urls, (1, 0), strict=True):
            name = f'disagg_upstream_up{{role="decode",upstream="{url}"}}'
            wait_until(lambda name=name, up=up: metric(proxy, name) == up, f"the gauge of {url} is {up}")
        proxy.stop()  # after which all of its messages are read
        assert sum("is down" in line for line in proxy.messages) == 1
    finally:
        proxy.stop()
        mocks.close()


def test_workers() -> None:
    with stack("--workers", "2") as made:
        wait_until(lambda: httpx.get(made.url + "/health").status_code == 200, "up")
        total = 'disagg_requests_total{outcome="ok",route="/v1/completions",stage="decode"}'

        def burst(count: int) -> None:
            threads = [threading.Thread(target=post, args=(made, COMPLETIONS, {"prompt": "x"})) for _ in range(count)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

        burst(40)
        wait_until(lambda: metric(made, total) == 40, "all are counted")  # maybe after their answers: by another worker
        children = [int(p) for p in children_of(made.proxy.process.pid)]
        assert len(children) == 2
        os.kill(children[0], signal.SIGKILL)
        wait_until(
            lambda: len(set(children_of(made.proxy.process.pid)) - {str(children[0])}) == 2, "a new worker takes over"
        )
        burst(20)
        wait_until(lambda: metric(made, total) == 60, "all are counted")
        assert made.proxy.stop() == 128 + signal.SIGTERM
        for child in children:
            assert not os.path.exists(f"/proc/{child}")


def children_of(pid: int) -> list[str]:
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return file.read().split()
