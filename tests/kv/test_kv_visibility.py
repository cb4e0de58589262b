"""kv_visibility: an answer is held until every engine request of it is visible on every rank."""

from __future__ import annotations

import asyncio
import json
import types
import uuid

import pytest

from disagg_prefill_lmcache_v1.kv import visibility as kv_visibility
from disagg_prefill_lmcache_v1.kv.settings import from_environment
from disagg_prefill_lmcache_v1.kv.visibility import Announcer, HoldUntilVisible


class FakeEngine:
    """An ASGI app that answers as vLLM does and announces as the connector does, step by step."""

    def __init__(self, name, *, status=200, streamed=False, ids=("cmpl-{id}-0-1a2b3c4d",), begin=True, own_id=""):
        self.announcer = Announcer(name)
        self.own_id = own_id  # of the request, where vLLM does not take the header's
        self.status, self.streamed, self.ids, self.begin = status, streamed, ids, begin
        self.seen_id = ""
        self.answered = asyncio.Event()

    def end(self, *args, **kwargs):
        for text in self.ids:
            self.announcer.end(text.format(id=self.seen_id), *args, **kwargs)

    async def __call__(self, scope, receive, send):
        self.seen_id = dict(scope["headers"])[b"x-request-id"].decode()
        if self.own_id:
            scope["state"]["request_metadata"] = types.SimpleNamespace(request_id=self.own_id)
        if self.begin:
            for text in self.ids:
                self.announcer.begin(text.format(id=self.seen_id))
        kind = b"text/event-stream" if self.streamed else b"application/json"
        await send({"type": "http.response.start", "status": self.status, "headers": [(b"content-type", kind)]})
        await send({"type": "http.response.body", "body": b"one", "more_body": True})
        self.answered.set()
        await send({"type": "http.response.body", "body": b"two", "more_body": False})


class Call:
    """One request through the middleware; ``sent`` is what the client has so far."""

    def __init__(self, middleware, path="/v1/completions", headers=((b"x-request-id", b"abc"),)):
        self.sent = []

        async def send(message):
            self.sent.append(message)

        scope = {"type": "http", "path": path, "headers": list(headers)}
        self.task = asyncio.ensure_future(middleware(scope, None, send))

    @property
    def body(self):
        return b"".join(m.get("body", b"") for m in self.sent if m["type"] == "http.response.body")

    @property
    def headers(self):
        start = next(m for m in self.sent if m["type"] == "http.response.start")
        return {k.decode(): v.decode() for k, v in start["headers"]}


async def held(call, engine):
    """Wait until the app has answered and the loop had every chance to pass the answer on."""
    await asyncio.wait_for(engine.answered.wait(), 60)
    for _ in range(20):
        await asyncio.sleep(0)
    return not call.task.done()


@pytest.fixture
def name(monkeypatch):
    value = f"@disagg-test-{uuid.uuid4().hex}"
    monkeypatch.setenv("DISAGG_KV_VISIBILITY", value)
    return value


def run(scenario):
    asyncio.run(asyncio.wait_for(scenario, 90))


def test_held_until_the_end_is_said(name):
    async def scenario():
        engine = FakeEngine(name)
        call = Call(HoldUntilVisible(engine))
        assert await held(call, engine)
        assert call.sent == []
        engine.end(0, 1, "stored", transfer_ms=12.5)
        await call.task
        assert call.body == b"onetwo"
        assert call.headers["x-kv-state"] == "stored"
        assert call.headers["x-kv-transfer-ms"] == "12.50"
        assert float(call.headers["x-kv-wait-ms"]) > 0
        assert "x-kv-reason" not in call.headers
        names, times = zip(*(part.split("=") for part in call.headers["x-kv-timing"].split(",")), strict=True)
        assert names == ("queue", "prefill", "hold")
        assert times[2] == call.headers["x-kv-wait-ms"]
        assert all(0 <= float(value) < 90_000 for value in times)

    run(scenario())


def test_every_rank_and_every_prompt_counts(name):
    async def scenario():
        engine = FakeEngine(name, ids=("cmpl-{id}-0", "cmpl-{id}-1"))
        call = Call(HoldUntilVisible(engine))
        assert await held(call, engine)
        engine.announcer.end("cmpl-abc-0", 0, 2, "stored")
        engine.announcer.end("cmpl-abc-0", 1, 2, "stored")
        engine.announcer.end("cmpl-abc-1", 1, 2, "stored")
        assert await held(call, engine)
        engine.announcer.end("cmpl-abc-1", 0, 2, "stored")
        await call.task
        assert call.headers["x-kv-state"] == "stored"

    run(scenario())


