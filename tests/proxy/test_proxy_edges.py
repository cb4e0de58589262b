"""Edges of the request path, piece by piece: streams, parts of a body, a client's connection, times. No sockets."""

from __future__ import annotations

import asyncio
import socket
import types
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from test_proxy_units import Channel, client, context, headers, parse, relayed

from disagg_prefill_lmcache_v1.proxy import bodies, client_parser, client_request, relay
from disagg_prefill_lmcache_v1.proxy import headers as headers_module
from disagg_prefill_lmcache_v1.proxy.client_connection import ClientConnection
from disagg_prefill_lmcache_v1.proxy.client_parser import ClientLimits
from disagg_prefill_lmcache_v1.proxy.client_request import ClientRequest
from disagg_prefill_lmcache_v1.proxy.errors import ProxyError
from disagg_prefill_lmcache_v1.proxy.header_fields import answer_lines, own_lines
from disagg_prefill_lmcache_v1.proxy.metrics import Metrics
from disagg_prefill_lmcache_v1.proxy.relay import StreamRelay
from disagg_prefill_lmcache_v1.proxy.request import RequestContext
from disagg_prefill_lmcache_v1.proxy.settings import parse_url
from disagg_prefill_lmcache_v1.proxy.timing import server_timing
from disagg_prefill_lmcache_v1.proxy.upstream import Client, Connection, Limits, UpstreamError
from disagg_prefill_lmcache_v1.proxy.upstream.client import _size
from disagg_prefill_lmcache_v1.proxy.usage import UsageMeter, told_reuse


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(coroutine, 30))


# -- streams


