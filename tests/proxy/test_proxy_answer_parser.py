"""Answers of servers at the edges of what the parser takes: sizes, framing, what keeps a connection. No sockets."""

from __future__ import annotations

import asyncio

import pytest
from test_proxy_upstream import CHUNKED, OK, REQUEST, Collector, FakeTransport, chunked, client_of, exchange

from disagg_prefill_lmcache_v1.proxy.upstream import Connection, Limits, Response, UpstreamError
from disagg_prefill_lmcache_v1.proxy.upstream.parser import AnswerParser

LIMIT, LINE, TRAILERS = 4096, 4096, 16384  # most bytes of a head, of a line of framing, of all trailers


@pytest.mark.parametrize(
    ("status", "head"),
    [
        (200, OK + b"x: " + b"y" * (LIMIT - len(OK) - 3) + b"\r\n\r\n"),
        (0, OK + b"x: " + b"y" * (LIMIT - len(OK) - 2) + b"\r\n\r\n"),
        (200, b"HTTP/1.1 200\r\n\r\n"),
        (200, b"HTTP/1.1 200 \r\n\r\n"),
        (200, b"HTTP/1.0 200 OK\r\n\r\n"),
        (0, b"HTTP/1.2 200 OK\r\n\r\n"),
        (0, b"HTTP/1.1 099 OK\r\n\r\n"),
        (0, b"HTTP/1.1 20 OK\r\n\r\n"),
        (0, b"HTTP/1.1 2000 OK\r\n\r\n"),
        (0, OK + b"no colon\r\n\r\n"),
        (0, OK + b"x : y\r\n\r\n"),
        (0, OK + b"x: y\r\n folded\r\n\r\n"),
        (0, b"HTTQ"),
        (599, b"HTTP/1.1 599 x\r\n\r\n"),
        (200, b"HTTP/1.1 199 x\r\n\r\n" + OK + b"\r\n"),
        (200, b"HTTP/1.1 102 x\r\n\r\n" * 100 + OK + b"\r\n"),
    ],
)
def test_heads(status: int, head: bytes) -> None:
    found, connection = exchange([head], "eof" if status else "open")
    if status:
        assert isinstance(found, Response)
        assert (found.status, found.body, found.complete) == (status, b"", True)
    else:
        assert isinstance(found, UpstreamError)
        assert found.kind == "protocol"
        assert connection.transport.closed


@pytest.mark.parametrize(("size", "kind"), [(LIMIT, "pending"), (LIMIT + 1, "protocol")])
def test_a_head_that_does_not_end(size: int, kind: str) -> None:
    head = OK + b"x: "
    found, _ = exchange([head, b"y" * (size - len(head))])
    assert isinstance(found, UpstreamError)
    assert found.kind == kind


