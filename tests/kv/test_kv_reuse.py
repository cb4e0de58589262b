"""reuse: an answer tells what its workers have loaded, not what vLLM meant to load."""

from __future__ import annotations

import asyncio
import time
import uuid

import pytest

pytest.importorskip("torch", reason="torch is not installed: masks of loads are what is tested")

import torch

from disagg_prefill_lmcache_v1.kv.meter import LoadStats, Meter
from disagg_prefill_lmcache_v1.kv.reuse import ReuseAccount, TellReuse, used_tokens
from disagg_prefill_lmcache_v1.kv.visibility import Announcer

BLOCK = 32


class Heard:
    def __init__(self):
        self.said = []

    def reused(self, request_id, tokens, scheduled_at, load_s=0.0):
        self.said.append((request_id, tokens))
        self.times = (scheduled_at, load_s)


@pytest.fixture
def account():
    made = ReuseAccount(Heard(), ranks=2)
    made.said = made._announcer.said
    return made


def from_ranks(*used):
    """What vLLM makes of the reports of the ranks of one step."""
    stats = LoadStats(data={})
    for tokens in used:
        meter = Meter("cpu")
        meter.used("r", tokens)
        stats = stats.aggregate(meter.take())
    return stats.data["used_tokens"]


# the scheduler's account


def test_what_vllm_has_and_what_all_ranks_have_loaded_counts(account):
    account.looked_up("r", 96)
    account.scheduled("r", 503)
    assert account.said == []
    account.loaded(from_ranks(504, 504))
    assert account.said == [("r", 599)], "the last token is computed, loaded or not"


def test_the_rank_that_has_least_counts(account):
    account.looked_up("r", 96)
    account.scheduled("r", 503)
    account.loaded(from_ranks(504))
    account.loaded(from_ranks(64))
    assert account.said == [("r", 160)]


def test_a_load_that_failed_is_no_reuse(account):
    account.looked_up("r", 0)
    account.scheduled("r", 599)
    account.loaded(from_ranks(0, 504))
    assert account.said == [("r", 0)]


def test_without_a_load_it_is_told_at_once(account):
    account.looked_up("r", 64)
    account.scheduled("r", 0)
    assert account.said == [("r", 64)]


def test_each_request_is_told_once(account):
    account.looked_up("r", 0)
    account.scheduled("r", 599)
    account.loaded(from_ranks(599, 599))
    account.scheduled("r", 0)  # as vLLM says when an asynchronous load has ended
    account.looked_up("r", 32)
    account.scheduled("r", 200)  # it was preempted
    account.loaded(from_ranks(200, 200))
    assert account.said == [("r", 599)]


def test_a_request_that_ends_with_its_first_token_is_told(account):
    account.looked_up("r", 0)
    account.scheduled("r", 599)
    account.finished("r")  # vLLM ends it before it hands on what the workers have said of the same step
    account.loaded(from_ranks(599, 599))
    assert account.said == [("r", 599)]
    account.looked_up("r", 0)
    account.scheduled("r", 0)
    assert account.said == [("r", 599), ("r", 0)], "another request of the same name"


def test_aborted_requests_leave_nothing_that_grows(account):
    for number in range(5000):
        account.looked_up(str(number), 0)
        account.scheduled(str(number), 10)
        account.finished(str(number))
    assert len(account._loading) < 2000
    assert not account._known
    assert not account._cached


def test_a_load_takes_what_the_slowest_rank_took_or_beside_the_steps_until_it_is_known():
    step, beside = Heard(), Heard()
    for heard in (step, beside):
        account = ReuseAccount(heard, ranks=2, beside=heard is beside)
        begin = time.monotonic()
        account.scheduled("r", 599)
        account.loaded({"r": [25.0, 1, 599]})
        account.loaded({"r": [50.0, 1, 599]})
        assert begin <= heard.times[0] <= time.monotonic()
    assert step.times[1] == 50.0
    assert 0 < beside.times[1] < 50.0


# the workers' word


@pytest.mark.parametrize(
    ("lacking", "cached", "used"),
    [((), 0, 300), ((), 96, 204), ((299,), 0, 288), ((0,), 0, 0), ((100, 200), 0, 96), ((100,), 96, 0), ((5,), 64, 0)],
)
def test_vllm_computes_from_the_first_block_that_lacks_a_token(lacking, cached, used):
    missing = torch.zeros(300, dtype=torch.bool)
    missing[list(lacking)] = True
    assert used_tokens(missing, cached, BLOCK) == used


# the answer


class Engine:
    """An ASGI app that answers as vLLM does, and tells what it reuses when it is let."""

    def __init__(self, name, *, ids=("cmpl-{}-0-1a2b",), status=200, streamed=False, early=False):
        self.announcer = Announcer(name)
        self.ids, self.status, self.early = ids, status, early
        self.kind = b"text/event-stream" if streamed else b"application/json"
        self.go = asyncio.Event()
        self.entered = asyncio.Event()

    async def __call__(self, scope, receive, send):
        self.entered.set()
        token = dict(scope["headers"])[b"x-request-id"].decode()
        await send({"type": "http.response.start", "status": self.status, "headers": [(b"content-type", self.kind)]})
        if self.early:
            await send({"type": "http.response.body", "body": b"created", "more_body": True})
        await self.go.wait()
        for tokens, name in enumerate(self.ids, 100):
            self.announcer.reused(name.format(token), tokens, time.monotonic())
        await send({"type": "http.response.body", "body": b"one", "more_body": True})
        await send({"type": "http.response.body", "body": b"two", "more_body": False})


