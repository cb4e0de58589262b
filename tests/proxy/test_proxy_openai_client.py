"""The official openai client through the proxy and straight at the decode server: equal results.

Without more it runs on mock servers, which shows only that the client and the proxy get along. With the variables
DISAGG_TEST_PROXY_URL and DISAGG_TEST_DECODER_URL (for example of a stack started with --serve) it runs on real vLLM.
Ids, times and the number of cached tokens may differ; everything else must be the same.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest
from proxy_harness import DEADLINE_S, stack

LONG = "The prefill server fills the KV cache and the decode server reads it. " * 20
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
IMAGE = "data:image/png;base64,iVBORw0KGgo="
USER = [{"role": "user", "content": LONG}]
_DIFFERENT = {"id", "created", "created_at", "completed_at", "prompt_tokens_details", "input_tokens_details",
              "cache_read_input_tokens", "cache_creation_input_tokens", "request_id", "item_id", "system_fingerprint",
              "kv_transfer_params", "stage"}  # fmt: skip
_ARGUMENTS = {"max_tokens": 8, "temperature": 0.0}


def completion(**fields: Any) -> Callable[[openai.OpenAI, str], Any]:
    """A call of the completions API; fields the client does not know go into the extra body."""
    fields = {"prompt": LONG, **_ARGUMENTS, **fields}
    return lambda client, model: client.completions.create(**{"model": model, **fields})


def chat(**fields: Any) -> Callable[[openai.OpenAI, str], Any]:
    """A call of the chat API."""
    fields = {"messages": USER, **_ARGUMENTS, **fields}
    return lambda client, model: client.chat.completions.create(**{"model": model, **fields})


def responses(**fields: Any) -> Callable[[openai.OpenAI, str], Any]:
    """A call of the responses API."""
    fields = {"input": LONG, "max_output_tokens": 8, "temperature": 0.0, **fields}
    return lambda client, model: client.responses.create(**{"model": model, **fields})


def plain(method: str, path: str, body: Any = None, raw: bytes | None = None) -> Callable[[openai.OpenAI, str], Any]:
    """A call without the client's help."""

    def call(client: openai.OpenAI, model: str) -> Any:
        base = str(client.base_url).removesuffix("/v1/")
        content = raw
        if body is not None:
            content = json.dumps({"model": model, **body}).encode()
        headers = {"content-type": "application/json"} if content is not None else {}
        response = httpx.request(method, base + path, content=content, headers=headers, timeout=DEADLINE_S)
        try:
            value = response.json()
        except ValueError:
            value = response.text
        return {"status": response.status_code, "body": value if response.is_success else None}

    return call


