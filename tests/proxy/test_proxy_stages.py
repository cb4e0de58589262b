"""The prefill and decode stages and the handler with servers that play a part: which one is asked, how often, and what
is noted. No sockets."""

from __future__ import annotations

import asyncio
import json
import logging
import types
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from test_proxy_units import Channel, headers

from disagg_prefill_lmcache_v1.proxy.affinity import Prompt
from disagg_prefill_lmcache_v1.proxy.client_request import ClientRequest
from disagg_prefill_lmcache_v1.proxy.decode import DecodeStage
from disagg_prefill_lmcache_v1.proxy.errors import ProxyError
from disagg_prefill_lmcache_v1.proxy.handler import RequestHandler
from disagg_prefill_lmcache_v1.proxy.metrics import Metrics
from disagg_prefill_lmcache_v1.proxy.pool import Pool
from disagg_prefill_lmcache_v1.proxy.prefill import PrefillStage
from disagg_prefill_lmcache_v1.proxy.prompt_meter import PromptMeter
from disagg_prefill_lmcache_v1.proxy.request import RequestContext
from disagg_prefill_lmcache_v1.proxy.settings import load_settings
from disagg_prefill_lmcache_v1.proxy.upstream import Limits, Response, UpstreamError

LOST = UpstreamError("lost", "it was lost", taken=False)
REFUSED = UpstreamError("refused", "it was refused", taken=False)
TAKEN = UpstreamError("lost", "it was lost", taken=True)
EXHAUSTED = UpstreamError("exhausted", "no descriptor", taken=False)
TIMEOUT = UpstreamError("timeout", "no answer within 1 s", taken=True)


class Source:
    """Connection of an answer that is not complete."""

    def __init__(self) -> None:
        self.aborted = False
        self.error: UpstreamError | None = None  # how the answer ends

    def abort(self) -> None:
        self.aborted = True

    def stream_to(self, relay: Any, raw: bool) -> None:
        relay.payload(b"data: [DONE]\n\n" if self.error is None else b"data: 1\n\n")
        if self.error is None:
            relay.end()
        else:
            relay.lost(self.error)


def answer(
    status: int = 200, *pairs: tuple[str, str], body: bytes = b"{}", complete: bool = True, events: bool = False
) -> Response:
    made = Response(Source())  # type: ignore[arg-type]
    made.status, made.body, made.complete = status, body, complete
    made.headers = made.internal = headers(*pairs)
    made.event_stream = events
    made.length = None if events else len(body)
    return made


class Servers:
    """A pool of servers that do what they are told, one thing for each request, and what they were asked."""

    def __init__(self, role: str, acts: list[list[Any]], *flags: str, api_key: str = "") -> None:
        urls = [f"http://127.0.0.1:{number}" for number in range(1, len(acts) + 1)]
        self.settings = load_settings(flags, {"DISAGG_PROXY_API_KEY": api_key})
        self.metrics = Metrics()
        self.pool = Pool(role, urls, self.settings, self.metrics)
        self.asked: list[int] = []
        self.requests: list[bytes] = []
        self.options: list[dict[str, Any]] = []
        self.busy: list[tuple[int, float]] = []
        self.held: list[int] = []
        self.role = role
        for number, (upstream, does) in enumerate(zip(self.pool.upstreams, acts, strict=True)):
            upstream.client.request = self.request(number, list(does))  # type: ignore[method-assign]

    def request(self, number: int, does: list[Any]) -> Callable[..., Coroutine[Any, Any, Response]]:
        async def ask(request: Any, **options: Any) -> Response:
            self.asked.append(number)
            self.requests.append(request if isinstance(request, bytes) else b"".join(map(bytes, request)))
            self.options.append(options)
            self.busy.append((self.pool.upstreams[number].in_flight, self.value("disagg_in_flight", self.role)))
            self.held.append(sum(upstream.held for upstream in self.pool.upstreams))
            act = does.pop(0)
            if isinstance(act, BaseException):
                raise act
            return act

        return ask

    def value(self, *name: str) -> float:
        return self.metrics.values[self.metrics.index(*name)]

    def at_rest(self) -> bool:
        none = all((u.in_flight, u.held, u.load.tokens) == (0, 0, 0) for u in self.pool.upstreams)
        return none and not self.value("disagg_in_flight", self.role)