async def answer(engine, headers=((b"x-request-id", b"abc"),), go=True, middleware=None):
    sent = []

    async def send(message):
        sent.append(message)

    if go:
        engine.go.set()
    scope = {"type": "http", "path": "/v1/completions", "headers": list(headers)}
    await asyncio.wait_for((middleware or TellReuse(engine))(scope, None, send), 60)
    body = b"".join(message.get("body", b"") for message in sent)
    return {k.decode(): v.decode() for k, v in sent[0]["headers"]}, body


@pytest.fixture
def name(monkeypatch):
    value = f"@disagg-test-{uuid.uuid4().hex}"
    monkeypatch.setenv("DISAGG_KV_VISIBILITY", value)
    return value


@pytest.mark.parametrize(
    ("ids", "tokens"),
    [
        (("cmpl-{}-0-1a2b",), 100),
        (("chatcmpl-{}-1a2b",), 100),
        (("cmpl-{}-0-1a2b", "cmpl-{}-1-3c4d"), 201),
        (("0_chatcmpl-{}-1a", "1_chatcmpl-{}-1a"), 101),
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
def test_the_answer_tells(name, ids, tokens, streamed):
    async def scenario():
        made = Engine(name, ids=ids, streamed=streamed)
        headers, body = await answer(made)
        assert body == b"onetwo"
        if len(ids) == 1 or not streamed:  # the first bytes may come before the second prompt
            assert headers["x-kv-reused-tokens"] == str(tokens)

    asyncio.run(scenario())


def timing(headers):
    return {name: float(ms) for name, _, ms in (pair.partition("=") for pair in headers["x-kv-timing"].split(","))}


def test_the_parts_of_the_time_until_the_first_bytes_are_told(name):
    async def scenario():
        made = Engine(name, ids=())
        begin = time.monotonic()
        waiting = asyncio.ensure_future(answer(made, go=False))
        await made.entered.wait()
        await asyncio.sleep(0.02)  # the time that is measured
        # two prompts: one waits less, the other loads longer; times of another machine cannot be before the request
        scheduled = time.monotonic()
        made.announcer.reused("cmpl-abc-1-3c4d", 9, scheduled + 0.01, 0.01)
        made.announcer.reused("cmpl-abc-0-1a2b", 9, scheduled, 0.015)
        await asyncio.sleep(0.05)
        made.go.set()
        headers, _ = await waiting
        total = (time.monotonic() - begin) * 1000
        parts = timing(headers)
        assert list(parts) == ["queue", "first-step", "load"]
        assert 19 < parts["queue"] <= (scheduled - begin) * 1000 + 0.01
        assert parts["load"] == 15
        assert parts["first-step"] >= 34
        assert 68 < sum(parts.values()) <= total + 0.02

    asyncio.run(scenario())


@pytest.mark.parametrize("shift", [-1e6, 1e6])
def test_times_that_cannot_be_are_bounded_by_the_request(name, shift):
    async def scenario():
        made = Engine(name, ids=())
        waiting = asyncio.ensure_future(answer(made, go=False))
        await made.entered.wait()
        made.announcer.reused("cmpl-abc-0-1a2b", 9, time.monotonic() + shift, 99)
        made.go.set()
        headers, _ = await waiting
        assert all(0 <= value < 10_000 for value in timing(headers).values())

    asyncio.run(scenario())


def test_a_stream_that_speaks_before_its_first_token_waits_for_it(name):
    async def scenario():
        made = Engine(name, streamed=True, early=True)
        waiting = asyncio.ensure_future(answer(made, go=False))
        for _ in range(20):
            await asyncio.sleep(0)
        made.announcer.reused("cmpl-abc-0-1a2b", 77, time.monotonic())
        await asyncio.sleep(0.05)
        made.go.set()
        headers, body = await waiting
        assert (headers["x-kv-reused-tokens"], body) == ("77", b"createdonetwo")

    asyncio.run(scenario())


@pytest.mark.parametrize("status", [400, 200])
def test_errors_and_silent_engines_are_passed_on(name, monkeypatch, status):
    monkeypatch.setenv("DISAGG_KV_WAIT_TIMEOUT", "0.05")

    async def scenario():
        headers, body = await answer(Engine(name, ids=(), status=status))
        assert "x-kv-reused-tokens" not in headers
        assert body == b"onetwo"

    asyncio.run(scenario())


def test_a_request_without_an_id_gets_one(name):
    async def scenario():
        headers, _ = await answer(Engine(name), headers=())
        assert headers["x-kv-reused-tokens"] == "100"

    asyncio.run(scenario())


def test_each_api_server_of_the_engine_tells_its_own_requests(name):
    async def scenario():
        servers = [TellReuse(Engine(name)) for _ in range(2)]
        for server in (*servers, *servers):
            server._app = engine = Engine(name)
            headers, _ = await answer(engine, middleware=server)
            assert headers["x-kv-reused-tokens"] == "100"

    asyncio.run(scenario())
