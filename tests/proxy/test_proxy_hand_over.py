"""KV that the decode server fetches from the prefill server (``--kv-hand-over params``): what each of both is told."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from proxy_harness import DEADLINE_S, Stack, dead_port, stack

from disagg_prefill_lmcache_v1.proxy import hand_over

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
ASKED = {"do_remote_decode": True, "do_remote_prefill": False}
PARAMS = {"do_remote_prefill": True, "remote_block_ids": [[1, 2]], "remote_host": "h", "remote_port": 1}
MOCK = f"params={json.dumps(PARAMS)}"


@pytest.fixture(scope="module")
def pair() -> Iterator[Stack]:
    """A stack whose prefill server holds KV."""
    with stack("--kv-hand-over", "params", prefill=MOCK) as made:
        yield made


def ask(made: Stack, path: str, body: dict[str, Any], mock: str = "") -> tuple[httpx.Response, list[dict], list[dict]]:
    """The answer, and the bodies that both servers got."""
    name = uuid.uuid4().hex
    response = httpx.post(
        made.url + path, json=body, headers={"x-request-id": name, "x-mock": mock}, timeout=DEADLINE_S
    )
    prefill, decode = ([json.loads(each) for each in made.bodies(state, name)] for state in (made.prefill, made.decode))
    return response, prefill, decode


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS, {"prompt": "x"}),
        (COMPLETIONS, {"prompt": [1, 2, 3], "n": 1, "best_of": None}),
        (COMPLETIONS, {"prompt": "x" * 100_000, "stream": True}),
        (COMPLETIONS, {"kv_transfer_params": None, "prompt": "x"}),
        (CHAT, {"messages": [{"role": "user", "content": "x"}], "stream": True}),
        ("/v1/messages", {"messages": [], "max_tokens": 5}),
        ("/v1/responses", {"input": "x"}),
    ],
)
def test_the_decoder_is_told_what_the_prefill_answer_says(pair: Stack, path: str, body: dict) -> None:
    response, prefill, decode = ask(pair, path, body)
    assert response.status_code == 200, response.text
    assert [each["kv_transfer_params"] for each in prefill] == [ASKED]
    assert decode == [{**body, "kv_transfer_params": PARAMS}]


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": ["x", "y"]}, {"prompt": [[1, 2], [3]]}, {"prompt": "x", "n": 2}, {"prompt": "x", "best_of": 3},
        {"prompt": "x", "use_beam_search": True}, {"prompt": "x", "prompt_logprobs": 1}, {"prompt": "x", "echo": True},
    ],
    ids=str,
)  # fmt: skip
def test_what_would_be_fetched_twice_is_computed_by_the_decoder(pair: Stack, body: dict) -> None:
    response, prefill, decode = ask(pair, COMPLETIONS, body)
    assert response.status_code == 200, response.text
    assert (prefill, decode) == ([], [body])
    metrics = httpx.get(pair.url + "/metrics", timeout=DEADLINE_S).text
    assert 'disagg_prefill_skipped_total{reason="several_choices"}' in metrics


@pytest.mark.parametrize("mock", ["prefill.params=null", "prefill.params=[1]", "prefill.status=500"])
def test_without_params_the_decoder_computes(pair: Stack, mock: str) -> None:
    response, _, decode = ask(pair, COMPLETIONS, {"prompt": "x"}, mock)
    assert response.status_code == 200, response.text
    assert decode == [{"prompt": "x"}]


def test_clients_may_not_steer(pair: Stack) -> None:
    response, prefill, decode = ask(pair, COMPLETIONS, {"prompt": "x", "kv_transfer_params": PARAMS})
    assert (response.status_code, prefill, decode) == (400, [], [])


def test_a_trusted_client_says_itself(pair: Stack) -> None:
    with stack("--kv-hand-over", "params", "--trusted-kv-transfer-params", prefill=MOCK) as made:
        body = {"prompt": "x", "kv_transfer_params": {"its": "own"}}
        _, prefill, decode = ask(made, COMPLETIONS, body)
        assert (prefill, decode) == ([], [body])


def test_other_ways_of_the_kv_are_left_as_they_are() -> None:
    with stack(prefill=MOCK) as made:
        response, prefill, decode = ask(made, COMPLETIONS, {"prompt": "x"})
        assert response.status_code == 200, response.text
        assert "kv_transfer_params" not in prefill[0]
        assert decode == [{"prompt": "x"}]


def test_a_decoder_that_took_nothing_gives_way_to_one_that_fetches() -> None:
    """And one that may have taken the request does not: KV can be fetched once."""
    with stack("--kv-hand-over", "params", prefill=MOCK) as made:
        urls = [f"--decoder=http://127.0.0.1:{port}" for port in (dead_port(), made.decode_port)]
        made.proxy.stop()
        made.proxy = type(made.proxy)("--prefiller-port", str(made.prefill_port), "--kv-hand-over", "params", *urls)
        made.url = made.proxy.url
        for _ in range(3):
            response, _, decode = ask(made, COMPLETIONS, {"prompt": "x"})
            assert response.status_code == 200, response.text
            assert decode == [{"prompt": "x", "kv_transfer_params": PARAMS}]
        response, _, decode = ask(made, COMPLETIONS, {"prompt": "x"}, "decode.cut=0")
        assert response.status_code in (502, 503), response.text
        assert len(decode) == 1


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        (b'{"prompt":"x"}', {"prompt": "x", "kv_transfer_params": {"a": 1}}),
        (b' \n{ "prompt" : "x" }', {"prompt": "x", "kv_transfer_params": {"a": 1}}),
        (b'{"prompt":"x","kv_transfer_params":null}', {"prompt": "x", "kv_transfer_params": {"a": 1}}),
        (b'{"prompt":"the \\"kv_transfer_params\\" field"}',
         {"prompt": 'the "kv_transfer_params" field', "kv_transfer_params": {"a": 1}}),
        (b"[1]", [1]),
    ],
)  # fmt: skip
def test_the_body_with_params(body: bytes, wanted: Any) -> None:
    assert json.loads(hand_over.with_params(body, b'{"a":1}')) == wanted


@pytest.mark.parametrize("body", [b"", b"[1]", b"{}", b'{"kv_transfer_params":"x"}', b'{"kv_transfer_params":null}'])
def test_answers_that_tell_nothing(body: bytes) -> None:
    assert hand_over.told(body) == b""
