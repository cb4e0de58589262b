"""Which way a request takes: by its length, by what was learned, and never otherwise with ``--route always``."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

import httpx
import pytest
from proxy_harness import DEADLINE_S, Stack, stack

from disagg_prefill_lmcache_v1.proxy.metrics import Metrics
from disagg_prefill_lmcache_v1.proxy.pool import DECODE, PREFILL, Pool
from disagg_prefill_lmcache_v1.proxy.prompt_meter import PromptMeter
from disagg_prefill_lmcache_v1.proxy.request import RequestContext
from disagg_prefill_lmcache_v1.proxy.route_chooser import RouteChooser
from disagg_prefill_lmcache_v1.proxy.routing import AUTO, NEVER, Gaps, Line, Load, Router
from disagg_prefill_lmcache_v1.proxy.settings import load_settings
from disagg_prefill_lmcache_v1.settings import SettingsError


def ask(made: Stack, tokens: int, stream: bool = True, mock: str = "", **fields) -> httpx.Response:
    body = {"prompt": list(range(tokens)), "stream": stream, **fields}
    headers = {"x-mock": mock} if mock else {}
    return httpx.post(f"{made.url}/v1/completions", json=body, headers=headers, timeout=DEADLINE_S)


def way(answer: httpx.Response) -> str:
    assert answer.status_code == 200
    return answer.headers.get("x-route", "")


# -- the rule


def test_a_line_is_fitted_and_forgets() -> None:
    line = Line()
    assert not line.known
    assert line.expect(1000) == 0
    for tokens in (100, 2000, 8000, 500):
        line.note(tokens, 0.05 + tokens * 1e-4)
    assert line.known
    assert line.expect(4000) == pytest.approx(0.45, rel=0.01)
    for tokens in (100, 2000, 8000, 500) * 40:
        line.note(tokens, 0.05 + tokens * 2e-4)
    assert line.expect(4000) == pytest.approx(0.85, rel=0.02)


def known(seconds_per_token: float) -> Load:
    load = Load()
    for tokens in (500, 1000, 4000):
        load.line.note(tokens, seconds_per_token * tokens)
    return load


def router(mode: str = AUTO, **more) -> Router:
    made = Router(mode, **more)
    for tokens in (500, 1000, 4000):
        made.handover.note(tokens, 0.01)
    return made


def test_nothing_is_chosen_before_anything_is_known() -> None:
    choice = Router(AUTO).choose(1000, 0, Load(), Load(), 0)
    assert (choice.direct, choice.reason) == (False, "learning")


def test_a_queue_of_prompts_sends_one_to_an_idle_decoder() -> None:
    prefiller, decoder = known(1e-4), known(1e-4)
    prefiller.tokens = 20_000
    choice = router().choose(1000, 0, prefiller, decoder, 0)
    assert (choice.direct, choice.reason) == (True, "quicker")
    assert choice.expected_s == pytest.approx(0.1, rel=0.1)
    decoder.tokens = 40_000
    assert router().choose(1000, 0, prefiller, decoder, 0).direct is False


def test_the_first_token_in_time_leaves_the_answers_alone() -> None:
    prefiller, decoder = known(1e-4), known(1e-4)
    prefiller.tokens = 2_000
    assert router(ttft_target_s=1.0).choose(1000, 0, prefiller, decoder, 4).reason == "in_time"
    assert router().choose(1000, 0, prefiller, decoder, 4).direct is True


def test_gaps_over_the_target_keep_prompts_off_the_decoder() -> None:
    prefiller, decoder = known(1e-4), known(1e-4)
    prefiller.tokens = 2_000
    made = router()
    made.gaps.note(10_000, 1)
    for _ in range(20):
        made.gaps.note_harm(1000, 4, 40)  # each such prompt has put 40 gaps over it
    made.gaps.note(1000, 200)
    choice = made.choose(1000, 0, prefiller, decoder, 4)
    assert (choice.direct, choice.reason) == (False, "itl")
    assert made.choose(1000, 0, prefiller, decoder, 0).direct is True  # nobody is there to be held up


def test_gaps_fade() -> None:
    gaps = Gaps()
    gaps.note(100, 100)
    for _ in range(10):
        gaps.note(20_000, 0)
    assert gaps.over < 0.2


def test_the_fixed_rules() -> None:
    assert Router(NEVER).choose(9, 0, Load(), Load(), 0).direct is True
    short, long = (Router("", 100).choose(tokens, 0, Load(), Load(), 0) for tokens in (99, 100))
    assert (short.direct, short.reason, long.direct, long.reason) == (True, "short", False, "long")


# -- the proxy


def test_always_chooses_nothing() -> None:
    with stack() as made:
        answer = ask(made, 5)
        assert "x-route" not in answer.headers
        assert answer.headers["x-kv-state"] == "stored"
        assert "route" not in made.proxy.access_line(answer.headers["x-request-id"])


@pytest.mark.parametrize("stream", [True, False])
def test_short_prompts_go_straight_to_the_decoder(stream: bool) -> None:
    with stack("--route", "100") as made:
        short, long = (ask(made, tokens, stream) for tokens in (99, 100))
        assert (way(short), way(long)) == ("direct; reason=short", "pair; reason=long")
        assert "x-kv-state" not in short.headers
        assert long.headers["x-kv-state"] == "stored"
        assert made.prefill.served == 1
        lines = [made.proxy.access_line(answer.headers["x-request-id"]) for answer in (short, long)]
        assert [(line["route"], line["route_reason"]) for line in lines] == [("direct", "short"), ("pair", "long")]
        assert "prefill" not in lines[0]
        metrics = httpx.get(f"{made.url}/metrics").text
        assert 'disagg_routes_total{reason="short",way="direct"} 1.0' in metrics
        assert "disagg_prefill_skipped_total{" not in metrics


def test_never_asks_no_prefill_server() -> None:
    with stack("--route", "never") as made:
        assert {way(ask(made, tokens)) for tokens in (1, 5000)} == {"direct; reason=never"}
        assert made.prefill.served == 0


def test_text_is_measured_by_what_answers_have_told() -> None:
    """The mock counts a token for each character: what counted as short soon counts as long."""
    with stack("--route", "100") as made:
        body = {"prompt": "word " * 40, "stream": True, "stream_options": {"include_usage": True}}
        ways = []
        while len(ways) < 60 and not (ways and ways[-1].startswith("pair")):
            ways.append(way(httpx.post(f"{made.url}/v1/completions", json=body, timeout=DEADLINE_S)))
        assert (ways[0], ways[-1]) == ("direct; reason=short", "pair; reason=long")


def test_auto_learns_how_long_prefill_takes() -> None:
    with stack("--route", "auto") as made:
        assert way(ask(made, 50)) == "pair; reason=learning"
        slow = "prefill.delay=0.5"
        ways = [way(ask(made, 50, mock=slow)) for _ in range(12)]
        assert ways[-1] == "direct; reason=quicker"
        line = made.proxy.access_line(ask(made, 50).headers["x-request-id"])
        assert line["expected_ttft_ms"] >= 0
    with stack("--route", "auto", "--ttft-target-ms", "20000") as made:
        ways = [way(ask(made, 50, mock="prefill.delay=0.05")) for _ in range(6)]
        assert (ways[0], ways[-1]) == ("pair; reason=learning", "pair; reason=in_time")


def test_a_direct_request_that_fails_leaves_no_work_behind() -> None:
    """Else its server would count as busy for ever, and nothing would go there any more."""
    with stack("--route", "auto", "--suspect-request-s", "0") as made:
        for _ in range(12):
            ask(made, 50, mock="prefill.delay=0.3")
        assert way(ask(made, 50)).startswith("direct")
        for mock in ("decode.status=500", "decode.cut=0"):
            for _ in range(5):
                ask(made, 100_000, mock=mock)
        assert way(ask(made, 50)).startswith("direct")


async def with_two_servers_of_each_role(use: Callable[[RouteChooser, Pool, Pool], None]) -> None:
    settings, metrics = load_settings(["--route", "auto"], {}), Metrics()
    urls = ["http://127.0.0.1:1", "http://127.0.0.1:2"]
    prefillers, decoders = Pool(PREFILL, urls, settings, metrics), Pool(DECODE, urls, settings, metrics)
    use(RouteChooser(settings, prefillers, decoders, metrics), prefillers, decoders)


def test_a_server_that_is_down_does_not_count_as_idle() -> None:
    def use(chooser: RouteChooser, prefillers: Pool, decoders: Pool) -> None:
        for tokens in (500, 1000, 4000):
            chooser._router.handover.note(tokens, 0.01)
            for upstream in (*prefillers.upstreams, *decoders.upstreams):
                upstream.load.line.note(tokens, 1e-4 * tokens)
        fields = {"prompt": json.dumps([7] * 1000).encode()}

        def choose(busy: Pool, other: Pool) -> RequestContext:
            """The first server of ``busy`` is down; the second has much to do, those of ``other`` have less."""
            busy.upstreams[0].up = False
            busy.upstreams[1].in_flight, busy.upstreams[1].load.tokens = 9, 50_000
            for upstream in other.upstreams:
                upstream.load.tokens = 10_000
            request = RequestContext("POST", "/v1/completions", b"/v1/completions", "/v1/completions", "id", b"")
            request.prompt = PromptMeter(True, prefillers, decoders).measure(fields)
            chooser.choose(request)
            for upstream in (*busy.upstreams, *other.upstreams):
                upstream.up, upstream.in_flight, upstream.load.tokens = True, 0, 0
            return request

        assert choose(prefillers, decoders).way == "direct"
        assert choose(decoders, prefillers).way == "pair"

    asyncio.run(with_two_servers_of_each_role(use))


@pytest.mark.parametrize(
    ("text", "tokens"), [("[1,2,3]", 3), ("[ 1, 2, 3 ]", 3), ("[\n  1,\n  2\n]", 2), ("[[1,2,3],[4,5]]", 5)]
)
def test_token_ids_are_counted_however_they_are_set(text: str, tokens: int) -> None:
    def use(_: RouteChooser, *pools: Pool) -> None:
        meter = PromptMeter(True, *pools)
        prompt = meter.measure({"prompt": text.encode()})
        assert (prompt.text_bytes, prompt.tokens) == (0, tokens)
        assert meter.measure({"prompt": b'["a text", "another"]'}).text_bytes == 21

    asyncio.run(with_two_servers_of_each_role(use))


@pytest.mark.parametrize("value", ["sometimes", "0", "-1", "1.5"])
def test_other_routes_are_refused(value: str) -> None:
    with pytest.raises(SettingsError, match=r"--route .*always, never, auto or a number of tokens"):
        load_settings(["--route", value], {})
