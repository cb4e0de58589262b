"""Shaping of request bodies: one row per generation parameter. Pure functions, no server."""

from __future__ import annotations

import json

import proxy_harness  # noqa: F401  (makes the package importable)
import pytest

from disagg_prefill_lmcache_v1.proxy import bodies as proxy_bodies

COMPLETIONS, CHAT, RESPONSES, MESSAGES = "/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
IMAGE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]}]
ALWAYS = {"max_tokens": 1, "stream": False}
RESPONSE_ALWAYS = {"max_output_tokens": 1, "stream": False}


def shaped(path: str, fields: dict) -> bytes:
    return b"".join(proxy_bodies.prefill_body(path, fields))


def shape(path: str, body: dict) -> dict:
    return json.loads(shaped(path, proxy_bodies.parse_fields(json.dumps(body).encode())))


# (route, fields of the client, the same fields as the prefill server must get them)
ROWS = [
    (COMPLETIONS, {"max_tokens": 100}, {}),
    (COMPLETIONS, {"max_tokens": None}, {}),
    (COMPLETIONS, {}, {}),
    (CHAT, {"max_completion_tokens": 100}, {"max_completion_tokens": 1}),
    (CHAT, {"max_completion_tokens": 9, "max_tokens": 7}, {"max_completion_tokens": 1}),
    (COMPLETIONS, {"min_tokens": 50}, {}),
    (COMPLETIONS, {"stream": True}, {}),
    (COMPLETIONS, {"stream": True, "stream_options": {"include_usage": True}}, {}),
    (COMPLETIONS, {"n": 4}, {"n": 1}),
    (COMPLETIONS, {"best_of": 4}, {}),
    (COMPLETIONS, {"use_beam_search": True, "n": 2, "length_penalty": 2.0}, {"n": 1, "length_penalty": 2.0}),
    (COMPLETIONS, {"logprobs": 5, "prompt_logprobs": 3, "logprob_token_ids": [1]}, {}),
    (CHAT, {"logprobs": True, "top_logprobs": 5}, {}),
    (COMPLETIONS, {"echo": True, "max_tokens": 0}, {}),
    (COMPLETIONS, {"stop": ["a", "b"], "stop_token_ids": [1, 2]}, {}),
    (COMPLETIONS, {"suffix": "after"}, {"suffix": "after"}),
    (CHAT, {"tools": TOOLS, "tool_choice": "auto"}, {"tools": TOOLS, "tool_choice": "auto"}),
    (CHAT, {"tools": TOOLS, "tool_choice": "required"}, {"tools": TOOLS, "tool_choice": "required"}),
    (CHAT, {"tools": TOOLS, "tool_choice": "none"}, {"tools": TOOLS, "tool_choice": "none"}),
    (CHAT, {"response_format": {"type": "json_object"}}, {"response_format": {"type": "json_object"}}),
    (COMPLETIONS, {"response_format": {"type": "json_object"}}, {}),
    (CHAT, {"structured_outputs": {"regex": "a+"}}, {}),
    (COMPLETIONS, {"prompt": "text"}, {"prompt": "text"}),
    (COMPLETIONS, {"prompt": ["a", "b"]}, {"prompt": ["a", "b"]}),
    (COMPLETIONS, {"prompt": [1, 2, 3]}, {"prompt": [1, 2, 3]}),
    (COMPLETIONS, {"prompt": [[1, 2], [3]]}, {"prompt": [[1, 2], [3]]}),
    (COMPLETIONS, {"prompt_embeds": "AAAA"}, {"prompt_embeds": "AAAA"}),
    (COMPLETIONS, {"seed": 7, "ignore_eos": True}, {"ignore_eos": True}),
    (COMPLETIONS, {"temperature": 0.5, "top_p": 0.9, "top_k": 3}, {"temperature": 0.5, "top_p": 0.9, "top_k": 3}),
    (COMPLETIONS, {"truncate_prompt_tokens": 5, "cache_salt": "s"}, {"truncate_prompt_tokens": 5, "cache_salt": "s"}),
    (CHAT, {"messages": IMAGE}, {"messages": IMAGE}),
    (CHAT, {"chat_template": "{{ x }}", "add_generation_prompt": False}, {"chat_template": "{{ x }}",
                                                                          "add_generation_prompt": False}),
    (CHAT, {"some_future_field": {"a": [1]}}, {"some_future_field": {"a": [1]}}),
    (RESPONSES, {"input": "hi", "max_output_tokens": 50, "store": True}, {"input": "hi", "store": False}),
    (RESPONSES, {"input": "hi", "background": True}, {"input": "hi", "background": False}),
    (RESPONSES, {"input": "hi", "previous_response_id": None}, {"input": "hi", "previous_response_id": None}),
    (MESSAGES, {"system": "s", "max_tokens": 9, "stop_sequences": ["x"]}, {"system": "s"}),
]  # fmt: skip