CALLS: dict[str, Callable[[openai.OpenAI, str], Any]] = {
    "models": lambda client, model: client.models.list(),
    "model": lambda client, model: client.models.retrieve(model),
    "completion": completion(),
    "short prompt": completion(prompt="a"),
    "empty prompt": completion(prompt=""),
    "list of prompts": completion(prompt=[LONG, "another", "and one more"]),
    "token ids": completion(prompt=[5, 6, 7, 8, 9] * 30),
    "lists of token ids": completion(prompt=[[5, 6, 7], [8, 9, 10, 11]]),
    "bad token ids": completion(prompt=[10**9]),
    "completion stream": completion(stream=True),
    "completion stream with usage": completion(stream=True, stream_options={"include_usage": True}),
    "continuous usage": completion(
        stream=True, stream_options={"include_usage": True}, extra_body={"stream_options": {
            "include_usage": True, "continuous_usage_stats": True}}),
    "stream of two prompts": completion(prompt=["one two", "three four"], stream=True),
    "max_tokens 1": completion(max_tokens=1),
    "max_tokens 0": completion(max_tokens=0),
    "max_tokens negative": completion(max_tokens=-3),
    "max_tokens too many": completion(max_tokens=10**7),
    "no max_tokens": completion(max_tokens=None),
    "min_tokens": completion(extra_body={"min_tokens": 6}),
    "min over max tokens": completion(extra_body={"min_tokens": 60}),
    "logprobs": completion(logprobs=3),
    "logprobs stream": completion(logprobs=2, stream=True),
    "prompt_logprobs": completion(extra_body={"prompt_logprobs": 1}),
    "echo": completion(prompt="say it again", echo=True),
    "echo with logprobs": completion(prompt="say it again", echo=True, logprobs=1),
    "echo without tokens": completion(prompt="say it again", echo=True, max_tokens=0),
    "stop": completion(stop=["e", "t"]),
    "stop included": completion(stop=["e"], extra_body={"include_stop_str_in_output": True}),
    "stop token ids": completion(extra_body={"stop_token_ids": list(range(0, 1000, 2))}),
    "n": completion(n=2, temperature=0.8, seed=3),
    "n greedy": completion(n=2),
    "seed": completion(temperature=0.9, seed=7),
    "bad seed": completion(seed=2**70),
    "best_of": completion(best_of=2),
    "beam search": completion(n=2, extra_body={"use_beam_search": True}),
    "ignore_eos": completion(extra_body={"ignore_eos": True}),
    "penalties": completion(presence_penalty=0.5, frequency_penalty=0.5, logit_bias={"5": 10}),
    "top_k": completion(temperature=0.7, seed=5, extra_body={"top_k": 3, "min_p": 0.01}),
    "suffix": completion(suffix="end"),
    "truncation": completion(extra_body={"truncate_prompt_tokens": 20}),
    "truncation to the model": completion(extra_body={"truncate_prompt_tokens": -1}),
    "regex": completion(extra_body={"structured_outputs": {"regex": "[ab]{4}"}}),
    "choice": completion(extra_body={"structured_outputs": {"choice": ["yes", "no"]}}),
    "json schema in completions": completion(
        max_tokens=20, extra_body={"response_format": {"type": "json_schema", "json_schema": {"name": "a",
                                                                                              "schema": SCHEMA}}}),
    "return_token_ids": completion(extra_body={"return_token_ids": True}),
    "bad prompt_embeds": completion(prompt=None, extra_body={"prompt_embeds": "AAAA"}),
    "prompt too long": completion(prompt="word " * 40_000),
    "unknown model": lambda client, model: client.completions.create(model="nobody", prompt="x"),
    "bad temperature": completion(temperature=-1.0),
    "bad type": completion(extra_body={"top_p": "high"}),
    "unknown field": completion(extra_body={"no_such_field": 1}),
    "cache_salt": completion(extra_body={"cache_salt": "s"}),
    "priority": completion(extra_body={"priority": 3}),
    "chat": chat(),
    "chat of turns": chat(messages=[{"role": "system", "content": "Be brief."}, *USER,
                                    {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Go on."}]),
    "chat of parts": chat(messages=[{"role": "user", "content": [{"type": "text", "text": LONG}]}]),
    "chat stream": chat(stream=True),
    "chat stream with usage": chat(stream=True, stream_options={"include_usage": True}),
    "stream options without stream": chat(stream_options={"include_usage": True}),
    "max_completion_tokens": chat(max_tokens=None, max_completion_tokens=5),
    "both limits": chat(max_tokens=9, max_completion_tokens=5),
    "chat logprobs": chat(logprobs=True, top_logprobs=2),
    "top_logprobs alone": chat(top_logprobs=2),
    "chat n": chat(n=2, temperature=0.8, seed=3),
    "json object": chat(response_format={"type": "json_object"}, max_tokens=16),
    "json schema": chat(response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}},
                        max_tokens=20),
    "tools": chat(tools=[TOOL]),
    "tools, none": chat(tools=[TOOL], tool_choice="none"),
    "tools, required": chat(tools=[TOOL], tool_choice="required", max_tokens=40),
    "tools, named": chat(tools=[TOOL], tool_choice={"type": "function", "function": {"name": "weather"}},
                         max_tokens=40),
    "tools, named wrongly": chat(tools=[TOOL], tool_choice={"type": "function", "function": {"name": "x"}}),
    "tool_choice without tools": chat(tool_choice="required"),
    "tool answer": chat(messages=[*USER, {"role": "assistant", "content": None, "tool_calls": [
        {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{\"city\": \"Oslo\"}"}}]},
        {"role": "tool", "tool_call_id": "c1", "content": "cold"}]),
    "image": chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": IMAGE}}]}]),
    "continue the message": chat(
        messages=[*USER, {"role": "assistant", "content": "The answer"}],
        extra_body={"continue_final_message": True, "add_generation_prompt": False}),
    "chat template": chat(extra_body={"chat_template": "{{ messages[0]['content'] }}"}),
    "empty chat": chat(messages=[]),
    "bad role": chat(messages=[{"role": "nobody", "content": "x"}]),
    "responses": responses(),
    "responses stream": responses(stream=True),
    "responses of messages": responses(input=[{"role": "user", "content": LONG}], instructions="Be brief."),
    "responses stored": responses(store=True),
    "responses, unknown earlier": responses(previous_response_id="resp_0"),
    "embeddings": lambda client, model: client.embeddings.create(model=model, input="x"),
    "messages": plain("POST", "/v1/messages", {"max_tokens": 8, "messages": USER, "temperature": 0.0}),
    "count tokens": plain("POST", "/v1/messages/count_tokens", {"messages": USER}),
    "tokenize": plain("POST", "/tokenize", {"prompt": LONG}),
    "detokenize": plain("POST", "/detokenize", {"tokens": [5, 6, 7]}),
    "version": plain("GET", "/version"),
    "no such route": plain("GET", "/v1/nothing"),
    "wrong method": plain("GET", "/v1/completions"),
    "bad json": plain("POST", "/v1/completions", raw=b"{"),
    "json list": plain("POST", "/v1/completions", raw=b"[]"),
    "not a number": plain("POST", "/v1/completions", raw=b'{"prompt": "x", "temperature": NaN}'),
}  # fmt: skip


@pytest.fixture(scope="module")
def urls() -> Iterator[tuple[str, str]]:
    """URLs of the proxy and of the decode server."""
    proxy, decoder = os.environ.get("DISAGG_TEST_PROXY_URL"), os.environ.get("DISAGG_TEST_DECODER_URL")
    if proxy and decoder:
        yield proxy, decoder
        return
    with stack() as made:
        yield made.url, f"http://127.0.0.1:{made.decode_port}"


@pytest.mark.parametrize("name", CALLS)
def test_equal_results(urls: tuple[str, str], name: str) -> None:
    if "DISAGG_TEST_PROXY_URL" not in os.environ and name in ("bad json", "embeddings"):
        pytest.skip("the mock server answers anything")
    through, direct = (outcome(url, CALLS[name]) for url in urls)
    assert same(through, direct), f"\nthrough the proxy: {through}\nstraight:          {direct}"


def outcome(url: str, call: Callable[[openai.OpenAI, str], Any]) -> Any:
    """Result of a call in a form that can be compared; errors by their status."""
    with openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0, timeout=DEADLINE_S) as client:
        model = client.models.list().data[0].id
        try:
            result = call(client, model)
            if isinstance(result, openai.Stream):
                return merged([cleaned(json.loads(part.to_json())) for part in result])
        except openai.APIStatusError as error:
            return {"error": error.status_code}
    return cleaned(result if isinstance(result, dict) else json.loads(result.to_json()))


