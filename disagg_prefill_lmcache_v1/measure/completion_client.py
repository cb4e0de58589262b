"""One request to an OpenAI-compatible vLLM server: tokens, timings, reused tokens, or the cause of its failure."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from typing import Any

import aiohttp

from disagg_prefill_lmcache_v1.measure.parts import read_parts
from disagg_prefill_lmcache_v1.measure.types import Answer


def new_session() -> aiohttp.ClientSession:
    """A session for load: no limit on connections, and none kept alive (a server may close an idle one any time)."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, force_close=True), timeout=aiohttp.ClientTimeout(total=None)
    )


def one_line(text: str, limit: int = 240) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= limit else flat[: limit - 3] + "..."


def describe_failure(error: BaseException, url: str, timeout_s: float) -> str:
    """One line, the same for every request that fails for the same cause."""
    if isinstance(error, asyncio.TimeoutError):
        return f"no complete answer from {url} within {timeout_s:g} s"
    if isinstance(error, aiohttp.ClientConnectorError):
        reason = error.os_error.strerror or str(error.os_error)
        return one_line(f"cannot connect to {url}: {reason}")
    if isinstance(error, (aiohttp.ServerDisconnectedError, aiohttp.ClientPayloadError, ConnectionError)):
        return f"{url} closed the connection before the answer was complete"
    return one_line(f"{url}: {type(error).__name__}: {error}")


def error_message(payload: Any) -> str:
    """The text of an OpenAI-shaped error, or of whatever came instead."""
    if isinstance(payload, dict):
        error = payload.get("error", payload.get("detail", payload))
        if isinstance(error, dict):
            error = error.get("message", error)
        return one_line(str(error))
    return one_line(str(payload))


class _Broken(Exception):
    """An answer that arrived but cannot be used."""


def _take_usage(answer: Answer, usage: Any) -> None:
    if not isinstance(usage, dict):
        return
    answer.prompt_tokens = int(usage.get("prompt_tokens") or 0)
    answer.completion_tokens = int(usage.get("completion_tokens") or 0)
    details = usage.get("prompt_tokens_details")
    if isinstance(details, dict) and details.get("cached_tokens") is not None:
        answer.cached_tokens = int(details["cached_tokens"])


def _take_logprobs(answer: Answer, logprobs: Any) -> int:
    """Completions and chat completions spell the same thing in two ways. Returns the number of tokens."""
    if not isinstance(logprobs, dict):
        return 0
    if logprobs.get("content"):
        entries = logprobs["content"]
        answer.tokens += [entry["token"] for entry in entries]
        answer.logprobs += [entry["logprob"] for entry in entries]
        answer.top_logprobs += [
            {top["token"]: top["logprob"] for top in entry.get("top_logprobs") or ()} for entry in entries
        ]
        return len(entries)
    tokens = logprobs.get("tokens") or []
    answer.tokens += tokens
    answer.logprobs += logprobs.get("token_logprobs") or []
    answer.top_logprobs += [top or {} for top in logprobs.get("top_logprobs") or ()]
    return len(tokens)


def _take_choice(answer: Answer, choice: dict[str, Any]) -> bool:
    """Adds a whole answer or one chunk of it; returns whether it brought a token."""
    message = choice.get("message") or choice.get("delta") or {}
    text = choice.get("text") or message.get("content") or message.get("reasoning_content") or ""
    answer.text += text
    answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
    # A completion's choice always has a token; its text may be empty, as where a letter's bytes are not complete.
    return _take_logprobs(answer, choice.get("logprobs")) > 0 or bool(text) or "text" in choice


def _events(buffer: bytearray) -> Iterator[bytes]:
    """Takes the complete lines out of `buffer` and yields the data of server-sent events among them."""
    end = buffer.rfind(b"\n")
    if end < 0:
        return
    lines = bytes(buffer[:end]).split(b"\n")
    del buffer[: end + 1]
    for line in lines:
        if line.startswith(b"data:"):
            yield line[5:].strip()


async def _read_stream(response: aiohttp.ClientResponse, answer: Answer, begin: float) -> None:
    buffer = bytearray()
    last: float | None = None
    done = False
    async for data in response.content.iter_any():
        now = time.perf_counter()
        buffer += data
        for event in _events(buffer):
            if event == b"[DONE]":
                done = True
                continue
            chunk = json.loads(event)
            if chunk.get("error"):
                raise _Broken(f"error in the stream: {error_message(chunk)}")
            _take_usage(answer, chunk.get("usage"))
            brought_token = False
            for choice in chunk.get("choices") or ():
                brought_token |= _take_choice(answer, choice)
            if brought_token:
                if last is None:
                    answer.ttft_ms = (now - begin) * 1000
                else:
                    answer.itl_ms.append((now - last) * 1000)
                last = now
    if not done:
        raise _Broken("the stream ended without [DONE]")