def context(path: str = "/v1/completions", route: str = "", method: str = "POST") -> RequestContext:
    return RequestContext(method, path, path.encode(), route or path, "id-1", b"x-a: 1\r\n")


def request_of(method: str = "POST", path: str = "/v1/completions", body: bytes = b"", *lines: tuple[str, str]):
    channel = Channel()
    pairs = headers(("host", "x"), *lines)
    request = ClientRequest(channel, method, path, path.encode(), pairs, "1.1", True)  # type: ignore[arg-type]
    if body:
        request.take_body(body)
    request.end_body()
    return request, channel


async def error_of(coroutine: Coroutine[Any, Any, Any]) -> ProxyError | None:
    """What a stage raises."""
    try:
        await coroutine
    except ProxyError as error:
        return error
    return None


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(coroutine, 30))


# -- prefill


PREFILLS = [
    # what each server does; which are asked; the outcome; whether the pool's check of the server is due
    ([[answer()]], [0], "ok"),
    ([[answer(299)]], [0], "ok"),
    ([[answer(300)]], [0], "server_error"),
    ([[answer(399)]], [0], "server_error"),
    ([[answer(500)]], [0], "server_error"),
    ([[LOST, answer()]], [0, 0], "ok"),
    ([[LOST, LOST, answer()]], [0, 0], "lost"),
    ([[TAKEN, answer()]], [0], "lost"),
    ([[TIMEOUT, answer()]], [0], "timeout"),
    ([[EXHAUSTED, answer()]], [0], "exhausted"),
    ([[REFUSED, answer()]], [0], "refused"),
    ([[answer()], [answer()]], None, "ok"),
    ([[REFUSED], [REFUSED], [REFUSED]], None, "refused"),
]


@pytest.mark.parametrize(("acts", "asked", "outcome"), PREFILLS)
def test_prefill_is_tried_again_only_where_it_may_be(acts: list[list[Any]], asked: list[int] | None, outcome: str):
    async def ask() -> None:
        servers = Servers("prefill", acts)
        stage, request = PrefillStage(servers.settings, servers.pool, servers.metrics), context()
        assert await stage.run(request, [b'{"prompt":"x"}'], {"prompt": b'"x"'}) is None
        assert (request.prefill_outcome, request.stage) == (outcome, "prefill")
        if asked is None:  # each at most once, and two at most
            assert len(set(servers.asked)) == len(servers.asked) == (1 if outcome == "ok" else 2)
        else:
            assert servers.asked == asked
        assert set(servers.busy) == {(1, 1.0)}
        assert servers.at_rest()
        assert request.prefiller == servers.pool.upstreams[servers.asked[-1]].authority
        assert request.kv_state == ("unknown" if outcome == "ok" else "none")
        assert servers.value("disagg_prefill_skipped", outcome) == (outcome != "ok")
        assert bool(request.error_detail) is (outcome != "ok")
        if len(acts) == 1:  # a server that did not answer is checked
            failed = LOST in acts[0] or outcome in ("lost", "timeout") or getattr(acts[0][0], "status", 0) == 500
            assert servers.pool.upstreams[0].suspect is failed

    run(ask())


def test_the_prefill_request() -> None:
    async def ask() -> None:
        servers = Servers("prefill", [[answer(), answer()]], "--prefill-timeout-s", "7")
        stage, request = PrefillStage(servers.settings, servers.pool, servers.metrics), context()
        for pieces in ([b"abc"], [b"a", b"bc"]):
            await stage.run(request, pieces, {})
        head = b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1:1\r\nx-a: 1\r\ncontent-length: 3\r\n\r\nabc"
        assert servers.requests == [head, head]
        assert servers.options == [{"limits": Limits(whole_s=7.0)}] * 2
        assert 0 < request.prefill_sent <= request.prefill_answered
        assert 0 <= request.prefill_s <= request.prefill_answered - request.prefill_sent
        assert servers.metrics.render().count(b"disagg_prefill_seconds_count 2.0") == 1

    run(ask())


