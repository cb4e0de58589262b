"""A mock of a vLLM server, for the load and the probe."""

from __future__ import annotations

import asyncio
import json
import zlib
from collections.abc import Callable
from typing import Any

from aiohttp import web

from disagg_prefill_lmcache_v1.measure.target import DECODER_COUNTERS

MAX_MODEL_LEN = 700


class MockVllm:
    """A mock of vLLM (or of the proxy before it): its answers depend on the prompt alone, its faults are settings."""

    def __init__(self) -> None:
        self.cached: Callable[[int], int | None] = lambda prompt_tokens: None
        self.status = 200
        self.cut = False  # close the connection in the middle of a stream
        self.hang = False
        self.no_usage = False
        self.no_text = False  # tokens whose text is empty
        self.not_json = False
        self.no_done = False
        self.error_event = False
        self.answer_tokens: int | None = None
        self.wrong_for: Callable[[int], bool] = lambda prompt_tokens: (
            False
        )  # another second token; chats have minus their size
        self.wrong_logprob = 0.0
        self.runner_up = -0.3  # log-probability of the token that `wrong_for` gives; the right one has -0.2
        self.computes: Callable[[int], bool] = lambda prompt_tokens: False  # what the store has, by choice
        self.load_fails: Callable[[int], bool] = lambda index: False  # it is computed, and counts as cached
        self.tells_loads = True
        self.tells_reuse: Callable[[int], int] | None = None  # `x-reused-tokens`, by the index of the request
        self.kv_headers: dict[str, str] = {}
        self.bodies: list[dict[str, Any]] = []
        self.authorization: set[str | None] = set()  # of all requests
        self.wanted_key = ""
        self.url = ""

    def _events(self, body: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """One choice per token, and the usage."""
        chat = "messages" in body
        prompt = json.dumps(body["messages"]) if chat else body["prompt"]
        seed = zlib.crc32(json.dumps(prompt).encode())
        choices = []
        for index in range(body["max_tokens"] if self.answer_tokens is None else self.answer_tokens):
            right, other = (f"token_id:{(seed + index + extra) % 1000}" for extra in (0, 500))
            token = other if index == 1 and self.wrong_for(-len(prompt) if chat else len(prompt)) else right
            logprob = -0.2 + self.wrong_logprob
            tops = {right: logprob, other: self.runner_up}
            text = "" if self.no_text else f" t{token.removeprefix('token_id:')}"
            choice = {"index": 0, "finish_reason": None}
            if chat:
                choice[("delta" if body.get("stream") else "message")] = {"content": text}
            else:
                choice["text"] = text
            if body.get("logprobs") and chat:
                listed = [{"token": name, "logprob": value} for name, value in tops.items()]
                choice["logprobs"] = {"content": [{"token": token, "logprob": tops[token], "top_logprobs": listed}]}
            elif body.get("logprobs"):
                choice["logprobs"] = {"tokens": [token], "token_logprobs": [tops[token]], "top_logprobs": [tops]}
            choices.append(choice)
        usage: dict[str, Any] = {"prompt_tokens": len(prompt), "completion_tokens": len(choices)}
        if self.cached(len(prompt)) is not None:
            usage["prompt_tokens_details"] = {"cached_tokens": self.cached(len(prompt))}
        return choices, usage

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        if self.wanted_key and request.headers.get("authorization") != f"Bearer {self.wanted_key}":
            return web.json_response({"error": {"message": "mock wants a key"}}, status=401)
        if self.hang:
            await asyncio.sleep(60)
        if self.status != 200:
            error = {"error": {"message": f"mock says\n{self.status}", "type": "mock"}}
            return web.json_response(error, status=self.status)
        if self.not_json:
            return web.Response(text="<html>")
        choices, usage = self._events(body)
        headers = dict(self.kv_headers)
        if self.tells_reuse:
            headers["x-reused-tokens"] = str(self.tells_reuse(len(self.bodies) - 1))
        if not body.get("stream"):
            merged = choices[0]
            for choice in choices[1:]:
                if "text" in choice:
                    merged["text"] += choice["text"]
                else:
                    merged["message"]["content"] += choice["message"]["content"]
                for key, entries in choice.get("logprobs", {}).items():
                    merged["logprobs"][key] += entries
            return web.json_response({"choices": [merged], "usage": usage}, headers=headers)
        response = web.StreamResponse(headers={"content-type": "text/event-stream", **headers})
        await response.prepare(request)
        events = [{"choices": [choice]} for choice in choices]
        if self.error_event:
            events[1:] = [{"error": {"message": "mock failure"}}]
        elif not self.no_usage:
            events.append({"choices": [], "usage": usage})
        for index, event in enumerate(events):
            if self.cut and index == 1:
                request.transport.abort()
                return response
            await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        if not self.no_done:
            await response.write(b"data: [DONE]\n\n")
        return response

    async def _models(self, _request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "mock-model", "max_model_len": MAX_MODEL_LEN}]})

    async def _tokenize(self, request: web.Request) -> web.Response:
        assert (await request.json())["prompt"]
        return web.json_response({"tokens": list(range(10, 500)) * 2})

    async def _version(self, _request: web.Request) -> web.Response:
        return web.json_response({"version": "0.0.mock"})

    async def _metrics(self, _request: web.Request) -> web.Response:
        lines = ["# TYPE x", "other 5"]
        counts = {**dict.fromkeys(DECODER_COUNTERS, 0.0), "external_hits": 1000.0}
        for index, body in enumerate(self.bodies):
            tokens = len(body["prompt"]) if "prompt" in body else len(json.dumps(body["messages"]))
            new = "cache_salt" in body  # the store does not have it
            if new or self.computes(tokens):
                counts["compute_tokens"] += tokens
                counts["compute_s"] += tokens / 1000
                counts["recompute_requests"] += not new
                counts["recomputed_tokens"] += 0 if new else tokens - 1
            else:
                counts["external_hits"] += tokens - 1
                counts["load_requests"] += 1
                if self.tells_loads:
                    counts["loaded_tokens"] += 0 if self.load_fails(index) else tokens
                    counts["load_s"] += tokens / 20000
        for name, (metric, label) in DECODER_COUNTERS.items():
            labels = 'engine="0",' + (label or 'x="y z"')
            lines += [f"# HELP {metric} text", f"{metric}{{{labels}}} {counts[name]}"]
        return web.Response(text="\n".join(lines) + "\n")

    async def serve(self) -> None:
        @web.middleware
        async def remember(request: web.Request, handler: Any) -> web.StreamResponse:
            self.authorization.add(request.headers.get("authorization"))
            return await handler(request)

        app = web.Application(client_max_size=1 << 24, middlewares=[remember])
        app.router.add_post("/v1/completions", self._complete)
        app.router.add_post("/v1/chat/completions", self._complete)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/tokenize", self._tokenize)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/version", self._version)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"
        self.runner = runner
