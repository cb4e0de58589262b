"""The request path piece by piece: header fields, targets, answers' bytes, usage, places. No process, no socket."""

from __future__ import annotations

import asyncio
import json
import os
import types
from collections.abc import Coroutine
from typing import Any

import pytest

from disagg_prefill_lmcache_v1.proxy import access_log as access_log_module
from disagg_prefill_lmcache_v1.proxy.admission import Admission
from disagg_prefill_lmcache_v1.proxy.answers import pass_on, send_error
from disagg_prefill_lmcache_v1.proxy.app import create_app
from disagg_prefill_lmcache_v1.proxy.client_parser import ClientLimits, RequestParser, split_target
from disagg_prefill_lmcache_v1.proxy.client_request import ClientRequest
from disagg_prefill_lmcache_v1.proxy.errors import ProxyError, error_body
from disagg_prefill_lmcache_v1.proxy.header_fields import RequestHeaders, answer_lines, cors_lines
from disagg_prefill_lmcache_v1.proxy.metrics import Metrics
from disagg_prefill_lmcache_v1.proxy.relay import StreamRelay
from disagg_prefill_lmcache_v1.proxy.request import RequestContext
from disagg_prefill_lmcache_v1.proxy.settings import Settings
from disagg_prefill_lmcache_v1.proxy.steering import steering_field, steering_field_of
from disagg_prefill_lmcache_v1.proxy.usage import UsageMeter

HOP_BY_HOP = (
    "connection", "keep-alive", "proxy-connection", "proxy-authenticate", "proxy-authorization", "te", "trailer",
    "transfer-encoding", "upgrade", "content-length",
)  # fmt: skip


def headers(*pairs: tuple[str, str]) -> list[tuple[bytes, bytes, bytes]]:
    return [(name.lower().encode(), value.encode(), f"{name}: {value}\r\n".encode()) for name, value in pairs]


def context(path: str = "/v1/completions", **values: Any) -> RequestContext:
    request = RequestContext("POST", path, path.encode(), path, "id-1", b"", values.pop("cors", b""))
    for name, value in values.items():
        setattr(request, name, value)
    return request


class Transport:
    """Records what is written."""

    def __init__(self) -> None:
        self.written = b""
        self.writes = 0
        self.end = ""

    def is_closing(self) -> bool:
        return bool(self.end)

    def write(self, data: bytes) -> None:
        self.written += data
        self.writes += 1

    def writelines(self, parts: list[bytes]) -> None:
        self.write(b"".join(parts))

    def abort(self) -> None:
        self.end = "abort"


class Channel:
    """Connection of one request."""

    def __init__(self) -> None:
        self.transport = Transport()
        self.write_paused = False
        self.told: list[ClientRequest] = []
        self.taken: list[ClientRequest] = []

    def want_body(self, request: ClientRequest) -> None:
        pass

    def answered(self, request: ClientRequest) -> None:
        self.told.append(request)

    def take_request(self, request: ClientRequest) -> None:
        self.taken.append(request)


def client(method: str = "GET", version: str = "1.1", complete: bool = True) -> tuple[ClientRequest, Channel]:
    channel = Channel()
    request = ClientRequest(channel, method, "/", b"/", [], version, version == "1.1")  # type: ignore[arg-type]
    request.body_complete = complete
    return request, channel


# -- header fields


@pytest.mark.parametrize("name", [*HOP_BY_HOP, "host", "expect", "http2-settings", "x-kv-hold", "x-kv-anything"])
def test_fields_that_are_not_sent_on(name: str) -> None:
    value = "v" if name == "connection" else "x-a"  # only that one names others
    given = RequestHeaders(headers(("x-a", "1"), (name.title(), value), ("x-b", "2")))
    assert given.sent_on == [b"x-a: 1\r\n", b"x-b: 2\r\n"]


@pytest.mark.parametrize("name", [*HOP_BY_HOP, "x-request-id", "x-kv-state", "x-kv-wait-ms", "x-kv-reason"])
def test_fields_that_are_not_sent_back(name: str) -> None:
    value = "v" if name == "connection" else "x-a"
    lines = answer_lines(context(), headers(("x-a", "1"), (name.title(), value), ("x-kv", "2")))
    assert lines == [b"x-a: 1\r\n", b"x-kv: 2\r\n", b"x-request-id: id-1\r\n"]