@pytest.mark.parametrize("status", [400, 404, 499])
def test_a_refusal_of_the_prefill_server_is_the_answer(status: int) -> None:
    async def ask() -> None:
        refusal = answer(status, complete=False)
        servers = Servers("prefill", [[refusal, answer(status)]])
        stage, request = PrefillStage(servers.settings, servers.pool, servers.metrics), context()
        assert await stage.run(request, [b"{}"], {"prompt": b'"x"'}) is refusal
        assert refusal.connection.aborted
        assert request.prefill_outcome == "client_error"
        assert await stage.run(request, [b"{}"], {"tool_choice": b'{"a":1}'}) is None  # it may be wrong

    run(ask())


def test_what_a_prefill_server_that_is_down_costs() -> None:
    async def ask() -> None:
        servers = Servers("prefill", [[answer()], [answer()]])
        stage = PrefillStage(servers.settings, servers.pool, servers.metrics)
        first, second = servers.pool.upstreams
        for upstream in (first, second):
            upstream.up, upstream.open_until = False, asyncio.get_running_loop().time() + 600
        request = context()
        assert await stage.run(request, [b"{}"], {}) is None
        assert (servers.asked, request.prefill_outcome) == ([], "unavailable")
        assert "does not answer" in request.error_detail
        second.refusing = True  # which costs no time: it may be tried
        request = context()
        await stage.run(request, [b"{}"], {})
        assert (servers.asked, request.prefill_outcome) == ([1], "ok")

    run(ask())


def test_a_prefill_failure_may_end_the_request(caplog: pytest.LogCaptureFixture) -> None:
    async def ask() -> None:
        servers = Servers("prefill", [[TIMEOUT, TAKEN, answer(), answer()]], "--prefill-failure", "fail")
        stage = PrefillStage(servers.settings, servers.pool, servers.metrics)
        for status, outcome in ((504, "timeout"), (503, "lost")):
            with pytest.raises(ProxyError) as caught:
                await stage.run(context(), [b"{}"], {})
            assert (caught.value.status, caught.value.stage, caught.value.outcome) == (status, "prefill", outcome)
            assert "127.0.0.1" not in str(caught.value)
            assert "http://127.0.0.1:1: " in caught.value.detail
            assert servers.value("disagg_prefill_skipped", outcome) == 0
        for _ in range(2):
            await stage.run(context(), [b"{}"], {})

    with caplog.at_level(logging.INFO, "disagg_proxy"):
        run(ask())
    assert [record.getMessage().partition(",")[0] for record in caplog.records] == [
        "prefill failed", "prefill works again",
    ]  # fmt: skip


def test_what_the_prefill_server_tells_of_the_kv_cache(caplog: pytest.LogCaptureFixture) -> None:
    states = ("stored", "timeout", "failed", "none", "stored", "made up")

    async def ask() -> None:
        told = [answer(200, ("x-kv-state", state), ("x-kv-reason", "full"), ("x-kv-wait-ms", "1500"),
                       ("x-kv-transfer-ms", "2.5")) for state in states]  # fmt: skip
        servers = Servers("prefill", [[*told, answer(200, ("x-kv-wait-ms", "x"), ("x-kv-transfer-ms", "y"))]])
        stage = PrefillStage(servers.settings, servers.pool, servers.metrics)
        degraded = []
        for state in states:
            request = context()
            await stage.run(request, [b"{}"], {})
            assert request.kv_state == (state if state != "made up" else "unknown")
            assert (request.kv_wait_ms, request.kv_transfer_ms) == (1500.0, 2.5)
            degraded.append(servers.value("disagg_kv_degraded"))
        assert degraded == [0, 1, 1, 1, 0, 0]
        request = context()
        await stage.run(request, [b"{}"], {})
        assert (request.kv_wait_ms, request.kv_transfer_ms) == (-1.0, -1.0)
        assert [servers.value("disagg_kv_state", state) for state in ("stored", "none", "unknown")] == [2, 1, 2]
        assert b"disagg_kv_wait_seconds_sum 9.0" in servers.metrics.render()

    with caplog.at_level(logging.INFO, "disagg_proxy"):
        run(ask())
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert messages[0].endswith("timeout: full")
    assert messages[1].endswith("reach the store again")