@pytest.mark.parametrize(("path", "client", "wanted"), ROWS, ids=lambda value: str(value)[:50])
def test_prefill_body(path: str, client: dict, wanted: dict) -> None:
    always = RESPONSE_ALWAYS if path == RESPONSES else ALWAYS
    assert shape(path, {"model": "m", **client}) == {"model": "m", **wanted, **always}


def test_raw_text_is_not_encoded_again() -> None:
    body = b'{"prompt": "\\u00e9 \\/ \xc3\xa9", "temperature": 1.0e-05, "big": 123456789012345678901234567890}'
    out = shaped(COMPLETIONS, proxy_bodies.parse_fields(body))
    for piece in (b'"\\u00e9 \\/ \xc3\xa9"', b"1.0e-05", b"123456789012345678901234567890"):
        assert piece in out


@pytest.mark.parametrize(
    "body", [b"", b"{", b'{"a":}', b'{"a":1}x', b"\xff\xfe", b'{"a":1,}', b"{'a':1}", b"[" * 99999]
)
def test_bad_json(body: bytes) -> None:
    with pytest.raises(proxy_bodies.BadJSON):
        proxy_bodies.parse_fields(body)


@pytest.mark.parametrize("body", [b"[]", b'"x"', b"1", b"null", b"true", b"NaN"])
def test_json_that_is_no_object(body: bytes) -> None:
    assert proxy_bodies.parse_fields(body) is None


def test_what_only_python_takes_for_json() -> None:
    for body in (b'{"temperature": NaN, "prompt": "x"}', '{"prompt": "x"}'.encode("utf-16")):
        out = shaped(COMPLETIONS, proxy_bodies.parse_fields(body))
        assert json.loads(out)["prompt"] == "x"


def test_the_last_of_two_equal_keys_counts() -> None:
    fields = proxy_bodies.parse_fields(b'{"prompt":"a","prompt":"b","max_tokens":5,"max_tokens":6}')
    assert json.loads(shaped(COMPLETIONS, fields)) == {"prompt": "b", **ALWAYS}


def test_stored_response_is_for_the_decoder_alone() -> None:
    fields = proxy_bodies.parse_fields(b'{"input":"x","previous_response_id":"resp_1"}')
    assert proxy_bodies.prefill_body(RESPONSES, fields) is None


@pytest.mark.parametrize(
    ("choice", "wanted"),
    [(None, False), ("none", False), ("auto", False), ("required", True), ({"type": "function"}, True)],
)
def test_refusal_of_a_forced_tool_call_is_not_trusted(choice: object, wanted: bool) -> None:
    fields = proxy_bodies.parse_fields(json.dumps({"tool_choice": choice}).encode())
    assert proxy_bodies.refusal_may_be_wrong(fields) is wanted


LONG = "words and more words. " * 2000


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": LONG, "model": "m", "stream": True, "temperature": -0.5e-3, "n": None},
        {"model": "m", "prompt": LONG + 'a "quoted" part\\'},
        {"prompt": LONG + '\\"' * 500},
        {"prompt": list(range(20_000)), "max_tokens": 5},
        {"prompt": [[1, 2], [3]], "suffix": LONG},
        {"prompt": [LONG, "x"]},
        {"messages": [{"role": "user", "content": LONG}], "stop": ["}"]},
        {"prompt": "é" * 20_000, "stop": [], 'weird key \\ "': 1},
    ],
    ids=lambda value: str(list(value)),
)
@pytest.mark.parametrize("indent", [None, 1])
def test_long_bodies(body: dict, indent: int | None) -> None:
    encoded = json.dumps(body, indent=indent).encode()
    fields = proxy_bodies.parse_fields(encoded)
    assert {name: json.loads(bytes(value)) for name, value in fields.items()} == body
    path = CHAT if "messages" in body else COMPLETIONS
    out = json.loads(shaped(path, fields))
    dropped = {"stream": False, "max_tokens": 1}
    assert {**body, **dropped} == {**out, **{k: v for k, v in body.items() if k in ("stop", "n")}}


@pytest.mark.parametrize("end", ["", "}", '"', '"}}', '"}x', '",}', '" "a":1}', '","a"}', '","a":}', '","a":1x}'])
def test_bad_long_json(end: str) -> None:
    with pytest.raises(proxy_bodies.BadJSON):
        proxy_bodies.parse_fields(b'{"prompt":"' + LONG.encode() + end.encode())