def _take_headers(answer: Answer, headers: Mapping[str, str]) -> None:
    """What the proxy tells about a request's KV."""
    answer.kv_state = headers.get("x-kv-state")
    with contextlib.suppress(KeyError, ValueError):
        answer.kv_wait_ms = float(headers["x-kv-wait-ms"])
    with contextlib.suppress(KeyError, ValueError):
        answer.told_reused_tokens = int(headers["x-reused-tokens"])
    answer.request_id = headers.get("x-request-id", "")
    answer.parts = read_parts(headers.get("server-timing", ""))


async def _exchange(
    session: aiohttp.ClientSession, url: str, body: dict[str, Any], answer: Answer, headers: dict[str, str]
) -> None:
    begin = time.perf_counter()
    try:
        async with session.post(url, json=body, headers=headers) as response:
            _take_headers(answer, response.headers)
            if response.status != 200:
                text = await response.text(errors="replace")
                try:
                    text = error_message(json.loads(text))
                except ValueError:
                    text = one_line(text)
                raise _Broken(f"HTTP {response.status}: {text}")
            if body.get("stream"):
                await _read_stream(response, answer, begin)
            else:
                payload = json.loads(await response.read())
                _take_usage(answer, payload.get("usage"))
                for choice in payload.get("choices") or ():
                    _take_choice(answer, choice)
                answer.ttft_ms = (time.perf_counter() - begin) * 1000
    finally:
        answer.duration_ms = (time.perf_counter() - begin) * 1000
    if answer.prompt_tokens == 0:
        raise _Broken("the answer carries no usage")
    wanted = body.get("max_tokens")
    if body.get("ignore_eos") and answer.completion_tokens != wanted:
        raise _Broken(f"{answer.completion_tokens} tokens answered instead of {wanted}")


async def complete(
    session: aiohttp.ClientSession,
    base_url: str,
    body: dict[str, Any],
    *,
    timeout_s: float,
    headers: dict[str, str] | None = None,
) -> Answer:
    """Sends one (chat) completion and reads all of the answer. Never raises for a failed request: see `Answer.error`.

    Args:
        base_url: server, without a path.
        body: with "messages" it goes to /v1/chat/completions, otherwise to /v1/completions.
        timeout_s: deadline for the complete answer, seconds.
    """
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    answer = Answer()
    try:
        await asyncio.wait_for(_exchange(session, base_url + path, body, answer, headers or {}), timeout_s)
    except _Broken as error:
        answer.error = str(error)
    except json.JSONDecodeError:
        answer.error = f"{base_url} answered something that is not JSON"
    except (asyncio.TimeoutError, aiohttp.ClientError, OSError) as error:
        answer.error = describe_failure(error, base_url, timeout_s)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        answer.error = one_line(f"{base_url} answered in an unknown form: {type(error).__name__}: {error}")
    return answer


async def get_text(
    session: aiohttp.ClientSession, url: str, *, timeout_s: float, body: dict[str, Any] | None = None
) -> str:
    """GET, or POST when there is a body.

    Raises:
        ConnectionError: no usable answer; the message is one line naming the cause.
    """

    async def exchange() -> str:
        request = session.get(url) if body is None else session.post(url, json=body)
        async with request as response:
            text = await response.text(errors="replace")
            if response.status != 200:
                raise ConnectionError(f"{url}: HTTP {response.status}: {one_line(text)}")
            return text

    try:
        return await asyncio.wait_for(exchange(), timeout_s)
    except (asyncio.TimeoutError, aiohttp.ClientError) as error:
        raise ConnectionError(describe_failure(error, url, timeout_s)) from error


async def get_json(
    session: aiohttp.ClientSession, url: str, *, timeout_s: float, body: dict[str, Any] | None = None
) -> Any:
    """Like `get_text`, for an answer in JSON."""
    try:
        return json.loads(await get_text(session, url, timeout_s=timeout_s, body=body))
    except json.JSONDecodeError as error:
        raise ConnectionError(f"{url} answered something that is not JSON") from error