def test_the_same_beginning_goes_to_the_same_prefill_server() -> None:
    async def ask() -> None:
        for field in ("prompt", "messages", "input"):
            servers = Servers("prefill", [[answer() for _ in range(9)] for _ in range(3)])
            stage = PrefillStage(servers.settings, servers.pool, servers.metrics)
            for end in range(6):  # what comes after the beginning does not matter
                text = b'"' + b"x" * 16384 + b'%d"' % end
                request = context()
                request.prompt = PromptMeter(False, servers.pool, servers.pool).measure({field: text})
                await stage.run(request, [b"{}"], {field: text})
            assert len(set(servers.asked)) == 1
        await stage.run(context(), [b"{}"], {})

    run(ask())


def test_a_decode_server_holds_the_prompts_whose_answers_it_makes() -> None:
    async def ask() -> None:
        servers = Servers("decode", [[answer()], [answer(), REFUSED]])
        first, _ = servers.pool.upstreams
        first.held = 5_000
        stage = DecodeStage(servers.settings, servers.pool, servers.metrics)
        for _ in range(2):  # the second one is sent again, to the first server
            request, (client, _) = context(), request_of()
            request.prompt, request.prefill_outcome = Prompt(b"[]", 2, 100, is_text=False), "ok"
            await stage.run(client, request, b"{}")
        assert (servers.asked, servers.held) == ([1, 1, 0], [5_100, 5_100, 5_100])
        first.held -= 5_000
        assert servers.at_rest()

    run(ask())


def test_the_load_that_a_prompt_is_for_its_server() -> None:
    async def ask() -> None:
        servers = Servers("prefill", [[answer(), answer(500), answer(300), answer()]])
        upstream = servers.pool.upstreams[0]
        notes: list[float] = []
        upstream.load.line = types.SimpleNamespace(note=lambda ahead, took: notes.append(ahead))
        stage = PrefillStage(servers.settings, servers.pool, servers.metrics)
        for _ in range(3):
            request = context()
            request.prompt = Prompt(b"[]", 2, 100, is_text=False)
            await stage.run(request, [b"{}"], {})
        assert notes == [100]  # of a prompt that was computed
        request = context()
        request.prompt = Prompt(b"[]", 2, 100, is_text=False)
        request.prompt.known = 40
        upstream.load.tokens = 1_000
        upstream.client.request = servers.request(0, [answer()])
        await stage.run(request, [b"{}"], {})
        assert (notes[1:], upstream.load.tokens) == ([1_060], 1_000)  # what is known there is no work
        upstream.load.tokens = 0
        upstream.client.request = servers.request(0, [answer()])
        await stage.run(context(), [b"{}"], {})  # one that no route was chosen for
        assert (len(notes), upstream.load.tokens) == (2, 0)

    run(ask())


# -- decode


DECODES = [
    # what each server does; the route; which are asked; status and outcome of the error, 0 for none
    ([[answer()]], "", [0], 0, ""),
    ([[LOST, answer()]], "", [0, 0], 0, ""),
    ([[LOST, LOST, answer()]], "", [0, 0], 503, "lost"),
    ([[LOST, answer()]], "other", [0], 503, "lost"),
    ([[TAKEN, answer()]], "", [0], 503, "lost"),
    ([[TIMEOUT, answer()]], "", [0], 504, "timeout"),
    ([[UpstreamError("protocol", "x"), answer()]], "", [0], 502, "protocol"),
    ([[UpstreamError("unreachable", "x", taken=False)]], "", [0], 503, "unreachable"),
    ([[EXHAUSTED, answer()]], "", [0], 503, "exhausted"),
    ([[REFUSED, answer()]], "", [0], 503, "refused"),
]


@pytest.mark.parametrize(("acts", "route", "asked", "status", "outcome"), DECODES)
def test_decode_is_tried_again_only_where_it_may_be(
    acts: list[list[Any]], route: str, asked: list[int], status: int, outcome: str
) -> None:
    async def ask() -> None:
        servers = Servers("decode", acts)
        stage, request = DecodeStage(servers.settings, servers.pool, servers.metrics), context(route=route)
        one, channel = request_of()
        error = await error_of(stage.run(one, request, b"{}"))
        assert (error is not None, servers.asked) == (status > 0, asked)
        if error is not None:
            assert (error.status, error.outcome) == (status, outcome)
            assert error.stage == ("proxy" if outcome == "exhausted" else "decode")
            assert error.detail
        assert set(servers.busy) == {(1, 1.0)}
        assert servers.at_rest()
        assert bool(channel.transport.written) is (status == 0)
        assert servers.value("disagg_retries", "decode") == len(asked) - 1 + (outcome in ("refused", "unreachable"))
        assert servers.pool.upstreams[0].suspect is (LOST in acts[0] or outcome in ("lost", "timeout", "protocol"))
        assert request.stage == "decode"
        assert (request.decode_s >= 0) is (status == 0)

    run(ask())