def cleaned(value: Any) -> Any:
    """The value without what may differ from one request to the next."""
    if isinstance(value, dict):
        return {key: cleaned(item) for key, item in value.items() if key not in _DIFFERENT}
    return [cleaned(item) for item in value] if isinstance(value, list) else value


def merged(parts: list[Any]) -> Any:
    """Parts of a stream by choice, with texts joined: how many tokens share a part is not fixed."""
    texts: dict[Any, str] = {}
    others = []
    for part in parts:
        for choice in part.get("choices") or []:
            delta = choice.get("delta") or choice
            key = choice["index"]
            texts[key] = texts.get(key, "") + (delta.get("text") or delta.get("content") or "")
            if choice.get("finish_reason"):
                others.append([key, choice["finish_reason"]])
        if part.get("usage") and not part.get("choices"):
            others.append(part["usage"])
        if part.get("type"):
            others.append(part["type"] if part["type"].endswith(".delta") is False else "delta")
            texts["text"] = texts.get("text", "") + (part.get("delta") if isinstance(part.get("delta"), str) else "")
    order = sorted(others, key=json.dumps) if any(isinstance(o, list) for o in others) else others
    return [texts, [o for i, o in enumerate(order) if o != "delta" or order[i - 1] != "delta"]]


def same(a: Any, b: Any) -> bool:
    """Equal, numbers up to rounding."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-2, abs_tol=1e-2)
    return a == b
