"""A head that came before on the connection is not parsed again, and nothing but the very same head is taken for it."""

from __future__ import annotations

import asyncio
import itertools
import socket

import pytest
from proxy_harness import stack

from disagg_prefill_lmcache_v1.proxy.client_parser import ClientLimits, RequestParser
from disagg_prefill_lmcache_v1.proxy.client_request import ClientRequest
from disagg_prefill_lmcache_v1.proxy.errors import ProxyError
from disagg_prefill_lmcache_v1.proxy.upstream.errors import UpstreamError
from disagg_prefill_lmcache_v1.proxy.upstream.head import known_heads, parse_head

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-A: 1\r\nContent-Length: %d\r\nX-B: 2\r\n\r\n"


class Sink:
    """What takes the requests of a parser."""

    transport = None
    write_paused = False

    def __init__(self) -> None:
        self.taken: list[ClientRequest] = []

    def take_request(self, request: ClientRequest) -> None:
        self.taken.append(request)


def made(**limits: int) -> tuple[RequestParser, list[ClientRequest]]:
    sink = Sink()
    found = ClientLimits(**{"head_bytes": 1000, "body_bytes": 1000, **limits}, timeout_s=1, stall_s=1)
    return RequestParser(sink, found), sink.taken  # type: ignore[arg-type]


def warmed(head: bytes = HEAD, **limits: int) -> tuple[RequestParser, list[ClientRequest]]:
    """A parser that has had such a head three times, and where it puts what follows."""
    parser, taken = made(**limits)
    for _ in range(3):
        parser.feed(head % 3 + b"abc")
    assert [bool(request.known) for request in taken] == [False, False, head is HEAD]
    taken.clear()
    return parser, taken


def outcome(request: ClientRequest) -> object:
    """All that is known of a request and does not tell how it was found."""
    try:
        request.check()
    except ProxyError as error:
        return error.status
    body = asyncio.run(request.body()) if request.body_complete else None
    names = [name for name, _, _ in request.headers]
    return request.method, request.path, request.target, request.version, request.keep_alive, names, body


@pytest.mark.parametrize("size", [0, 1, 3, 9, 10, 999])
@pytest.mark.parametrize("pieces", [0, 1, 7, 50])
def test_the_same_head_with_any_body(size: int, pieces: int) -> None:
    data = HEAD % size + b"b" * size
    end = len(data) - size
    parser, taken = warmed()
    parser.feed(data[:end])  # as clients do that write head and body one after the other
    for start in range(end, len(data), pieces or 1000):
        assert parser.receiving is taken[0]
        parser.feed(data[start : start + (pieces or 1000)])
    parser.feed(data)  # and all at once
    plain, expected = made()
    plain.feed(data)
    assert [outcome(request) for request in taken] == [outcome(expected[0])] * 2
    assert [request.body_size for request in taken] == [size, size]
    assert all(request.known for request in taken)
    assert taken[0].known.lines == b"X-A: 1\r\nX-B: 2\r\n"
    assert (parser.receiving, parser.in_head, parser.ended) == (None, False, False)


def test_a_head_that_differs_by_one_byte_is_parsed_anew() -> None:
    right = HEAD % 3 + b"abc"
    for place, byte in itertools.product(range(len(HEAD % 3)), (b"\x00", b"\r", b"\n", b" ", b":", b"~", b"9", b"-")):
        data = right[:place] + byte + right[place + 1 :]
        if data == right or data[:place].endswith(b"Content-Length: "):  # another length
            continue
        parser, taken = warmed()
        parser.feed(data)
        plain, expected = made()
        plain.feed(data)
        assert [outcome(request) for request in taken] == [outcome(request) for request in expected], data
        assert [request.headers for request in taken] == [request.headers for request in expected], data
        assert not any(request.known for request in taken), data
        assert (parser.ended, parser.in_head) == (plain.ended, plain.in_head)


@pytest.mark.parametrize(
    "value", [b"", b"+3", b"-1", b"3, 3", b"0x3", b"\xb2", b"3_0", b"1" * 40, b"3\r\nContent-Length: 4"]
)
def test_lengths_that_are_none_are_refused(value: bytes) -> None:
    data = (HEAD % 3).replace(b": 3\r", b": " + value + b"\r") + b"abc"
    parser, taken = warmed()
    parser.feed(data)
    plain, expected = made()
    plain.feed(data)
    assert [outcome(request) for request in taken] == [outcome(request) for request in expected]
    assert not any(request.known for request in taken)