def test_another_decode_server_is_asked_where_one_refuses() -> None:
    async def ask() -> None:
        for _ in range(3):
            servers = Servers("decode", [[REFUSED, REFUSED], [answer(), answer()]])
            stage = DecodeStage(servers.settings, servers.pool, servers.metrics)
            for _ in range(2):
                await stage.run(request_of()[0], context(), b"{}")
            assert servers.asked.count(1) == 2
            assert servers.asked.count(0) <= 1
        servers = Servers("decode", [[REFUSED, REFUSED]] * 3)
        stage = DecodeStage(servers.settings, servers.pool, servers.metrics)
        assert await error_of(stage.run(request_of()[0], context(), b"{}")) is not None
        assert len(servers.asked) == 2

    run(ask())


def test_the_decode_request() -> None:
    async def ask() -> None:
        many = [answer() for _ in range(5)]
        servers = Servers("decode", [many], "--decode-timeout-s", "7", "--stream-idle-timeout-s", "3")
        stage = DecodeStage(servers.settings, servers.pool, servers.metrics)
        sent = []
        for method, body in (("POST", b"abc"), ("POST", b""), ("GET", b""), ("HEAD", b""), ("GET", b"z" * 70_000)):
            request = context("/p", "other", method)
            await stage.run(request_of(method)[0], request, body)
            assert request.decode_sent > 0
            sent.append(servers.requests[-1].partition(b" HTTP/1.1\r\nhost: 127.0.0.1:1\r\nx-a: 1\r\n"))
        assert [(first, rest) for first, _, rest in sent] == [
            (b"POST /p", b"content-length: 3\r\n\r\nabc"), (b"POST /p", b"content-length: 0\r\n\r\n"),
            (b"GET /p", b"\r\n"), (b"HEAD /p", b"\r\n"),
            (b"GET /p", b"content-length: 70000\r\n\r\n" + b"z" * 70_000),
        ]  # fmt: skip
        assert [options["no_body"] for options in servers.options] == [False, False, False, True, False]
        assert servers.options[0]["limits"] == Limits(begin_s=7.0, silence_s=3.0)

    run(ask())


@pytest.mark.parametrize(
    ("path", "prefilled", "status", "asked"),
    [
        ("/v1/responses/r1", "", 404, 3),
        ("/v1/responses/r1", "", 403, 1),
        ("/v1/responses", "ok", 404, 1),
        ("/v1/models/x", "", 404, 1),
    ],
)
def test_a_stored_response_is_looked_for_on_every_server(path: str, prefilled: str, status: int, asked: int) -> None:
    async def ask() -> None:
        answers = [answer(status, complete=number == 1) for number in range(3)]
        servers = Servers("decode", [[each] for each in answers])
        stage, request = DecodeStage(servers.settings, servers.pool, servers.metrics), context(path, "other")
        request.prefill_outcome = prefilled
        one, channel = request_of("GET", path)
        for each in answers:
            each.connection.error = UpstreamError("lost", "cut")
        error = await error_of(stage.run(one, request, b""))
        assert error is None or error.outcome == "lost"  # the last answer was cut
        assert sorted(servers.asked) == sorted(set(servers.asked))
        assert len(servers.asked) == asked
        dropped = [answers[number] for number in servers.asked[:-1]]
        assert all(each.connection.aborted for each in dropped if not each.complete)
        assert channel.transport.written.startswith(b"HTTP/1.1 %d " % status)
        assert servers.at_rest()

    run(ask())


def test_usage_is_noted_of_good_generating_answers_alone() -> None:
    usage = b'{"usage":{"prompt_tokens":10,"cached_tokens":9}}'

    async def ask() -> None:
        for status, route, noted in ((200, "", True), (399, "", True), (400, "", False), (200, "other", False)):
            servers = Servers("decode", [[answer(status, body=usage)]])
            stage = DecodeStage(servers.settings, servers.pool, servers.metrics)
            one, channel = request_of()
            await stage.run(one, context(route=route), b"{}")
            assert (b"x-prompt-tokens: 10\r\n" in channel.transport.written) is noted
            assert servers.value("disagg_usage_reports") == noted

    run(ask())