class Source:
    """Connection of a streamed answer."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def pause(self) -> None:
        self.calls.append("pause")

    def resume(self) -> None:
        self.calls.append("resume")


def make_relay(events: bool = True, version: str = "1.0") -> tuple[StreamRelay, RequestContext, Channel, Metrics]:
    metrics, noted = Metrics(), context(want_usage=True)
    one, channel = client("POST", version)
    response: Any = types.SimpleNamespace(connection=Source(), event_stream=events)
    return StreamRelay(metrics, metrics.index("disagg_itl_seconds"), noted, one, response), noted, channel, metrics


def test_the_first_token_is_told_once_and_the_gaps_are_counted() -> None:
    async def ask() -> None:
        made, noted, _, metrics = make_relay()
        told: list[float] = []
        noted.on_first_token = lambda: told.append(noted.ttft_s)
        for _ in range(3):
            assert made.raw(b"9\r\ndata: 1\n\n\r\n")
        made.payload(b"data: 2\n\n")
        assert (len(told), told[0] >= 0) == (1, True)
        assert noted.ttft_s == told[0]
        assert b"disagg_itl_seconds_count 3.0" in metrics.render()
        made, noted, _, metrics = make_relay(events=False)  # no tokens in there
        made.payload(b"data: 1\n\n")
        assert made.raw(b"1\r\nx\r\n")
        assert noted.ttft_s < 0

    run(ask())


def test_whole_chunks_go_on_as_they_are_only_with_whole_events() -> None:
    async def ask() -> None:
        made, noted, channel, _ = make_relay()
        assert made.raw(b"9\r\ndata: 1\n\n\r\n")
        assert not made.raw(b"7\r\ndata: 2\r\n")
        assert channel.transport.written == b"9\r\ndata: 1\n\n\r\n"
        made.payload(b"data: 2")
        assert not made.raw(b"2\r\n\n\n\r\n")  # the beginning of its event is held
        made.payload(b"\n\n")
        assert made.raw(b"9\r\ndata: 3\n\n\r\n")
        assert channel.transport.written == b"9\r\ndata: 1\n\n\r\ndata: 2\n\n9\r\ndata: 3\n\n\r\n"
        assert noted.sent == len(channel.transport.written)

        def ended(_data: bytes) -> None:
            raise RuntimeError("the transport is closed")

        channel.transport.write = ended  # type: ignore[method-assign]
        made, *_ = make_relay()
        made._write = ended
        assert made.raw(b"9\r\ndata: 1\n\n\r\n")

    run(ask())


def test_an_event_without_end_is_held_up_to_a_limit() -> None:
    long = b"x" * relay._HELD_EVENT
    assert relayed(long)[0] == b""
    assert relayed(long + b"x")[0] == long + b"x"
    assert relayed(b"data\n\n" + long)[0] == b"data\n\n"
    assert relayed(b"data\n\n" + long + b"x")[0] == b"data\n\n" + long + b"x"
    assert relayed(b"a\n\nb\r\n\r\nc")[0] == b"a\n\nb\r\n\r\n"
    assert relayed(b"a\r\n\r\nb\n\nc")[0] == b"a\r\n\r\nb\n\n"
    assert relayed(b"a\n\n", b"b\r\n\r\n")[0] == b"a\n\nb\r\n\r\n"
    assert relayed(b"\n\nb")[0] in (b"", b"\n\n")  # no event, and nothing is lost


def test_the_end_of_a_stream() -> None:
    async def ask() -> None:
        made, _, channel, _ = make_relay()
        made.payload(b"data: 1\n\nrest")
        made.end()
        assert (channel.transport.written, len(channel.told)) == (b"data: 1\n\nrest", 1)
        assert await made.done is None
        made.lost(UpstreamError("lost", "late"))  # too late to matter
        assert made.done.result() is None
        cut = UpstreamError("lost", "cut")
        for events, parts, whole in (
            (True, (b"data: [DONE]\n\n",), True),
            (True, (b"data: [DONE]\r\n\r\n",), True),
            (True, (b"data: [DONE]\n\n", b"da"), False),
            (True, (b"data: 1\n\n",), False),
            (True, (), False),
            (False, (b"data: [DONE]\n\n",), False),
        ):
            made, _, channel, _ = make_relay(events)
            for part in parts:
                made.payload(part)
            made.lost(cut)
            assert made.done.result() is (None if whole else cut)
            assert len(channel.told) == whole
        made.end()
        assert made.done.result() is cut

    run(ask())


def test_a_client_that_does_not_read_holds_the_server() -> None:
    async def ask() -> None:
        made, _, _, _ = make_relay()
        made.pause(True)
        made.pause(False)
        assert made._connection.calls == ["pause", "resume"]

    run(ask())


# -- a request of a client


def test_parts_of_a_body() -> None:
    small, large = b"s" * 10, b"L" * client_request._SMALL_PART
    for parts in ([], [small], [large], [small] * 3, [large, small, small, large, small], [small, large, small],
                  [large] + [b"%d" % n * 1000 for n in range(100)]):  # fmt: skip
        request, _ = client("POST", complete=False)
        for part in parts:
            request.take_body(part)
        request.end_body()
        assert asyncio.run(request.body()) == b"".join(parts)
        assert request.body_size == sum(map(len, parts))


def test_many_small_parts_cost_little() -> None:
    request, _ = client("POST", complete=False)
    for _ in range(50_000):
        request.take_body(b"x" * 10)
    assert len(request._parts) < 20


def test_who_waits_for_a_body() -> None:
    async def ask() -> None:
        for refused in (False, True):
            request, channel = client("POST", complete=False)
            wanted: list[ClientRequest] = []
            channel.want_body = wanted.append  # type: ignore[method-assign]
            assert not request.wants_body
            waiting = asyncio.create_task(request.body())
            while not wanted:
                await asyncio.sleep(0)
            assert (wanted, request.wants_body, channel.transport.written) == ([request], True, b"")
            request.take_body(b"ab")
            if refused:
                request.refuse(ProxyError(413, "too long", "proxy", "bad_request"))
                request.take_body(b"cd" * 9000)
                assert not request._parts
                request.end_body()
                with pytest.raises(ProxyError):
                    await waiting
            else:
                request.end_body()
                assert await waiting == b"ab"
        refused_before, channel = client("POST", complete=False)
        refused_before.refuse(ProxyError(408, "late", "proxy", "client_stalled"))
        with pytest.raises(ProxyError):
            await refused_before.body()

    run(ask())


@pytest.mark.parametrize(
    ("version", "expects", "complete", "told"),
    [("1.1", True, False, True), ("1.1", False, False, False), ("1.0", True, False, False), ("1.1", True, True, False)],
)
def test_100_continue(version: str, expects: bool, complete: bool, told: bool) -> None:
    async def ask() -> None:
        request, channel = client("POST", version, complete)
        assert request.expects_continue is False
        request.expects_continue = expects
        waiting = asyncio.create_task(request.body())
        await asyncio.sleep(0)
        request.end_body()
        assert await waiting == b""
        assert channel.transport.written == (b"HTTP/1.1 100 Continue\r\n\r\n" if told else b"")

    run(ask())


def test_pauses_are_told_while_the_answer_is_written() -> None:
    request, channel = client()
    calls: list[bool] = []
    request.set_paused(True)  # nobody asks yet
    request.on_pause(calls.append)
    assert calls == []
    request.set_paused(True)
    request.set_paused(False)
    assert calls == [True, False]
    channel.write_paused = True
    request.on_pause(calls.append)
    assert calls == [True, False, True]
    request.on_pause(None)
    request.set_paused(True)
    request.on_pause(calls.append)
    calls.clear()
    request.answer(200, [], b"")
    request.set_paused(True)  # the next answer's
    assert calls == []


def test_a_hang_up_ends_the_task_unless_all_is_written() -> None:
    for complete in (False, True):
        request, _ = client()
        cancelled: list[bool] = []
        request.task = types.SimpleNamespace(cancel=lambda seen=cancelled: seen.append(True))  # type: ignore[assignment]
        assert not request.gone
        if complete:
            request.answer(200, [], b"")
        request.hung_up()
        assert (request.gone, cancelled) == ((False, []) if complete else (True, [True]))


def test_nothing_is_written_to_a_connection_that_closes() -> None:
    for does in (
        lambda one: one.answer(200, [], b"x"),
        lambda one: (one.begin(200, []), one.send(b"x"), one.end()),
        lambda one: one.cut(b"words"),
    ):
        request, channel = client("POST")
        channel.transport.end = "close"
        does(request)
        assert channel.transport.written == b""


def test_a_long_answer_is_not_copied() -> None:
    for size, copied in ((client_request._JOINED_BYTES, True), (client_request._JOINED_BYTES + 1, False)):
        request, channel = client()
        pieces: list[list[bytes]] = []
        channel.transport.writelines = pieces.append  # type: ignore[method-assign]
        body = b"x" * size
        request.answer(200, [], body)
        assert (channel.transport.written.endswith(body), len(pieces)) == ((True, 0) if copied else (False, 1))
        if not copied:
            assert pieces[0][1] is body
        assert channel.told == [request]


def test_a_head_has_its_length_and_no_body() -> None:
    for status, length, expected in ((304, 7, True), (304, None, False), (204, 7, False)):
        request, channel = client("GET")
        request.answer(status, [], b"body", length)
        assert (b"content-length: 7" in channel.transport.written) is expected
        assert channel.transport.written.endswith(b"\r\n\r\n")
    request, channel = client("POST", "1.1")
    request.keep_alive = False
    request.begin(200, [])
    assert channel.transport.written.endswith(b"transfer-encoding: chunked\r\nconnection: close\r\n\r\n")
    assert request.started
    request, channel = client("POST")
    assert not request.started
    request.begin(200, [])
    written = channel.transport.written
    request.gone = True
    request.end()
    assert channel.transport.written == written


# -- header fields


@pytest.mark.parametrize(
    ("value", "passed"),
    [
        ("http://10.0.0.1/x/y?z=1#f", "/x/y?z=1#f"),
        ("http://10.0.0.1:80/x", "/x"),
        ("http://10.0.0.1:81/x", "http://10.0.0.1:81/x"),
        ("https://10.0.0.2/x", "/x"),
        ("https://10.0.0.2", "/"),
        ("http://10.0.0.2/x", "http://10.0.0.2/x"),
        ("https://10.0.0.1/x", "https://10.0.0.1/x"),
        ("http://10.0.0.1//evil/x", "/evil/x"),
        ("http://elsewhere/x", "http://elsewhere/x"),
        ("/x", "/x"),
        ("http://[::1]:8/x", "/x"),
        ("http://[::1/x", "/"),
        ("http://10.0.0.1:port/x", "/"),
    ],
)
def test_a_location_names_no_server(value: str, passed: str) -> None:
    for decoder, prefiller in (("10.0.0.1:80", "10.0.0.2:443"), ("10.0.0.2:443", "10.0.0.1:80")):
        if "::1" in value:
            decoder = "[::1]:8"
        for name in ("Location", "Content-Location"):
            lines = answer_lines(context(decoder=decoder, prefiller=prefiller), headers((name, value)))
            assert lines[0] == f"{name.lower()}: {passed}\r\n".encode()


def test_what_an_answer_tells_of_a_request() -> None:
    noted = context(reused_tokens=0, way="pair", way_reason="sooner")
    assert own_lines(noted) == b"x-request-id: id-1\r\nx-reused-tokens: 0\r\nx-route: pair; reason=sooner\r\n"
    assert b"wait" not in own_lines(context(kv_wait_ms=3.0, kv_transfer_ms=3.0))
    assert own_lines(context(kv_state="stored", kv_wait_ms=0.0)).endswith(b"x-kv-wait-ms: 0.0\r\n")


def test_a_new_request_knows_nothing() -> None:
    request = RequestContext("GET", "/p", b"/p?q", "other", "id", b"")
    assert (request.status, request.sent, request.outcome, request.stage) == (0, 0, "ok", "proxy")
    unknown = ("prefill_s", "decode_s", "ttft_s", "kv_wait_ms", "kv_transfer_ms", "prompt_tokens", "cached_tokens",
               "reused_tokens", "expected_s")  # fmt: skip
    assert {name: getattr(request, name) for name in unknown} == dict.fromkeys(unknown, -1)
    nothing = ("prefill_sent", "prefill_answered", "decode_sent", "prompt", "event_stream",
               "want_usage", "on_first_token", "parts", "prefill_told", "decode_told", "kv_state", "prefill_outcome",
               "error_detail", "prefiller", "decoder", "way", "way_reason", "cors")  # fmt: skip
    assert not any(getattr(request, name) for name in nothing)
    assert request.start > 0


# -- usage


def test_what_the_workers_have_loaded_counts_before_what_vllm_calls_cached() -> None:
    text = b'{"usage":{"prompt_tokens":10,"cached_tokens":9}}'
    for told, reused, full in ((-1, 9, 1), (0, 0, 0), (8, 8, 0), (9, 9, 1)):
        metrics, noted = Metrics(), context(reused_tokens=told)
        UsageMeter(metrics).note_answer(noted, text)
        assert (noted.reused_tokens, noted.cached_tokens) == (reused, 9)
        assert metrics.values[metrics.index("disagg_reused_tokens")] == reused
        assert metrics.values[metrics.index("disagg_full_reuse_requests")] == full
    for value, tokens in (("12", 12), ("9" * 15, int("9" * 15)), ("9" * 16, -1), ("-1", -1), ("x", -1), ("", -1)):
        assert told_reuse(headers(("x-a", "1"), ("x-kv-reused-tokens", value))) == tokens
    assert told_reuse([]) == -1


# -- a client's connection


class Wire:
    """Transport of a client's connection: what was done to it."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.written = b""
        self.unsent = 0
        self.closing = False

    def is_closing(self) -> bool:
        return self.closing

    def write(self, data: bytes) -> None:
        self.written += data

    def close(self) -> None:
        self.calls.append("close")
        self.closing = True

    def abort(self) -> None:
        self.calls.append("abort")
        self.closing = True

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.calls.append("eof")

    def pause_reading(self) -> None:
        self.calls.append("pause")

    def resume_reading(self) -> None:
        self.calls.append("resume")

    def get_write_buffer_size(self) -> int:
        return self.unsent


