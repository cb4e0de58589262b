"""Which server a request goes to: load, health, back-off and prompts with a common beginning. No network."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import proxy_harness  # noqa: F401 (makes the package importable)
import pytest

from disagg_prefill_lmcache_v1.proxy.affinity import BEGINNING, Prompt
from disagg_prefill_lmcache_v1.proxy.health import BACK_OFF_S, CIRCUIT_FAILURES, Upstream
from disagg_prefill_lmcache_v1.proxy.metrics import Metrics
from disagg_prefill_lmcache_v1.proxy.pool import DECODE, PREFILL, Pool
from disagg_prefill_lmcache_v1.proxy.settings import Settings, load_settings, parse_url
from disagg_prefill_lmcache_v1.proxy.upstream import Response, UpstreamError

REFUSED = UpstreamError("refused", "connection refused", taken=False)
URLS = [f"http://127.0.0.1:{port}" for port in (1001, 1002, 1003)]


def with_pool(use: Callable[[Pool], Any]) -> None:
    async def run() -> None:
        pool = Pool(PREFILL, URLS, Settings(), Metrics())
        use(pool)
        pool.close()

    asyncio.run(run())


def loaded(pool: Pool, *in_flight: int) -> list[Upstream]:
    for upstream, count in zip(pool.upstreams, in_flight, strict=True):
        upstream.in_flight = count
    return pool.upstreams


def test_the_least_loaded_server_is_chosen_and_equals_take_turns() -> None:
    def use(pool: Pool) -> None:
        servers = loaded(pool, 3, 1, 2)
        assert {pool.choose() for _ in range(5)} == {servers[1]}
        assert pool.choose(excluded=[servers[1]]) is servers[2]
        loaded(pool, 1, 1, 1)
        assert len({pool.choose() for _ in range(3)}) == 3
        assert pool.choose(excluded=servers) is None

    with_pool(use)


def text(value: bytes, tokens: int = 0) -> Prompt:
    return Prompt(value[:BEGINNING], len(value), tokens or len(value) // 4)


def test_tokens_to_compute_count_not_requests() -> None:
    def use(pool: Pool) -> None:
        first, second, third = loaded(pool, 1, 9, 9)
        first.load.tokens, second.load.tokens, third.load.tokens = 20_000, 4_000, 8_000
        assert pool.choose() is second
        assert pool.choose(text(b"a new prompt")) is second

    with_pool(use)


def test_a_known_beginning_weighs_as_many_tokens_as_it_has() -> None:
    def use(pool: Pool) -> None:
        prompt = b"system prompt " * 1000
        home = pool.choose(text(prompt))
        again = text(prompt + b"and a question")
        for waiting, at_home in ((3_000, True), (3_800, False)):  # of 3,500 tokens the beginning has about 3,450
            home.load.tokens = waiting
            assert (pool.likely(again)[0] is home) == at_home
        home.load.tokens = 0
        assert pool.choose(again) is home
        assert 3_200 < again.known < 3_500
        new = text(b"another " * 1000)
        pool.choose(new)
        assert new.known == 0
        assert len({pool.choose(text(b"%d" % number + prompt)) for number in range(50)}) == 3

    with_pool(use)


def test_the_next_turn_of_a_long_conversation_is_known() -> None:
    """What is looked at ends at 128 KiB, at lengths an eighth apart at most: little of what is known goes unseen."""

    def use(pool: Pool) -> None:
        for turns in (1, 4, 40, 400):
            spoken = b"[" + b'{"role": "user", "content": "%d"},' % turns * turns * 20
            home = pool.choose(text(spoken + b"]"))
            turn = text(spoken + b'{"role": "user", "content": "next"}]')
            for other in pool.upstreams:
                other.load.tokens = 400 if other is home else 0
            chosen, known = pool.likely(turn)
            assert known == 0 or chosen is home
            assert turns == 1 or known >= min(0.85 * turn.tokens - 128, 0.24 * BEGINNING)

    with_pool(use)


def test_affinity_can_be_switched_off() -> None:
    async def run() -> None:
        pool = Pool(PREFILL, URLS, load_settings(["--prefix-affinity", "off"], {}), Metrics())
        prompts = [text(b"the same " * 1000) for _ in range(3)]
        assert len({pool.choose(prompt) for prompt in prompts}) == 3
        assert [prompt.known for prompt in prompts] == [0, 0, 0]
        pool.close()

    asyncio.run(run())


def test_decode_servers_take_turns_with_prompts_that_none_knows() -> None:
    async def run() -> None:
        pool = Pool(DECODE, URLS, Settings(), Metrics())
        prompts = [text(b"%d" % number * 2000) for number in range(3)]
        homes = [pool.choose(prompt) for prompt in prompts]
        assert set(homes) == set(pool.upstreams)
        assert [pool.choose(prompt) for prompt in prompts] == homes
        homes[0].held = 100_000
        assert pool.choose(prompts[0]) is not homes[0]
        assert {pool.choose() for _ in range(4)} == set(homes[1:])
        pool.close()

    asyncio.run(run())


def test_the_table_of_beginnings_is_bounded_and_forgets_servers_that_left() -> None:
    def use(pool: Pool) -> None:
        table = pool._prefixes
        for number in range(70_000):
            table.note(text(b"%d" % number), pool.upstreams[0])
        assert len(table._servers) == 65_536
        pool.set_members(URLS[:2])
        assert not table._servers

    with_pool(use)


def test_a_failing_server_is_left_alone_for_longer_and_longer() -> None:
    def use(pool: Pool) -> None:
        now = 1000.0
        bad, *others = loaded(pool, 0, 5, 5)
        for upstream in (pool, *pool.upstreams):
            upstream._time = lambda: now
        for _ in range(CIRCUIT_FAILURES - 1):
            bad._failed("/health answers 500", refused=False, sick=True)
            assert pool.choose() is bad
        waits = []
        for _ in range(len(BACK_OFF_S)):
            bad._failed("/health answers 500", refused=False, sick=True)
            assert not bad.up
            assert pool.choose() in others
            waits.append(bad.open_until - now)
        assert waits == sorted(waits)
        assert waits[-1] == BACK_OFF_S[-1]
        bad.note_answer()  # to a request: its health checks fail all the same
        assert pool.choose() in others
        bad._passed("it is healthy")
        assert pool.choose() is bad
        for _ in range(CIRCUIT_FAILURES):
            bad._failed("no answer to /health within 5 s", refused=False, sick=False)
        assert pool.choose() in others
        bad.note_answer()  # it is busy, not dead
        assert pool.choose() is bad
        bad.note_error(REFUSED)  # no doubt here: once is enough
        assert pool.choose() in others
        bad.note_answer()
        assert pool.choose() is bad
        for server in pool.upstreams:
            server.note_error(REFUSED)
        assert pool.choose() is not None  # rather a server that may be down than none

    with_pool(use)


@pytest.mark.parametrize("kind", ["lost", "timeout", "protocol", "exhausted", "client_stalled"])
def test_what_happens_to_a_request_is_not_the_servers_health(kind: str) -> None:
    def use(pool: Pool) -> None:
        server, *_ = loaded(pool, 0, 5, 5)
        for _ in range(10 * CIRCUIT_FAILURES):
            server.note_error(UpstreamError(kind, "connection refused by nobody"))
        assert server.up
        assert pool.choose() is server
        assert server.suspect == (kind in ("lost", "timeout", "protocol"))  # it is checked soon

    with_pool(use)


def test_new_members_keep_what_is_known_of_the_old_ones() -> None:
    def use(pool: Pool) -> None:
        first, second, _ = loaded(pool, 2, 0, 0)
        pool.set_members([URLS[0], URLS[0] + "/", "http://127.0.0.1:1004"])
        assert [upstream.name for upstream in pool.upstreams] == [URLS[0], "http://127.0.0.1:1004"]
        assert pool.upstreams[0] is first
        assert second.client.closed
        assert not first.client.closed

    with_pool(use)


def test_a_server_that_is_gone_takes_its_trouble_with_the_store_along() -> None:
    def use(pool: Pool) -> None:
        first, second, _ = pool.upstreams
        for server, gauge in ((first, 1.0), (second, 1.0)):
            first.kv_degraded = server is first
            second.kv_degraded = server is second
            pool._publish()
            assert b"disagg_kv_degraded %.1f\n" % gauge in pool._metrics.render()
        pool.set_members([URLS[0]])
        pool._publish()
        text = pool._metrics.render()
        assert b"disagg_kv_degraded 0.0\n" in text
        assert text.count(b"disagg_upstream_up{") == 1

    with_pool(use)


# -- health checks


class Answers:
    """Stands for a server's client: each request gets the next of these answers."""

    address = parse_url(URLS[0], "test")

    def __init__(self, *answers: int | Exception) -> None:
        self.answers = list(answers)
        self.aborted = 0
        self.requests: list[bytes] = []

    def abort(self) -> None:
        self.aborted += 1

    async def request(self, request: bytes, *, fresh: bool) -> Response:
        assert fresh
        self.requests.append(request)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        if answer == 0:
            await asyncio.Event().wait()
        response = Response(self)  # type: ignore[arg-type]
        response.status = answer
        response.complete = answer != 200
        return response