@pytest.mark.parametrize(
    ("kind", "status", "stage", "suspect"),
    [("lost", 503, "decode", True), ("timeout", 504, "decode", True), ("client_stalled", 504, "proxy", False)],
)
def test_a_stream_that_is_cut_is_told(kind: str, status: int, stage: str, suspect: bool) -> None:
    async def ask() -> None:
        cut = answer(200, ("content-type", "text/event-stream"), body=b"", complete=False, events=True)
        cut.connection.error = UpstreamError(kind, "why")
        servers = Servers("decode", [[cut]])
        decode = DecodeStage(servers.settings, servers.pool, servers.metrics)
        error = await error_of(decode.run(request_of()[0], context(), b"{}"))
        assert error is not None
        assert (error.status, error.stage, error.outcome) == (status, stage, kind)
        assert servers.pool.upstreams[0].suspect is suspect
        assert servers.at_rest()

    run(ask())


def test_a_stream_tells_where_its_time_went() -> None:
    async def ask() -> None:
        for route, complete, told in (("", False, True), ("", True, True), ("other", False, False)):
            stream = answer(200, ("x-kv-timing", "queue=1.00,first-step=2.00,load=3.00"), body=b"data: [DONE]\n\n",
                            complete=complete, events=True)  # fmt: skip
            servers = Servers("decode", [[stream]])
            stage, request = DecodeStage(servers.settings, servers.pool, servers.metrics), context(route=route)
            one, channel = request_of()
            await stage.run(one, request, b"{}")
            assert (b"\r\nserver-timing: " in channel.transport.written) is told
            assert request.decode_told == ((0.001, 0.002, 0.003) if told else ())
            assert (request.status, request.event_stream) == (200, True)
            assert channel.transport.written.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
            assert stream.connection.aborted is False

    run(ask())


# -- the handler


def handler_of(servers: Servers, served: list[tuple[str, str]]) -> RequestHandler:
    async def own(method: str, path: str) -> tuple[int, list[bytes], bytes]:
        served.append((method, path))
        return 200, [b"own: 1\r\n"], b"mine"

    class Stage:
        def __init__(self, name: str) -> None:
            self.name = name

        async def run(self, *arguments: Any) -> None:
            served.append((self.name, arguments[0].path))
            if self.name != "prefill":
                arguments[1].stage = self.name
                arguments[0].answer(200, [], b"{}")

    return RequestHandler(
        servers.settings,
        servers.metrics,
        None,
        Stage("prefill"),
        Stage("decode"),
        Stage("adapters"),
        own,
        PromptMeter(False, servers.pool, servers.pool),
    )  # type: ignore[arg-type]