class Clock:
    """The loop's time, which goes on only when it is told to; timers that are due then run."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.now = 1000.0
        self.timers: list[tuple[float, Callable[..., None], tuple[Any, ...]]] = []
        self.create_task = self.loop.create_task
        self.call_soon = self.loop.call_soon

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, callback: Callable[..., None], *arguments: Any) -> Any:
        timer = (when, callback, arguments)
        self.timers.append(timer)
        return types.SimpleNamespace(cancel=lambda: timer in self.timers and self.timers.remove(timer))

    def call_later(self, after: float, callback: Callable[..., None], *arguments: Any) -> Any:
        return self.call_at(self.now + after, callback, *arguments)

    def go_on(self, seconds: float) -> None:
        """Let so much time pass."""
        end = self.now + seconds
        while due := [timer for timer in self.timers if timer[0] <= end]:
            first = min(due, key=lambda timer: timer[0])
            self.timers.remove(first)
            self.now = max(self.now, first[0])
            first[1](*first[2])
        self.now = end


class Connected:
    """A connection with its clock; each request's body is read, and it is answered when the test says so."""

    def __init__(self, timeout_s: float = 10.0, stall_s: float = 20.0, reads_body: bool = True) -> None:
        self.clock = Clock()
        self.server = types.SimpleNamespace(connections=set(), tasks=set(), total_requests=0)
        self.requests: list[ClientRequest] = []
        self.errors: list[ProxyError] = []
        self.go = asyncio.Semaphore(0)
        self.reads_body = reads_body
        state = {"handler": self.serve, "limits": ClientLimits(10_000, 100_000, timeout_s, stall_s)}
        self.connection = ClientConnection(None, self.server, state)  # type: ignore[arg-type]
        self.connection._loop = self.clock  # type: ignore[assignment]
        self.wire = Wire()
        self.connection.connection_made(self.wire)  # type: ignore[arg-type]

    async def serve(self, request: ClientRequest) -> None:
        self.requests.append(request)
        try:
            if self.reads_body:
                await request.body()
            await self.go.acquire()
            request.answer(200, [], b"")
        except ProxyError as error:
            self.errors.append(error)
            request.answer(error.status, [], b"")

    async def settle(self) -> None:
        for _ in range(10):
            await asyncio.sleep(0)

    async def send(self, data: bytes) -> None:
        self.connection.data_received(data)
        await self.settle()

    async def answer(self) -> None:
        self.go.release()
        await self.settle()