def test_limits_hold_for_a_known_head_too() -> None:
    parser, taken = warmed()
    parser.feed(HEAD % 1001 + b"b" * 1001)
    assert ([outcome(request) for request in taken], parser.ended) == ([413], True)
    size = len(HEAD % 3) - len(b"POST  HTTP/1.1\r\n") - 4 * len(b": \r\n") - 2 + 4 * 32
    parser, taken = warmed(head_bytes=size, body_bytes=10**9)
    parser.feed(HEAD % 100)  # two digits too long
    assert [outcome(request) for request in taken] == [431]


def test_what_follows_a_body_is_a_request() -> None:
    parser, taken = warmed()
    other = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
    parser.feed(HEAD % 5 + b"ab")
    parser.feed(b"cde" + other + HEAD % 2 + b"xy")
    assert [request.path for request in taken] == ["/v1/completions", "/health", "/v1/completions"]
    assert [asyncio.run(request.body()) for request in taken] == [b"abcde", b"", b"xy"]
    parser.feed(HEAD % 1 + b"z" + other)
    assert [request.path for request in taken[3:]] == ["/v1/completions", "/health"]


def test_nothing_is_taken_after_a_request_that_closes() -> None:
    parser, taken = warmed()
    parser.feed(HEAD % 5 + b"ab")
    taken[0].keep_alive = False  # refused, or the proxy shuts down
    parser.feed(b"cde" + HEAD % 1 + b"z")
    assert (len(taken), parser.ended) == (1, True)


@pytest.mark.parametrize(
    "line",
    [b"Transfer-Encoding: chunked", b"Connection: close", b"Connection: x-a", b"Upgrade: h2c", b"Expect: 100-continue"],
)
def test_heads_that_say_more_are_parsed_each_time(line: bytes) -> None:
    head = HEAD.replace(b"X-B: 2", line)
    if b"chunked" in line:
        head = head.replace(b"Content-Length: %d\r\n", b"") + b"3\r\nabc\r\n0\r\n\r\n"
    parser, taken = made()
    for _ in range(4):
        parser.feed(head if b"chunked" in line else head % 3 + b"abc")
    assert taken
    assert not any(request.known for request in taken)


def answer(sock: socket.socket) -> bytes:
    """One answer with a Content-Length."""
    received = b""
    while b"\r\n\r\n" not in received:
        part = sock.recv(65536)
        assert part, "the connection has ended"
        received += part
    head, _, body = received.partition(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
    while len(body) < length:
        body += sock.recv(65536)
    return head


@pytest.mark.parametrize(
    ("find", "put", "status"),
    [
        (b"host: x\r\n", b"host: x\r\nhost: y\r\n", 400),
        (b"Bearer right", b"Bearer wrong", 401),
        (b"content-length: ", b"content-length: 1\r\ncontent-length: ", 400),
        (b"content-length: ", b"transfer-encoding: chunked\r\ncontent-length: ", 400),
    ],
)
def test_a_hostile_second_head_is_refused(find: bytes, put: bytes, status: int) -> None:
    body = b'{"prompt": "x"}'
    good = (
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer right\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\n\r\n%b" % (len(body), body)
    )
    with stack(env={"DISAGG_PROXY_API_KEY": "right"}) as running, running.proxy.connect() as sock:
        for _ in range(4):
            sock.sendall(good)
            assert answer(sock).startswith(b"HTTP/1.1 200")
        sock.sendall(good.replace(find, put))
        assert answer(sock).startswith(b"HTTP/1.1 %d" % status)
        assert running.decode.served == 4


# -- answers of servers


def test_an_answers_head_is_parsed_once_unless_it_differs() -> None:
    text = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: 5"
    head = parse_head(text)
    assert known_heads[text] is head
    assert (head.status, head.length, head.event_stream, head.chunked, head.keep_alive) == (200, 5, True, False, True)
    for bad in (text + b"0, 5", text + b"\r\ncontent-length: 6", text + b"\nx: y", text.replace(b"200", b"2000")):
        assert bad not in known_heads
        with pytest.raises(UpstreamError):
            parse_head(bad)
        assert bad not in known_heads
    unique = text + b"\r\nx-kv-wait-ms: 1.5\r\nx-request-id: 7"
    assert [name for name, _, _ in parse_head(unique).internal] == [b"x-kv-wait-ms"]
    assert unique not in known_heads