def checked(*answers: int | Exception) -> tuple[Upstream, Answers]:
    async def run() -> tuple[Upstream, Answers]:
        client = Answers(*answers)
        upstream = Upstream("decode", client)  # type: ignore[arg-type]
        for _ in answers:
            upstream.suspect = True
            await upstream.check(0.01)
            assert not upstream.suspect
        return upstream, client

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("answers", "up", "healthy"),
    [
        ([200], True, True),
        ([503], True, False),
        ([200, 503, 503], True, True),
        ([200, 503, 503, 503], False, False),
        ([200, 0, 0, 0], False, False),
        (
            [200, UpstreamError("lost", "x"), UpstreamError("unreachable", "x"), UpstreamError("protocol", "x")],
            False,
            False,
        ),
        ([200, REFUSED], False, False),
        ([503, 503, 503, 200], True, True),
        ([200, *[UpstreamError("exhausted", "x", taken=False)] * 5], True, True),
    ],
)
def test_checks(answers: list[int | Exception], up: bool, healthy: bool) -> None:
    upstream, client = checked(*answers)
    assert (upstream.up, upstream.healthy, upstream.checked) == (up, healthy, True)
    assert set(client.requests) == {b"GET /health HTTP/1.1\r\nhost: 127.0.0.1:1001\r\nconnection: close\r\n\r\n"}
    assert client.aborted == answers.count(200)  # their bodies are not waited for
    was_sick = 503 in answers[-1:]
    upstream.note_answer()
    assert upstream.up == (up or not was_sick)


def test_a_shortage_of_the_proxys_own_is_no_check() -> None:
    upstream, _ = checked(UpstreamError("exhausted", "x", taken=False))
    assert not upstream.checked