GET = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n"


def test_a_connection_waits_for_a_head_only_so_long() -> None:
    async def ask() -> None:
        for first in (b"", b"GET / HT"):
            made = Connected(timeout_s=10)
            await made.send(first)
            made.clock.go_on(9.9)
            if first:
                await made.send(b"TP/1.1\r\n")  # which gives it no more time
            assert made.wire.calls == []
            made.clock.go_on(0.2)
            assert made.wire.calls == ["close"]
        made = Connected(timeout_s=10)  # between two requests there is more time, for the second head not
        await made.send(GET)
        made.clock.go_on(500)
        await made.answer()
        made.clock.go_on(74.9)
        assert made.wire.calls == []
        await made.send(b"GET ")
        made.clock.go_on(9.9)
        assert made.wire.calls == []
        made.clock.go_on(0.2)
        assert made.wire.calls == ["close"]
        made = Connected(timeout_s=10)  # each head is timed, after one that came in pieces too
        await made.send(GET[:9])
        await made.send(GET[9:])
        await made.answer()
        await made.send(GET[:9])
        made.clock.go_on(10.1)
        assert made.wire.calls == ["close"]
        made = Connected(timeout_s=10)
        await made.send(GET)
        await made.answer()
        made.clock.go_on(75.1)
        assert made.wire.calls == ["close"]

    run(ask())


def test_a_body_has_its_time() -> None:
    async def ask() -> None:
        made = Connected(timeout_s=10)
        await made.send(POST % 5000 + b"x")
        for _ in range(3):
            made.clock.go_on(9.0)
            assert made.errors == []
            await made.send(b"x" * 1024)  # a second more for each KiB, so there is none for long pauses
            if made.errors or made.clock.now > 1017:
                break
        made.clock.go_on(9.9)
        await made.settle()
        assert [error.status for error in made.errors] == [408]
        assert made.wire.written.startswith(b"HTTP/1.1 408")
        assert "eof" in made.wire.calls
        steady = Connected(timeout_s=10)
        await steady.send(POST % 50_000)
        for _ in range(48):
            steady.clock.go_on(1.0)
            await steady.send(b"x" * 1024)
        assert steady.errors == []
        steady.clock.go_on(10.1)
        await steady.settle()
        assert [error.status for error in steady.errors] == [408]

    run(ask())