@pytest.mark.parametrize("form", ["close, X-Mine", "x-mine", " x-mine , te"])
def test_fields_that_connection_names_stay_here(form: str) -> None:
    pairs = headers(("connection", "keep-alive"), ("X-Mine", "1"), ("x-other", "2"), ("Connection", form))
    assert RequestHeaders(pairs).sent_on == [b"x-other: 2\r\n"]
    assert answer_lines(context(), headers(("X-Mine", "1"), ("x-other", "2"), ("Connection", form)))[:-1] == [
        b"x-other: 2\r\n"
    ]
    for usual in ("close", "keep-alive", "Keep-Alive"):
        assert RequestHeaders(headers(("connection", usual), ("close", "1"))).sent_on == [b"close: 1\r\n"]


def test_what_is_known_of_a_request() -> None:
    pairs = (("Content-Type", "a/b"), ("Authorization", "Bearer x"), ("Origin", "o"), ("Content-Length", "3"),
             ("Transfer-Encoding", "chunked"), ("Expect", "100-Continue"), ("Host", "h"),
             ("X-Request-Id", "r.1"))  # fmt: skip
    given = RequestHeaders(headers(*pairs))
    assert (given.content_type, given.authorization, given.origin) == (b"a/b", b"Bearer x", b"o")
    assert (given.content_length, given.transfer_encoding, given.request_id) == (b"3", b"chunked", b"r.1")
    assert (given.expects_continue, given.hosts) == (True, 1)
    assert given.sent_on == [b"Content-Type: a/b\r\n", b"Authorization: Bearer x\r\n", b"Origin: o\r\n"]
    empty = RequestHeaders([])
    assert (empty.content_type, empty.request_id, empty.expects_continue, empty.hosts) == (b"", b"", False, 0)
    for bad in ("", "a b", "x" * 257, "a\x7f", "{}"):
        assert RequestHeaders(headers(("x-request-id", bad))).request_id == b""
    assert len(RequestHeaders(headers(("x-request-id", "x" * 256))).request_id) == 256


@pytest.mark.parametrize(
    ("pairs", "version", "fault"),
    [
        ((("host", "a"),), "1.1", ""),
        ((("host", ""),), "1.1", ""),
        ((), "1.1", "Host"),
        ((), "1.0", ""),
        ((("host", "a"),), "1.0", ""),
        ((("host", "a"), ("host", "b")), "1.0", "Host"),
        ((("host", "a"), ("Host", "a")), "1.1", "Host"),
        ((("host", "a"), ("transfer-encoding", "Chunked")), "1.1", ""),
        ((("host", "a"), ("transfer-encoding", "gzip, chunked")), "1.1", "chunked"),
        ((("host", "a"), ("transfer-encoding", "identity")), "1.1", "chunked"),
        ((("transfer-encoding", "chunked"),), "1.0", "chunked"),
    ],
)
def test_faults_of_a_head(pairs: tuple[tuple[str, str], ...], version: str, fault: str) -> None:
    found = RequestHeaders(headers(*pairs)).fault(version)
    assert fault in found
    assert bool(found) is bool(fault)


def test_lines_that_the_proxy_adds() -> None:
    lines = answer_lines(context(kv_state="stored", kv_wait_ms=1.26, kv_transfer_ms=0.0), [])
    assert lines == [b"x-request-id: id-1\r\nx-kv-state: stored\r\nx-kv-wait-ms: 1.3\r\nx-kv-transfer-ms: 0.0\r\n"]
    assert answer_lines(context(kv_state="none"), []) == [b"x-request-id: id-1\r\nx-kv-state: none\r\n"]
    mixed = headers(("Access-Control-Allow-Origin", "*"), ("x-a", "1"))
    assert answer_lines(context(cors=b"mine: 1\r\n"), mixed) == [
        b"x-a: 1\r\n",
        b"mine: 1\r\n",
        b"x-request-id: id-1\r\n",
    ]
    assert len(answer_lines(context(), mixed)) == 3


def test_origins() -> None:
    assert cors_lines(frozenset({b"http://a"}), b"http://b") == b""
    one = cors_lines(frozenset({b"http://a"}), b"http://a")
    assert b"access-control-allow-origin: http://a\r\n" in one
    assert b"vary: Origin\r\n" in one
    assert b"allow-credentials: true" in one
    every = cors_lines(frozenset({b"*"}), b"http://b")
    assert b"access-control-allow-origin: *\r\n" in every
    assert b"credentials" not in every