@pytest.mark.parametrize(
    ("lines", "kept"),
    [
        (b"HTTP/1.0 200 OK\r\nconnection: Keep-Alive\r\ncontent-length: 2\r\n\r\nhi", True),
        (b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nhi", False),
        (OK + b"connection: keep-alive\r\ncontent-length: 2\r\n\r\nhi", True),
        (OK + b"connection: x, Close\r\ncontent-length: 2\r\n\r\nhi", False),
        (OK + b"content-length: 2\r\ncontent-length: 2\r\n\r\nhi", True),
        (OK + b"Transfer-Encoding: Chunked\r\n\r\n" + chunked(b"hi"), True),
        (b"HTTP/1.1 204 No\r\nconnection: close\r\n\r\n", False),
        (b"HTTP/1.1 204 No\r\n\r\n", True),
    ],
)
def test_what_keeps_a_connection(lines: bytes, kept: bool) -> None:
    for step in (1, len(lines)):
        found, connection = exchange([lines[i : i + step] for i in range(0, len(lines), step)])
        assert isinstance(found, Response)
        assert found.body == (b"" if b"204" in lines else b"hi")
        assert connection.is_idle() is kept
        assert connection._owner.idle_connections == kept
        assert not connection._owner.active


@pytest.mark.parametrize(
    ("framing", "good"),
    [
        (b"2;" + b"e" * (LINE - 1) + b"\r\nhi\r\n0\r\n\r\n", False),
        (b"2\r\nhi\r\n0\r\n" + b"t" * (LINE + 1) + b"\r\n\r\n", False),
        (b"2\r\nhi\r\n0\r\n" + (b"t" * 1022 + b"\r\n") * 15 + b"t" * 1020 + b"\r\n\r\n", True),
        (b"2\r\nhi\r\n0\r\n" + (b"t" * 1022 + b"\r\n") * 15 + b"t" * 1021 + b"\r\n\r\n", False),
        (b"00002 \t\r\nhi\r\n000\r\n\r\n", True),
        (b"2\r\nhi\r\n0\r\nx: y\r\n\r\n", True),
        (b"2 2\r\nhi\r\n0\r\n\r\n", False),
        (b"\r\nhi\r\n0\r\n\r\n", False),
        (b"2\r\nhi\rX0\r\n\r\n", False),
        (b"2\r\nhi\nX0\r\n\r\n", False),
        (b"2\r\nhiX\r\n0\r\n\r\n", False),
    ],
)
@pytest.mark.parametrize("step", [1, 1000, 100_000])
def test_framing(framing: bytes, good: bool, step: int) -> None:
    answer = CHUNKED + framing
    found, connection = exchange([answer[i : i + step] for i in range(0, len(answer), step)])
    if good:
        assert isinstance(found, Response)
        assert (found.body, connection.is_idle()) == (b"hi", True)
    else:
        assert isinstance(found, UpstreamError)
        assert found.kind == "protocol"


@pytest.mark.parametrize(
    "line", [b"2;" + b"e" * (LINE - 2) + b"\r\nhi\r\n0\r\n", b"2\r\nhi\r\n0\r\n" + b"t" * LINE + b"\r\n"]
)
def test_the_longest_line_of_framing(line: bytes) -> None:
    found, _ = exchange([CHUNKED + line + b"\r\n"])
    assert isinstance(found, Response)
    assert found.body == b"hi"


def test_a_line_of_framing_that_does_not_end() -> None:
    for size, kind in ((LINE, "pending"), (LINE + 1, "protocol")):
        for before in (b"", b"2\r\nhi\r\n"):
            found, _ = exchange([CHUNKED, before + b"2;" + b"e" * (size - 2)])
            assert isinstance(found, UpstreamError)
            assert found.kind == kind


def test_two_transfer_encodings_are_refused() -> None:
    found, _ = exchange([CHUNKED[:-2] + b"transfer-encoding: chunked\r\n\r\n" + chunked(b"hi")])
    assert isinstance(found, UpstreamError)


@pytest.mark.parametrize(
    ("status", "no_body", "length"), [(204, False, None), (304, False, 9), (200, True, 9), (200, True, None)]
)
def test_answers_that_have_no_body(status: int, no_body: bool, length: int | None) -> None:
    head = b"HTTP/1.1 %d x\r\n" % status + (b"content-length: %d\r\n" % length if length else b"") + b"\r\n"
    found, connection = exchange([head], no_body=no_body)
    assert isinstance(found, Response)
    assert (found.complete, found.body, found.length) == (True, b"", length)
    assert connection.is_idle()


@pytest.mark.parametrize(
    ("kind", "events"),
    [(b"Text/Event-Stream; charset=utf-8", True), (b"text/plain", False), (b"x text/event-stream", False)],
)
def test_an_event_stream_is_handed_over_with_its_head(kind: bytes, events: bool) -> None:
    for head in (CHUNKED[:-2], OK, OK + b"content-length: 5\r\n"):
        relay = Collector(take_raw=False)
        found, _ = exchange([head + b"content-type: " + kind + b"\r\n\r\n"], relay=relay)
        assert isinstance(found, Response if events else UpstreamError)
        if isinstance(found, Response):
            assert (found.event_stream, found.complete, found.status) == (True, False, 200)
            assert found.chunked is (b"chunked" in head)


def test_fields_of_an_answer() -> None:
    found, _ = exchange([OK + b"X-A: 1\r\nx-a: 2\r\nx-b:\r\ncontent-length: 0\r\n\r\n"])
    assert isinstance(found, Response)
    assert (found.header(b"x-a"), found.header(b"x-b"), found.header(b"x-c")) == (b"1", b"", None)
    assert found.length == 0
    assert not found.chunked


def test_a_body_until_the_end_of_the_connection() -> None:
    found, connection = exchange([OK + b"\r\nab", b"cd"], "eof")
    assert isinstance(found, Response)
    assert (found.body, found.length) == (b"abcd", None)
    assert not connection.is_idle()
    assert not connection._owner.idle_connections


def test_nothing_is_taken_that_nobody_asked_for() -> None:
    parser = AnswerParser(LIMIT)
    with pytest.raises(UpstreamError, match="nobody asked"):
        parser.feed(b"x")


def test_a_connection_carries_many_answers() -> None:
    """What is left of one does not reach the next, whatever the framing."""

    async def run() -> None:
        client = client_of()
        connection = Connection(client, LIMIT)
        connection.connection_made(FakeTransport())
        for reads, body in (
            ([CHUNKED + b"2\r\nhi\r\n0\r\nx: y\r\n", b"\r\n"], b"hi"),
            ([OK + b"content-length: 2\r\n\r", b"\nho"], b"ho"),
            ([CHUNKED + b"2\r\nh", b"a\r", b"\n0\r\n\r\n"], b"ha"),
            ([b"HTTP/1.1 204 x\r\n\r\n"], b""),
            ([OK + b"content-length: 3\r\n\r\nabc"], b"abc"),
        ):
            waiter = connection.exchange(REQUEST, no_body=False, buffer_limit=99, limits=Limits(), begun=0.0)
            for read in reads:
                assert not waiter.done()
                connection.data_received(read)
            assert (await waiter).body == body
            assert connection.is_idle()
            assert client.idle_connections == 1

    asyncio.run(run())