def test_a_body_that_nobody_wants_is_not_read() -> None:
    async def ask() -> None:
        made = Connected(reads_body=False)
        await made.send(POST % 10 + b"x")
        assert made.wire.calls == ["pause"]
        made.clock.go_on(1000)  # whoever waits for a place costs the client no time
        assert made.wire.calls == ["pause"]
        await made.answer()
        assert made.wire.written.endswith(b"connection: close\r\n\r\n")
        assert made.wire.calls == ["pause", "resume", "eof"]
        await made.send(b"y" * 9 + GET)
        assert len(made.requests) == 1
        made.clock.go_on(2.1)
        assert made.wire.calls[-1] == "close"

    run(ask())


@pytest.mark.parametrize("can_end", [True, False])  # TLS cannot end one direction alone
def test_the_rest_of_a_refused_body_is_read_for_a_moment(can_end: bool) -> None:
    async def ask() -> None:
        made = Connected(reads_body=False)
        made.wire.can_write_eof = lambda: can_end  # type: ignore[method-assign]
        await made.send(POST % 10)
        await made.answer()
        assert made.wire.calls[1:] == ["resume", "eof"][: 1 + can_end]
        made.clock.go_on(1.9)
        assert "close" not in made.wire.calls
        made.clock.go_on(0.2)
        assert made.wire.calls[-1] == "close"

    run(ask())


def test_requests_are_served_in_their_turn() -> None:
    async def ask() -> None:
        made = Connected()
        await made.send(GET * 3)
        await made.send(GET * 2)
        for number in range(1, 6):  # one at a time
            assert (len(made.requests), made.server.total_requests) == (number, number - 1)
            assert len(made.server.tasks) == 1
            await made.answer()
        assert made.wire.written.count(b"HTTP/1.1 200") == 5
        assert (made.server.tasks, made.wire.calls) == (set(), [])

    run(ask())


def test_what_is_sent_ahead_has_a_limit() -> None:
    async def ask() -> None:
        made = Connected()
        await made.send(GET)
        await made.send(b"x" * 256 * 1024)
        assert made.wire.calls == []
        await made.send(b"x")
        assert made.wire.calls == ["pause"]
        many = Connected()
        await many.send(GET * 70)
        for _ in range(80):
            await many.answer()
        assert len(many.requests) == 65  # the first, and 64 that waited
        assert many.wire.calls == ["close"]

    run(ask())


def test_a_closing_answer_ends_the_connection_and_its_input() -> None:
    async def ask() -> None:
        made = Connected()
        await made.send(GET.replace(b"host: x", b"host: x\r\nconnection: close") + GET)
        await made.answer()
        assert made.wire.calls == ["close"]
        await made.send(GET)
        assert len(made.requests) == 1
        gone = Connected()
        await gone.send(POST % 3)
        gone.wire.closing = True
        gone.wire.calls.clear()
        gone.requests[0].keep_alive = False
        gone.connection.answered(gone.requests[0])
        assert gone.wire.calls == []

    run(ask())


def test_a_connection_that_is_lost_leaves_nothing() -> None:
    async def ask() -> None:
        made = Connected()
        assert made.server.connections == {made.connection}
        await made.send(GET * 2)
        task = made.requests[0].task
        made.connection.connection_lost(None)
        await made.settle()
        assert (made.server.connections, made.server.tasks) == (set(), set())
        assert (task.cancelled(), made.requests[0].gone, len(made.requests)) == (True, True, 1)
        assert made.clock.timers == []
        await made.send(GET)
        assert len(made.requests) == 1

    run(ask())


def test_the_end_of_the_server() -> None:
    async def ask() -> None:
        idle = Connected()
        idle.connection.shutdown()
        assert idle.wire.calls == ["close"]
        busy = Connected()
        await busy.send(GET)
        busy.connection.shutdown()
        assert busy.wire.calls == []
        await busy.answer()
        assert b"connection: close\r\n" in busy.wire.written
        assert busy.wire.calls == ["close"]

    run(ask())


def test_pauses_reach_the_request_that_is_answered() -> None:
    async def ask() -> None:
        made = Connected()
        made.connection.pause_writing()  # nobody is there
        made.connection.resume_writing()
        await made.send(GET)
        calls: list[bool] = []
        made.requests[0].on_pause(calls.append)
        made.connection.pause_writing()
        assert (calls, made.connection.write_paused) == ([True], True)
        made.connection.resume_writing()
        assert (calls, made.connection.write_paused) == ([True, False], False)

    run(ask())


def test_an_answer_that_nobody_reads() -> None:
    async def ask() -> None:
        for stall_s, ended in ((20.0, True), (0.0, False)):
            made = Connected(timeout_s=4, stall_s=stall_s)
            await made.send(GET)
            made.wire.unsent = 100
            await made.answer()
            made.clock.go_on(19.0)
            assert made.wire.calls == []
            made.wire.unsent = 99  # a little is read
            made.clock.go_on(19.0)
            assert made.wire.calls == []
            made.clock.go_on(3.0)
            assert set(made.wire.calls) == ({"abort"} if ended else set())

    run(ask())