# -- the request line


@pytest.mark.parametrize(
    ("url", "found"),
    [
        (b"/", ("/", b"/")),
        (b"/a?b=/c?d", ("/a", b"/a?b=/c?d")),
        (b"/%61%2Fb?%61", ("/a/b", b"/%61%2Fb?%61")),
        (b"*", ("*", b"*")),
        (b"http://h", ("/", b"/")),
        (b"https://h:1/a?b", ("/a", b"/a?b")),
        (b"http://h?b", None),
        (b"http://u@h/a", None),
        (b"ftp://h/a", None),
        (b"/a#b", None),
        (b"http://h/a#b", None),
        (b"h:80", None),
        (b"", None),
    ],
)
def test_targets(url: bytes, found: object) -> None:
    assert split_target(url) == found


def parse(data: bytes, *, pieces: int = 0, **limits: int) -> tuple[RequestParser, list[ClientRequest]]:
    channel = Channel()
    parser = RequestParser(
        channel, ClientLimits(**{"head_bytes": 1000, "body_bytes": 1000, **limits}, timeout_s=1, stall_s=1)
    )  # type: ignore[arg-type]
    for start in range(0, len(data), pieces or len(data)):
        if not parser.ended:
            parser.feed(data[start : start + (pieces or len(data))])
    return parser, channel.taken


def error_of(request: ClientRequest) -> int:
    """Status of a request's error, 0 if it has none."""
    try:
        request.check()
    except ProxyError as error:
        return error.status
    return 0


def body_of(request: ClientRequest) -> bytes:
    return asyncio.run(request.body())


@pytest.mark.parametrize("pieces", [0, 1, 7])
def test_requests_are_parsed_in_any_pieces(pieces: int) -> None:
    data = b"POST /a?b HTTP/1.1\r\nHost: x\r\nX-A:  v \t\r\ncontent-length: 3\r\n\r\nabc"
    upgrade = data.replace(b"X-A", b"connection: upgrade\r\nupgrade: h2c\r\nX-A")
    parser, taken = parse(data + upgrade + b"GET / HTTP/1.0\r\n\r\nrest", pieces=pieces)
    assert [(r.method, r.path, r.target, r.version, r.keep_alive) for r in taken] == [
        ("POST", "/a", b"/a?b", "1.1", True), ("POST", "/a", b"/a?b", "1.1", True), ("GET", "/", b"/", "1.0", False),
    ]  # fmt: skip
    assert taken[0].headers[1] == (b"x-a", b"v", b"X-A: v\r\n")
    assert [body_of(r) for r in taken] == [b"abc", b"abc", b""]
    assert [r.body_size for r in taken] == [3, 3, 0]
    assert parser.ended
    assert parser.receiving is None