JSON = ("content-type", "application/json")
PROMPT = json.dumps({"prompt": "x"}).encode()
HANDLED = [
    # method, path, body, header lines, flags; status; who served it
    ("POST", "/v1/completions", PROMPT, [JSON], (), 200, ["prefill", "decode"]),
    ("GET", "/v1/completions", b"", [], (), 200, ["decode"]),
    ("POST", "/v1/completions", PROMPT, [JSON], ("--decode-only",), 200, ["decode"]),
    ("POST", "/v1/completions", b"[]", [JSON], (), 200, ["decode"]),
    ("POST", "/v1/completions", b"{", [JSON], (), 400, []),
    ("POST", "/v1/completions", PROMPT, [("content-type", "Application/JSON ; charset=x")], (), 200,
     ["prefill", "decode"]),
    ("POST", "/v1/completions", PROMPT, [("content-type", "text/plain")], (), 415, []),
    ("POST", "/v1/completions", PROMPT, [], (), 415, []),
    ("POST", "/v1/completions", b'{"kv_transfer_params":{}}', [JSON], (), 400, []),
    ("POST", "/v1/completions", b'{"kv_transfer_params":{}}', [JSON], ("--trusted-kv-transfer-params",), 200,
     ["prefill", "decode"]),
    ("POST", "/v1/embeddings", b'{"kv_transfer_params":{}}', [JSON], (), 400, []),
    ("POST", "/v1/embeddings", b'{"kv_transfer_params":{}}', [JSON], ("--trusted-kv-transfer-params",), 200,
     ["decode"]),
    ("POST", "/v1/load_lora_adapter", b"{}", [JSON], (), 200, ["adapters"]),
    ("POST", "/v1/unload_lora_adapter", b"{}", [JSON], (), 200, ["adapters"]),
    ("GET", "/v1/load_lora_adapter", b"", [], (), 200, ["decode"]),
    ("GET", "/metrics", b"", [], (), 200, ["GET"]),
    ("POST", "/v1/completions", PROMPT, [JSON, ("content-length", "10")], ("--max-body-bytes", "10"), 200,
     ["prefill", "decode"]),
    ("POST", "/v1/completions", PROMPT, [JSON, ("content-length", "11")], ("--max-body-bytes", "10"), 413, []),
    ("GET", "/v1/models", b"", [("host", "y")], (), 400, []),
    ("OPTIONS", "/v1/models", b"", [("origin", "http://a")], ("--cors-origin", "http://a"), 204, []),
    ("OPTIONS", "/v1/models", b"", [("origin", "http://b")], ("--cors-origin", "http://a"), 200, ["decode"]),
    ("OPTIONS", "/v1/models", b"", [("origin", "http://a")], (), 200, ["decode"]),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path", "body", "lines", "flags", "status", "who"), HANDLED)
def test_who_serves_a_request(
    method: str, path: str, body: bytes, lines: list[tuple[str, str]], flags: tuple[str, ...], status: int,
    who: list[str],
) -> None:  # fmt: skip
    async def ask() -> None:
        served: list[tuple[str, str]] = []
        servers = Servers("decode", [[]], *flags)
        handler = handler_of(servers, served)
        one, channel = request_of(method, path, body, *lines)
        await handler.handle(one)
        assert channel.transport.written.startswith(b"HTTP/1.1 %d " % status)
        assert [name for name, _ in served] == who
        assert handler.finished == (path != "/metrics")
        assert servers.metrics.render().count(b"disagg_e2e_seconds_count 1.0") == handler.finished
        if len(lines) == 1 and lines[0][0] == "host":
            assert not one.keep_alive

    run(ask())


@pytest.mark.parametrize(
    ("authorization", "method", "path", "more", "status"),
    [
        ("Bearer secret", "GET", "/v1/models", (), 200),
        ("bEARER   secret ", "GET", "/v1/models", (), 200),
        ("Bearer secre", "GET", "/v1/models", (), 401),
        ("Bearer secretx", "GET", "/v1/models", (), 401),
        ("Basic secret", "GET", "/v1/models", (), 401),
        ("", "GET", "/v1/models", (), 401),
        ("", "HEAD", "/v1/models", (), 401),
        ("", "GET", "/metrics", (), 401),
        ("Bearer secret", "GET", "/metrics", (), 200),
        ("", "GET", "/health", (), 200),
        ("", "OPTIONS", "/v1/models", (), 200),
        ("", "OPTIONS", "/v1/models", (("content-length", "0"),), 200),
        ("", "OPTIONS", "/v1/models", (("content-length", "1"),), 401),
        ("", "OPTIONS", "/v1/models", (("transfer-encoding", "chunked"),), 401),
    ],
)
def test_who_needs_a_key(
    authorization: str, method: str, path: str, more: tuple[tuple[str, str], ...], status: int
) -> None:
    async def ask() -> None:
        lines = [("authorization", authorization)] if authorization else []
        handler = handler_of(Servers("decode", [[]], api_key="secret"), [])
        one, channel = request_of(method, path, b"", *lines, *more)
        await handler.handle(one)
        assert channel.transport.written.startswith(b"HTTP/1.1 %d " % status)

    run(ask())


@pytest.mark.parametrize(
    ("path", "fields", "wanted"),
    [
        ("/v1/completions", {"prompt": "x"}, False),
        ("/v1/completions", {"prompt": "x", "stream_options": {}}, True),
        ("/v1/chat/completions", {"messages": []}, False),
        ("/v1/messages", {"messages": []}, True),
        ("/v1/responses", {"input": "x"}, True),
    ],
)
def test_where_the_usage_is_looked_for(path: str, fields: dict[str, Any], wanted: bool) -> None:
    async def ask() -> None:
        servers = Servers("decode", [[]])
        handler = handler_of(servers, [])
        seen = []

        async def decode(client: Any, request: RequestContext, body: bytes) -> None:
            seen.append(request.want_usage)
            request.sent, request.ttft_s, request.decode_sent = 7, 0.5, request.start + 0.1
            request.prefill_outcome = "timeout"
            client.answer(200, [], b"{}")

        handler._decode.run = decode  # type: ignore[method-assign]
        await handler.handle(request_of("POST", path, json.dumps(fields).encode(), JSON)[0])
        assert seen == [wanted]
        assert servers.value("disagg_streamed_bytes") == 7
        assert servers.value("disagg_requests", path, "proxy", "ok") == 1
        assert servers.value("disagg_requests", path, "prefill", "timeout") == 1
        rendered = servers.metrics.render()
        assert b"disagg_ttft_seconds_sum 0.5" in rendered
        assert b'disagg_ttft_part_seconds_count{part="decode"} 1.0' in rendered

    run(ask())


def test_what_the_access_log_is_told() -> None:
    async def ask() -> None:
        servers = Servers("decode", [[]], "--cors-origin", "http://a")
        handler = handler_of(servers, [])
        lines: list[tuple[int, str, float]] = []
        handler._access_log = types.SimpleNamespace(  # type: ignore[assignment]
            write=lambda request, total: lines.append((request.status, request.outcome, total))
        )
        for method, path in (("OPTIONS", "/v1/models"), ("GET", "/metrics"), ("POST", "/v1/completions")):
            await handler.handle(request_of(method, path, b"", ("origin", "http://a"))[0])
        assert [(status, outcome) for status, outcome, _ in lines] == [(204, "ok"), (415, "bad_request")]
        assert all(0 <= total < 30 for *_, total in lines)

    run(ask())


def test_an_answer_speaks_for_a_server() -> None:
    async def ask() -> None:
        for role, make in (("decode", DecodeStage), ("prefill", PrefillStage)):
            servers = Servers(role, [[answer()]])
            upstream, stage = servers.pool.upstreams[0], make(servers.settings, servers.pool, servers.metrics)
            upstream.failures = 2
            if role == "decode":
                await stage.run(request_of()[0], context(), b"{}")
            else:
                assert b"disagg_kv_degraded 0.0" in servers.metrics.render()
                await stage.run(context(), [b"{}"], {})
            assert (upstream.failures, upstream.healthy) == (0, True)

    run(ask())


@pytest.mark.parametrize("gone", [True, False])
def test_a_request_that_is_cancelled(gone: bool) -> None:
    """The client has hung up, or the proxy ends."""

    async def ask() -> None:
        servers = Servers("decode", [[]], "--max-in-flight", "1")
        handler = handler_of(servers, [])
        begun = asyncio.Event()

        async def decode(*_: Any) -> None:
            begun.set()
            await asyncio.Event().wait()

        decoding, handler._decode.run = handler._decode.run, decode  # type: ignore[method-assign]
        one, channel = request_of("GET", "/v1/models")
        task = asyncio.create_task(handler.handle(one))
        await begun.wait()
        one.gone = gone
        task.cancel()
        await task
        assert channel.transport.written[:12] == (b"" if gone else b"HTTP/1.1 503")
        assert servers.value("disagg_requests", "other", "proxy", "client_gone" if gone else "shutdown") == 1
        handler._decode.run = decoding  # type: ignore[method-assign]
        one, channel = request_of("GET", "/v1/models")
        await handler.handle(one)  # its place is free again
        assert channel.transport.written.startswith(b"HTTP/1.1 200")

    run(ask())


def test_a_failure_inside_the_proxy_is_told_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def ask() -> None:
        servers = Servers("decode", [[]])
        handler = handler_of(servers, [])

        async def decode(*_: Any) -> None:
            raise ZeroDivisionError("inside")

        handler._decode.run = decode  # type: ignore[method-assign]
        one, channel = request_of("GET", "/v1/models", b"", ("x-request-id", "r1"))
        await handler.handle(one)
        assert channel.transport.written.startswith(b"HTTP/1.1 500")
        assert b"inside" not in channel.transport.written
        assert servers.value("disagg_requests", "other", "proxy", "internal_error") == 1

    run(ask())
    assert "request r1 failed inside the proxy" in caplog.text