def test_the_limits_of_a_head_and_of_framing_are_met_exactly() -> None:
    """One byte decides."""
    for size, refused in ((2001, False), (2002, True)):
        parser, taken = parse(b"GET /" + b"a" * (size - 5), pieces=1)
        assert (parser.ended, len(taken)) == (refused, int(refused))
    for size, refused in ((965, False), (966, True)):
        _, taken = parse(b"GET /" + b"a" * (size - 1) + b" HTTP/1.1\r\nx: \r\n\r\n", head_bytes=998)
        request = taken[0]
        try:
            request.check()
            found = False
        except ProxyError as error:
            found = error.status == 431
        assert found is refused


def test_known_header_fields_are_made_once_and_secrets_are_not_kept() -> None:
    client_parser._known.clear()
    for _ in range(2):
        _, taken = parse(
            b"GET / HTTP/1.1\r\nhost: x\r\nAuthorization: Bearer s\r\nx-request-id: 1\r\ntraceparent: 2\r\n"
            b"content-length: 0\r\n"
            b"x-long: " + b"v" * 256 + b"\r\nx-less: " + b"v" * 255 + b"\r\n\r\n" + GET, head_bytes=5000,
        )  # fmt: skip
        assert taken[0].headers[0] is taken[1].headers[0]
    assert [name for name, _ in client_parser._known] == [b"host", b"x-less"]
    for number in range(1000):
        parse(b"GET / HTTP/1.1\r\nx: %d\r\n\r\n" % number)
        assert len(client_parser._known) <= 512
    assert len(client_parser._known) > 400


def test_known_header_lines_of_servers_are_made_once() -> None:
    known = headers_module.known_lines
    known.clear()
    for name, size, kept in (
        (b"server", 5, True), (b"X-Request-Id", 5, False), (b"x-kv-wait-ms", 5, False), (b"traceparent", 5, False),
        (b"x", 252, True), (b"x", 253, False),
    ):  # fmt: skip
        line = name + b": " + b"v" * size
        header = headers_module.parse_header(line)
        assert header == (name.lower(), b"v" * size, line + b"\r\n")
        assert (known.get(line) is header) is kept
    for number in range(1000):
        headers_module.parse_header(b"x: %d" % number)
        assert len(known) <= 512
    assert len(known) > 400
    assert headers_module.parse_header(b"no colon") is None


def test_a_long_body_is_json_or_refused() -> None:
    """The quick way through long bodies takes nothing that the parser would not."""
    long = b'"' + b"x" * 20_000 + b'"'
    for body, names in (
        (b'{"a":%b,"b":1}' % long, ["a", "b"]),
        (b' { "a" : %b , "b" : [1, 2] } ' % long, ["a", "b"]),
        (b'{"a":%b,"b":[]}' % long, ["a", "b"]),
        (b'{"a":%b,"b":-1.5e+3,"c":true,"d":null}' % long, ["a", "b", "c", "d"]),
        (b'{"a":%b,"b":{"c":[1]}}' % long, ["a", "b"]),
        (b'{"a":%b,"b":"\\\\"}' % long, ["a", "b"]),
        (b'{"a":%b,"b":"\\""}' % long, ["a", "b"]),
        (b'{"a":%b{"b":1}' % long, None),
        (b',"a":%b,"b":1}' % long, None),
        (b'{"a":%b,"b":}' % long, None),
        (b'{"a":%b,"b":1' % long, None),
        (b'{"a":%b,}' % long, None),
        (b'{"a":%b,"b":[1,2}' % long, None),
        (b'{"a":%b,"b":"x}' % long, None),
        (b'{"a":%b,"b":1} x' % long, None),
    ):
        if names is None:
            with pytest.raises(bodies.BadJSON):
                bodies.parse_fields(body)
        else:
            fields = bodies.parse_fields(body)
            assert list(fields) == names
            assert bytes(fields["a"]).strip() == long
    assert bodies.parse_fields(b"[%b]" % long) is None
    assert bodies.parse_fields(b" " * 20_000 + b"{}") == {}


def test_where_a_long_body_is_only_looked_through() -> None:
    for size, skimmed in ((bodies._LONG_BODY - 1, False), (bodies._LONG_BODY, True)):
        body = b'{"a":"' + b"x" * (size - 8) + b'"}'
        assert len(body) == size
        assert isinstance(bodies.parse_fields(body)["a"], memoryview) is skimmed
    even = b'{"a":"' + b"x" * 20_000 + b'\\\\","b":1}'  # the backslash is escaped, the quote is not
    assert isinstance(bodies.parse_fields(even)["b"], memoryview)
    many = b'{"a":"' + b"x" * 20_000 + b'\\"' * 63 + b'"}'
    assert isinstance(bodies.parse_fields(many)["a"], memoryview)
    assert not isinstance(bodies.parse_fields(many.replace(b'"}', b'\\""}'))["a"], memoryview)


# -- a server's connection