def test_deadline(name, monkeypatch):
    monkeypatch.setenv("DISAGG_KV_WAIT_TIMEOUT", "0.05")

    async def scenario():
        call = Call(HoldUntilVisible(FakeEngine(name)))
        await call.task
        assert call.headers["x-kv-state"] == "timeout"
        assert "0.05 s" in call.headers["x-kv-reason"]
        assert call.body == b"onetwo"

    run(scenario())


def test_failure_says_why_at_once(name):
    async def scenario():
        engine = FakeEngine(name)
        call = Call(HoldUntilVisible(engine))
        await engine.answered.wait()
        engine.end(0, 1, "failed", "the store\nis gone")
        await call.task
        assert call.headers["x-kv-state"] == "failed"
        assert call.headers["x-kv-reason"] == "the store is gone"

    run(scenario())


def test_an_engine_without_connector_is_noticed(name, monkeypatch):
    monkeypatch.setattr(kv_visibility, "_ANNOUNCE_TIMEOUT_S", 0.05)

    async def scenario():
        call = Call(HoldUntilVisible(FakeEngine(name, begin=False)))
        await call.task
        assert call.headers["x-kv-state"] == "failed"
        assert "KV connector" in call.headers["x-kv-reason"]

    run(scenario())


def test_request_that_asked_not_to_be_stored(name):
    async def scenario():
        engine = FakeEngine(name)
        call = Call(HoldUntilVisible(engine))
        await engine.answered.wait()
        engine.end(0, 1, "none")
        await call.task
        assert call.headers["x-kv-state"] == "none"

    run(scenario())


def test_stream_passes_and_only_its_end_is_held(name):
    async def scenario():
        engine = FakeEngine(name, streamed=True)
        call = Call(HoldUntilVisible(engine))
        assert await held(call, engine)
        assert call.body == b"one"
        engine.end(0, 1, "stored")
        await call.task
        assert call.body == b"onetwo"

    run(scenario())


@pytest.mark.parametrize("status", [400, 404, 500])
def test_errors_are_not_held(name, status):
    async def scenario():
        call = Call(HoldUntilVisible(FakeEngine(name, status=status, begin=False)))
        await call.task
        assert call.body == b"onetwo"
        assert "x-kv-state" not in call.headers

    run(scenario())


def test_a_request_may_ask_not_to_be_held(name):
    async def scenario():
        call = Call(HoldUntilVisible(FakeEngine(name)), headers=((b"x-request-id", b"abc"), (b"x-kv-hold", b"off")))
        await call.task
        assert call.body == b"onetwo"
        assert "x-kv-state" not in call.headers

    run(scenario())


def test_id_is_made_when_absent_and_requests_do_not_mix(name):
    async def scenario():
        engines = [FakeEngine(name), FakeEngine(name)]
        middleware = HoldUntilVisible(engines[0])
        first = Call(middleware, headers=())
        await engines[0].answered.wait()
        middleware._app = engines[1]
        second = Call(middleware, headers=((b"x-request-id", b"other"),))
        assert len(engines[0].seen_id) >= 32
        assert await held(second, engines[1])
        engines[0].end(0, 1, "stored")
        await first.task
        assert not second.task.done()
        engines[1].end(0, 1, "stored")
        await second.task
        assert middleware._listener._waiting == {}

    run(scenario())


@pytest.mark.parametrize(
    "request_id",
    ["cmpl-abc-0", "cmpl-abc-0-0f0f0f0f", "chatcmpl-abc", "chatcmpl-abc-12345678", "chatcmpl-abc_1-1", "resp_abc_0"],
)
def test_engine_ids_of_all_routes_are_found(name, request_id):
    async def scenario():
        listener = kv_visibility.Listener(name)
        watch = listener.watch("abc")
        assert listener.find(request_id) == [watch]
        assert listener.find(request_id.replace("abc", "abcd")) == []
        listener.close()

    run(scenario())


@pytest.mark.parametrize("own_id", ["resp_0f0f", "chosen_by-the-client", "abc-d"])
def test_responses_have_an_id_that_is_not_in_the_header(name, own_id):
    async def scenario():
        engine = FakeEngine(name, ids=(own_id + "_0-1a2b3c4d",), own_id=own_id)
        other = FakeEngine(name, ids=(own_id + "x_0-1a2b3c4d",), own_id=own_id + "x")
        middleware = HoldUntilVisible(engine)
        call = Call(middleware, path="/v1/responses", headers=())
        await engine.answered.wait()
        middleware._app = other
        second = Call(middleware, path="/v1/responses", headers=())
        assert await held(second, other)
        other.end(0, 1, "failed", "x")
        await second.task
        assert await held(call, engine)
        engine.end(0, 1, "stored")
        await call.task
        assert (call.headers["x-kv-state"], second.headers["x-kv-state"]) == ("stored", "failed")
        assert float(call.headers["x-kv-wait-ms"]) < 500
        assert middleware._listener._states == {}

    run(scenario())