def test_a_request_is_received_until_its_end() -> None:
    parser, (request,) = parse(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\n\r\nab")
    assert parser.receiving is request
    assert (request.body_complete, parser.in_head, parser.ended) == (False, False, False)
    parser.feed(b"cGET /x HTTP/1.1\r\n")
    assert (parser.receiving, request.body_complete, parser.in_head) == (None, True, True)


def test_limits_of_the_parser() -> None:
    head = b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
    _, taken = parse(head + b"3e8\r\n" + b"x" * 1000 + b"\r\n0\r\n\r\n")
    assert (error_of(taken[0]), taken[0].body_complete) == (0, True)
    parser, taken = parse(head + b"3e9\r\n" + b"x" * 1001 + b"\r\n0\r\n\r\nGET / HTTP/1.1\r\nhost: x\r\n\r\n")
    assert ([error_of(r) for r in taken], parser.ended) == ([413], True)
    for value, status in ((966, 0), (967, 431), (968, 431), (5000, 431)):  # a field counts 32 bytes more
        line = b"GET / HTTP/1.1\r\nx: " + b"v" * value + b"\r\n\r\n"
        parser, taken = parse(line)
        assert ([error_of(r) for r in taken], parser.ended) == ([status], bool(status))
        assert [error_of(r) for r in parse(line, pieces=500)[1]] == [status]
    assert [error_of(r) for r in parse(b"GET /" + b"a" * 1000 + b" HTTP/1.1\r\n\r\n")[1]] == [431]
    assert [error_of(r) for r in parse(b"GET /" + b"a" * 9000, pieces=1000)[1]] == [431]
    assert [error_of(r) for r in parse(head + b"1;" + b"e" * 9000, pieces=1000)[1]] == [400]
    assert [error_of(r) for r in parse(head + b"1;e\r\na\r\n" * 300 + b"0\r\n\r\n", pieces=100)[1]] == [0]


# -- the answer


def test_a_whole_answer_is_one_write() -> None:
    request, channel = client()
    request.answer(200, [b"a: 1\r\n"], b"body")
    assert channel.transport.written == b"HTTP/1.1 200 OK\r\na: 1\r\ncontent-length: 4\r\n\r\nbody"
    assert (channel.transport.writes, channel.told) == (1, [request])
    assert request.started
    assert request.answer_complete
    long, channel = client()
    long.answer(200, [], b"x" * 70_000)
    assert channel.transport.written.endswith(b"content-length: 70000\r\n\r\n" + b"x" * 70_000)


@pytest.mark.parametrize(
    ("method", "status", "length", "expected"),
    [
        ("HEAD", 200, 42, b"content-length: 42\r\n\r\n"),
        ("HEAD", 200, None, b"HTTP/1.1 200 OK\r\n\r\n"),
        ("GET", 204, None, b"HTTP/1.1 204 No Content\r\n\r\n"),
        ("GET", 304, None, b"Not Modified\r\n\r\n"),
        ("GET", 599, None, b"HTTP/1.1 599 \r\ncontent-length: 4\r\n\r\nbody"),
    ],
)
def test_answers_without_a_body(method: str, status: int, length: int | None, expected: bytes) -> None:
    request, channel = client(method)
    request.answer(status, [], b"body", length)
    assert channel.transport.written.endswith(expected)


def test_an_answer_before_the_bodys_end_closes() -> None:
    request, channel = client("POST", complete=False)
    request.answer(401, [], b"")
    assert b"connection: close\r\n" in channel.transport.written
    assert not request.keep_alive
    old, channel = client("GET", "1.0")
    old.answer(200, [], b"")
    assert b"connection: close\r\n" in channel.transport.written


@pytest.mark.parametrize(
    ("version", "length", "framing", "sent"),
    [
        ("1.1", None, b"transfer-encoding: chunked\r\n", b"2\r\nab\r\n0\r\n\r\n"),
        ("1.1", 2, b"content-length: 2\r\n", b"ab"),
        ("1.0", None, b"connection: close\r\n", b"ab"),
    ],
)
def test_streams(version: str, length: int | None, framing: bytes, sent: bytes) -> None:
    request, channel = client("POST", version)
    assert request.begin(200, [], length) is (b"chunked" in framing)
    assert channel.transport.written == b"HTTP/1.1 200 OK\r\n" + framing + b"\r\n"
    request.send(b"ab")
    request.end()
    assert channel.transport.written.endswith(b"\r\n\r\n" + sent)
    assert channel.told == [request]


def test_a_cut_stream_has_no_last_chunk() -> None:
    request, channel = client("POST")
    request.begin(200, [])
    request.cut(b"data: e\n\n")
    assert channel.transport.written.endswith(b"\r\n\r\n9\r\ndata: e\n\n\r\n")
    assert (request.keep_alive, channel.told) == (False, [request])
    request, channel = client("POST")
    request.cut(b"words", at_once=True)
    assert (channel.transport.end, channel.transport.written) == ("abort", b"")


def test_nothing_is_written_to_who_is_gone() -> None:
    request, channel = client("POST")
    request.gone = True
    request.answer(200, [], b"")
    request.cut(b"words")
    request.end()
    assert (channel.transport.written, channel.told) == (b"", [])


def test_errors_of_the_proxy() -> None:
    found = json.loads(error_body(503, "gone", "decode", "r"))["error"]
    assert found == {"message": "gone (stage: decode, request id: r)", "type": "ServiceUnavailableError", "param": None,
                     "code": 503, "stage": "decode", "request_id": "r"}  # fmt: skip
    for status, line in (
        (401, b"www-authenticate: Bearer\r\n"),
        (429, b"retry-after: 1\r\n"),
        (503, b"retry-after: 1"),
    ):
        one, channel = client("POST")
        noted = context(cors=b"c: 1\r\n")
        send_error(one, noted, ProxyError(status, "m", "proxy", "overload" if status != 401 else "unauthorized", "d"))
        assert line in channel.transport.written
        assert b"\r\nc: 1\r\n" in channel.transport.written
        assert (noted.status, noted.stage, noted.error_detail) == (status, "proxy", "d")
        assert one.keep_alive
    plain, channel = client("POST")
    send_error(plain, context(), ProxyError(503, "m", "decode", "refused"))
    assert b"retry-after" not in channel.transport.written


@pytest.mark.parametrize(
    ("status", "outcome"),
    [(200, "ok"), (302, "ok"), (400, "client_error"), (499, "client_error"), (500, "server_error")],
)
def test_a_servers_answer_is_passed_on(status: int, outcome: str) -> None:
    one, channel = client("POST")
    noted = context()
    response = types.SimpleNamespace(status=status, body=b"abc", headers=headers(("x-a", "1")), length=3)
    pass_on(one, noted, response, b"more: 1\r\n")  # type: ignore[arg-type]
    assert channel.transport.written.endswith(
        b"x-a: 1\r\nx-request-id: id-1\r\nmore: 1\r\ncontent-length: 3\r\n\r\nabc"
    )
    assert (noted.status, noted.outcome, noted.sent) == (status, outcome, 3)


# -- streams of events


def relayed(*parts: bytes, usage: bool = True) -> tuple[bytes, StreamRelay, RequestContext]:
    async def run() -> tuple[bytes, StreamRelay, RequestContext]:
        metrics, noted = Metrics(), context(want_usage=usage)
        one, channel = client("POST", "1.0")
        response: Any = types.SimpleNamespace(connection=None, event_stream=True)
        relay = StreamRelay(metrics, metrics.index("disagg_itl_seconds"), noted, one, response)
        for part in parts:
            relay.payload(part)
        return channel.transport.written, relay, noted

    return asyncio.run(run())


def test_no_event_is_cut() -> None:
    assert relayed(b"data: 1\n\n")[0] == b"data: 1\n\n"
    assert relayed(b"data: 1\n\ndata: 2")[0] == b"data: 1\n\n"
    assert relayed(b"data: 1\r\n\r\ndata: 2")[0] == b"data: 1\r\n\r\n"
    assert relayed(b"dat", b"a: 1\n", b"\nda")[0] == b"data: 1\n\n"
    written, relay, noted = relayed(b'data: {"usage":1}\n\n', b"data: [DONE]\n\n")
    assert (relay.usage, noted.sent) == (b'data: {"usage":1}\n\n', len(written))
    assert noted.ttft_s >= 0
    assert relayed(b'data: {"usage":1}\n\n', usage=False)[1].usage == b""


# -- usage


@pytest.mark.parametrize(
    ("path", "text", "prompt", "cached", "full"),
    [
        ("/v1/completions", b'"usage": {"prompt_tokens": 10, "cached_tokens": 9}', 10, 9, 1),
        ("/v1/completions", b'"usage":{"prompt_tokens":10,"d":{"cached_tokens":8}}', 10, 8, 0),
        ("/v1/completions", b'"usage":{"prompt_tokens":10}', 10, 0, 0),
        ("/v1/completions", b'"prompt_tokens":3 "usage":{"prompt_tokens":10,"cached_tokens":10}', 10, 10, 1),
        ("/v1/responses", b'"usage":{"input_tokens":7,"cached_tokens":2}', 7, 2, 0),
        ("/v1/messages",
         b'"usage":{"input_tokens":1,"cache_creation_input_tokens":2,"cache_read_input_tokens":7}', 10, 7, 0),
        ("/v1/messages", b'"usage":{"input_tokens":1,"cache_read_input_tokens":7}', 8, 7, 1),
    ],
)  # fmt: skip
def test_usage_is_read(path: str, text: bytes, prompt: int, cached: int, full: int) -> None:
    metrics, noted = Metrics(), context(path)
    before = b'{"text":"' + b"x" * 1100 + b'",'
    lines = UsageMeter(metrics).note_answer(noted, before + text + b"}")
    assert (noted.prompt_tokens, noted.cached_tokens, noted.reused_tokens) == (prompt, cached, cached)
    assert lines == b"x-prompt-tokens: %d\r\n" % prompt
    values = {name: metrics.values[metrics.index(f"disagg_{name}")] for name in
              ("usage_reports", "prompt_tokens", "reused_tokens", "full_reuse_requests")}  # fmt: skip
    assert values == {"usage_reports": 1, "prompt_tokens": prompt, "reused_tokens": cached, "full_reuse_requests": full}


@pytest.mark.parametrize("text", [b"", b'"prompt_tokens": 3', b'"usage": null'])
def test_no_usage_is_no_usage(text: bytes) -> None:
    metrics, noted = Metrics(), context()
    assert UsageMeter(metrics).note_answer(noted, text) == b""
    assert noted.prompt_tokens == -1
    assert metrics.values[metrics.index("disagg_usage_reports")] == 0


# -- steering


def test_steering_fields() -> None:
    raw = lambda **fields: {name: json.dumps(value).encode() for name, value in fields.items()}  # noqa: E731
    assert steering_field(raw(prompt="kv_transfer_params")) == ""
    assert steering_field(raw(kv_transfer_params=None, vllm_xargs={"a": 1}, sampling_params=3)) == ""
    assert steering_field(raw(ec_transfer_params=0)) == "ec_transfer_params"
    assert steering_field(raw(sampling_params={"extra_args": [{"kv_transfer_params": 1}]})).startswith(
        "sampling_params."
    )
    assert steering_field_of(b'{"a": [{"b": {"kv_transfer_params": {}}}]}') == "a.b.kv_transfer_params"
    assert steering_field_of(b'{"kv\\u005ftransfer_params": 1}') == "kv_transfer_params"
    assert steering_field_of(b'{"a": "kv_transfer_params", "b": "\\u0041"}') == ""
    assert steering_field_of(b'name="ec_transfer_params"') == "ec_transfer_params"
    assert steering_field_of(b"x_transfer_params " + b"[" * 100_000) == ""


# -- places


def test_places() -> None:
    async def run() -> None:
        metrics = Metrics()
        places = Admission(2, 2, 5.0, metrics)
        waiting = lambda: metrics.values[metrics.index("disagg_in_flight", "queue")]  # noqa: E731
        await places.enter()
        await places.enter()
        order: list[int] = []

        async def later(number: int) -> None:
            await places.enter()
            order.append(number)

        tasks = [asyncio.create_task(later(number)) for number in range(2)]
        await asyncio.sleep(0)
        assert waiting() == 2
        with pytest.raises(ProxyError) as caught:
            await places.enter()
        assert (caught.value.status, caught.value.outcome) == (429, "overload")
        tasks[0].cancel()
        await asyncio.gather(tasks[0], return_exceptions=True)
        assert waiting() == 1
        places.leave()
        places.leave()
        await tasks[1]
        assert (order, waiting()) == ([1], 0)
        await places.enter()  # one of two was given back to nobody
        third = asyncio.create_task(places.enter())
        await asyncio.sleep(0)
        places.leave()  # given to the third, which is cancelled before it runs
        third.cancel()
        await asyncio.gather(third, return_exceptions=True)
        await asyncio.wait_for(places.enter(), 1)

    within(run())


def test_a_place_that_does_not_come() -> None:
    async def run() -> None:
        places = Admission(1, 1, 0.01, Metrics())
        await places.enter()
        with pytest.raises(ProxyError, match="no place became free") as caught:
            await places.enter()
        assert caught.value.status == 503
        places.leave()
        await asyncio.wait_for(places.enter(), 1)

    within(run())


def within(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(coroutine, 10))


def test_the_last_lines_of_the_access_log_are_written_when_the_proxy_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the end of the lifespan: a signal ends the process right after it."""
    monkeypatch.setattr(access_log_module, "_FLUSH_S", 600.0)
    reader, writer = os.pipe()
    access_log = access_log_module.AccessLog(writer, Metrics())
    app = create_app(Settings(), Metrics(), access_log)

    async def live() -> None:
        async with app.router.lifespan_context(app):
            access_log.write(RequestContext("GET", "/v1/models", b"/v1/models", "other", "last", b""), 0.1)

    asyncio.run(live())
    os.close(writer)
    with os.fdopen(reader) as lines:
        assert json.loads(lines.read())["request_id"] == "last"