class ServerWire(Wire):
    """Transport of a connection to a server."""

    sock: Any = None
    ssl: Any = None

    def writelines(self, parts: list[bytes]) -> None:
        self.written += b"".join(parts)

    def get_extra_info(self, name: str) -> Any:
        return {"socket": self.sock, "ssl_object": self.ssl}[name]


class Owner:
    """The client of a connection to a server."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.active: set[Connection] = set()
        self.released: list[bool] = []
        self.forgotten = 0

    def release(self, connection: Connection, keep_alive: bool) -> None:
        self.released.append(keep_alive)
        connection.set_idle(1.0)

    def forget(self, connection: Connection) -> None:
        self.forgotten += 1


class Taker:
    """Relay that notes what it gets."""

    def __init__(self) -> None:
        self.got: list[bytes] = []
        self.end_of_it: Any = None

    def raw(self, data: bytes) -> bool:
        self.got.append(b"raw " + data)
        return True

    def payload(self, data: bytes) -> None:
        self.got.append(data)

    def end(self) -> None:
        self.end_of_it = "end"

    def lost(self, error: UpstreamError) -> None:
        self.end_of_it = (error.kind, str(error))


def to_server(limits: Limits = Limits(), **options: Any) -> tuple[Connection, ServerWire, Owner, Any]:  # noqa: B008
    owner, wire = Owner(), ServerWire()
    made = Connection(owner, 4096)
    made.connection_made(wire)  # type: ignore[arg-type]
    values = {"no_body": False, "buffer_limit": 100, "begun": 0.0, **options}
    return made, wire, owner, made.exchange(b"request", limits=limits, **values)


EVENTS = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def test_a_servers_silence_counts_only_while_it_is_listened_to() -> None:
    async def ask() -> None:
        made, wire, owner, answer = to_server(Limits(silence_s=5.0))
        assert owner.active == {made}
        made.check_time(100.0, 100.0)  # no answer yet: another limit's
        assert not answer.done()
        made.data_received(EVENTS)
        taker = Taker()
        made.stream_to(taker, True)
        made.check_time(104.9, 4.9)
        made.pause()
        made.pause()
        made.resume()
        made.resume()
        assert wire.calls == ["pause", "resume"]
        made.check_time(109.8, 4.9)
        made.data_received(b"9\r\ndata: 1\n\n\r\n")
        made.check_time(114.7, 4.9)
        assert taker.end_of_it is None
        made.pause()
        made.check_time(114.8, 0.1)
        assert taker.end_of_it == ("client_stalled", "the client did not read for 5 s")
        assert wire.calls[-1] == "abort"
        made.pause()
        made.resume()
        assert wire.calls[-1] == "abort"
        assert owner.forgotten == 1
        for ended in (True, False):  # while it was paused
            made, wire, _, _ = to_server()
            made.data_received(EVENTS)
            made.pause()
            wire.closing = ended
            made.resume()
            assert wire.calls == ["pause", "resume"][: 2 - ended]

    run(ask())


@pytest.mark.parametrize(
    ("limits", "age", "message"),
    [
        (Limits(begin_s=5.0), 4.9, None),
        (Limits(begin_s=5.0), 5.0, "no answer within 5 s"),
        (Limits(whole_s=5.0), 4.9, None),
        (Limits(whole_s=5.0), 5.0, "no whole answer within 5 s"),
        (Limits(begin_s=5.0, whole_s=5.0), 5.0, "no whole answer within 5 s"),
        (Limits(), 1e9, None),
    ],
)
def test_the_time_of_an_answer(limits: Limits, age: float, message: str | None) -> None:
    async def ask() -> None:
        made, wire, _, answer = to_server(limits, begun=50.0)
        made.check_time(50.0 + age, 0.1)
        assert answer.done() is (message is not None)
        if message is not None:
            assert (str(answer.exception()), answer.exception().kind, wire.calls) == (message, "timeout", ["abort"])

    run(ask())


def test_whole_chunks_are_passed_on_as_they_are() -> None:
    async def ask() -> None:
        one, two = b"9\r\ndata: 1\n\n\r\n", b"0000A\r\ndata: 22\n\n\r\n"
        for allowed, reads, expected in (
            (True, [one], [b"raw " + one]),
            (True, [one + two], [b"raw " + one + two]),
            (True, [b"1F\r\ndata: %b\n\n\r\n" % (b"x" * 23)], [b"raw 1F\r\ndata: %b\n\n\r\n" % (b"x" * 23)]),
            (False, [one], [b"data: 1\n\n"]),
            (True, [one[:-1], one[-1:] + two], [b"data: 1\n\n", b"data: 22\n\n"]),
            (True, [one + b"9;x=1\r\ndata: 1\n\n\r\n"], [b"data: 1\n\n" * 2]),
            (True, [one + one[:5], one[5:], two], [b"data: 1\n\nda", b"ta: 1\n\n", b"raw " + two]),
            (True, [one + b"0\r\n\r\n"], [b"data: 1\n\n"]),
        ):
            made, _, owner, answer = to_server()
            made.data_received(EVENTS)
            taker = Taker()
            made.stream_to(taker, allowed)
            for read in reads:
                made.data_received(read)
            assert taker.got == expected
            assert answer.result().event_stream
            assert (taker.end_of_it, owner.released) == (("end", [True]) if b"0\r\n\r\n" in reads[0] else (None, []))

    run(ask())


def test_an_answer_longer_than_the_limit_is_handed_over_early() -> None:
    async def ask() -> None:
        for length, early in ((100, False), (101, True)):
            made, _, owner, answer = to_server()
            made.data_received(b"HTTP/1.1 200 OK\r\ncontent-length: 200\r\n\r\n" + b"x" * length)
            assert answer.done() is early
            if early:
                assert not answer.result().complete
            taker = Taker()
            if early:
                made.stream_to(taker, True)
            made.data_received(b"y" * (200 - length))
            assert answer.result().complete
            assert owner.released == [True]
            whole = b"x" * length + b"y" * (200 - length)
            assert (b"".join(taker.got) if early else answer.result().body) == whole
        made, _, _, answer = to_server()
        made.data_received(b"HTTP/1.1 200 OK\r\ncontent-length: 200\r\n\r\n" + b"x" * 150)
        made.connection_lost(None)
        late = Taker()
        made.stream_to(late, True)
        assert (b"".join(late.got), late.end_of_it) == (b"x" * 150, ("lost", "connection lost"))

    run(ask())


def test_what_a_server_has_not_taken() -> None:
    async def ask() -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            for sock, ssl, unsent, expected in ((None, None, 7, 0), (ours, object(), 7, 0), (ours, None, 7, 7)):
                made, wire, _, _ = to_server()
                wire.sock, wire.ssl, wire.unsent = sock, ssl, unsent
                made.eof_received()
                assert made.unacknowledged == expected
                made.data_received(EVENTS)
                made.unacknowledged = -1
                made.eof_received()  # in its answer: then it has taken the request
                assert made.unacknowledged == -1

    run(ask())


def test_an_answer_that_nobody_waits_for_any_more() -> None:
    async def ask() -> None:
        made, _, owner, answer = to_server()
        answer.cancel()
        made.data_received(EVENTS + b"9\r\ndata: 1\n\n\r\n0\r\n\r\n")
        assert owner.released == [True]

    run(ask())


def test_the_times_that_a_client_is_told() -> None:
    assert (
        server_timing({"prefill": 0.5, "decode": 0.0015}) == b"server-timing: prefill;dur=500.00, decode;dur=1.50\r\n"
    )


def test_the_size_of_a_request() -> None:
    assert (_size(b"abc"), _size((b"ab", memoryview(b"c")))) == (3, 3)


def test_a_connection_is_made_within_the_limit_of_its_request() -> None:
    async def ask() -> None:
        for limits, text in ((Limits(whole_s=0.05), "0.05"), (Limits(begin_s=0.07, whole_s=9.0), "0.07"),
                             (Limits(silence_s=600.0), "0.1"), (Limits(), "0.1")):  # fmt: skip
            made = Client(parse_url("http://127.0.0.1:1", "test"), connect_timeout_s=0.1, idle_connection_s=60.0,
                          max_head_bytes=4096)  # fmt: skip
            made.loop = types.SimpleNamespace(
                time=made.loop.time, create_task=made.loop.create_task,
                create_connection=lambda *_, **__: asyncio.sleep(60),
            )  # fmt: skip
            with pytest.raises(UpstreamError, match=f"no connection within {text} s") as caught:
                await made.request(b"x", limits=limits)
            assert (caught.value.kind, caught.value.taken) == ("unreachable", False)

    run(ask())


def test_idle_connections_are_used_and_closed_by_their_age() -> None:
    async def ask() -> None:
        made = Client(parse_url("http://127.0.0.1:1", "test"), connect_timeout_s=0.1, idle_connection_s=60.0,
                      max_head_bytes=4096)  # fmt: skip
        clock = Clock()
        made.loop = clock  # type: ignore[assignment]

        def idle(age: float) -> tuple[Connection, ServerWire]:
            wire = ServerWire()
            one = Connection(made, 4096)
            one.connection_made(wire)  # type: ignore[arg-type]
            one.set_idle(clock.now - age)
            made._idle[one] = None
            return one, wire

        old, young = idle(60.0), idle(1.0)
        assert made.idle_connections == 2
        assert made._take_idle(clock.now) is young[0]  # the one that was used last
        assert made._take_idle(clock.now) is old[0]
        assert made._take_idle(clock.now) is None
        old = idle(60.1)
        assert made._take_idle(clock.now) is None
        assert (old[1].calls, made.idle_connections) == (["abort"], 0)
        closing, good = idle(1.0), idle(0.5)
        good[1].closing = True
        assert made._take_idle(clock.now) is closing[0]
        many = [idle(61.0) for _ in range(40)] + [idle(1.0)]
        made.sweep(1.0)
        assert [len(wire.calls) for _, wire in many] == [1] * 16 + [0] * 25
        clock.go_on(1.0)
        assert [len(wire.calls) for _, wire in many] == [1] * 40 + [0]
        assert clock.timers == []
        made.close()
        assert (made.idle_connections, many[-1][1].calls) == (0, ["abort"])

    run(ask())