@pytest.mark.parametrize("path", ["/v1/messages/count_tokens", "/v1/completions/render", "/v1/responses/resp_1/cancel"])
def test_routes_that_generate_nothing_are_not_held(name, path):
    async def scenario():
        call = Call(HoldUntilVisible(FakeEngine(name, begin=False)), path=path)
        await call.task
        assert call.body == b"onetwo"
        assert "x-kv-state" not in call.headers

    run(scenario())


def test_more_messages_than_the_kernel_queues_arrive(name):
    """A step can schedule more requests than Linux queues datagrams; each must be announced."""

    async def scenario():
        listener = kv_visibility.Listener(name)
        watches = {f"id{i}": listener.watch(f"id{i}") for i in range(3000)}
        asyncio.get_running_loop().remove_reader(listener._socket.fileno())  # a busy API server reads nothing
        announcer = Announcer(name)
        for token in watches:
            announcer.begin(f"cmpl-{token}-0")
        deadline = asyncio.get_running_loop().time() + 60
        while not all(w.announced.is_set() for w in watches.values()):
            listener.drain()
            assert asyncio.get_running_loop().time() < deadline
            await asyncio.sleep(0.001)
        announcer.close()

    run(scenario())


def test_an_end_may_overtake_its_begin(name):
    async def scenario():
        visibility = kv_visibility.Visibility()
        visibility.end("r", 0, 2, "stored", "", 1.0)
        visibility.begin("r")
        assert not visibility.complete.is_set()
        visibility.end("r", 1, 2, "stored", "", 1.0)
        visibility.begin("r")
        assert visibility.complete.is_set()

    run(scenario())


def test_several_api_servers_each_hear_of_their_own_requests(name):
    async def scenario():
        engines = [FakeEngine(name) for _ in range(3)]
        calls = [
            Call(HoldUntilVisible(engine), headers=((b"x-request-id", b"request-%d" % i),))
            for i, engine in enumerate(engines)
        ]
        for call, engine in zip(calls, engines, strict=True):
            assert await held(call, engine)
        for i in (2, 0, 1):
            engines[i].end(0, 1, "stored", transfer_ms=float(i))
            await calls[i].task
            assert calls[i].headers["x-kv-state"] == "stored"
            assert calls[i].headers["x-kv-transfer-ms"] == f"{i}.00"
        assert all(call.task.done() for call in calls)

    run(scenario())


def test_late_announcement_is_waited_for(name):
    async def scenario():
        engine = FakeEngine(name, begin=False)
        call = Call(HoldUntilVisible(engine))
        assert await held(call, engine)
        engine.end(0, 1, "stored")
        await call.task
        assert call.headers["x-kv-state"] == "stored"

    run(scenario())


def test_foreign_datagrams_are_ignored(name):
    async def scenario():
        errors = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: errors.append(context))
        engine = FakeEngine(name)
        call = Call(HoldUntilVisible(engine))
        await engine.answered.wait()
        for junk in (b"", b"\xff", b"[]", b"{}", json.dumps({"id": 7}).encode(), b'{"id": "cmpl-abc-0", "state": "x"}'):
            engine.announcer._socket.sendto(junk, engine.announcer._addresses[0])
        assert await held(call, engine)
        engine.end(0, 1, "stored")
        await call.task
        assert errors == []

    run(scenario())


def test_without_the_variable_nothing_happens(monkeypatch):
    monkeypatch.delenv("DISAGG_KV_VISIBILITY", raising=False)
    assert not Announcer()
    Announcer().begin("cmpl-x")

    async def scenario():
        async def app(scope, receive, send):
            await send({"type": "http.response.start", "status": 200, "headers": []})

        call = Call(HoldUntilVisible(app))
        await call.task
        assert call.sent[0]["headers"] == []

    run(scenario())


@pytest.mark.parametrize("text", ["0", "-1", "soon", "nan", "1e9"])
def test_bad_deadline_is_refused(monkeypatch, text):
    monkeypatch.setenv("DISAGG_KV_WAIT_TIMEOUT", text)
    with pytest.raises(ValueError, match=r"DISAGG_KV_WAIT_TIMEOUT .*: allowed: a number above 0, at most 3600"):
        from_environment()
