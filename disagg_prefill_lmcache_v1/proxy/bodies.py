"""Shaping of request bodies: what the prefill server is asked, as pure functions on bytes.

The decode server always gets the client's own bytes. The prefill server gets the same prompt with everything that only
matters for generation taken out, one token to make and no stream. Unknown fields are kept: they may change the prompt.
The edit works on the raw JSON text of each top-level field, so that a long prompt is neither decoded nor encoded again.
"""

from __future__ import annotations

import json
import re
from typing import Any

import msgspec

_decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_encode = msgspec.json.Encoder().encode
_ONE, _FALSE = msgspec.Raw(b"1"), msgspec.Raw(b"false")

# Fields that only shape what is generated or returned. Left in, they would cost time on the prefill server, make a
# one-token answer invalid (min_tokens, best_of), keep it from using its own prefix cache (prompt_logprobs) or end
# vLLM's CPU engine when the prompt is prefilled in steps (seed). Fields that a chat template may show to the model
# stay: tools, tool_choice, response_format, suffix.
_DROPPED = frozenset((
    "stream_options",
    "stream_interval",
    "min_tokens",
    "best_of",
    "use_beam_search",
    "logprobs",
    "top_logprobs",
    "prompt_logprobs",
    "logprob_token_ids",
    "echo",
    "seed",
    "stop",
    "stop_token_ids",
    "stop_sequences",
    "structured_outputs",
    "return_token_ids",
    "return_prompt_text",
))  # fmt: skip

LIMIT_FIELD = {
    "/v1/completions": "max_tokens",
    "/v1/chat/completions": "max_tokens",
    "/v1/responses": "max_output_tokens",
    "/v1/messages": "max_tokens",
}
"""Generating routes, each with the field that limits how many tokens are made."""


_LONG_BODY = 16384  # from here on, values are skipped and not checked
_ESCAPED_QUOTES = 64  # more of them in one string, and the full parser is faster
_next_key = re.compile(rb'[ \t\r\n]*([{,])[ \t\r\n]*"([A-Za-z0-9_.-]+)"[ \t\r\n]*:[ \t\r\n]*').match
_scalar = re.compile(rb"(?:true|false|null|-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)(?=[ \t\r\n,}])").match
_end = re.compile(rb"[ \t\r\n]*\}[ \t\r\n]*").fullmatch


class BadJSON(ValueError):
    """The body is not JSON at all."""


def parse_fields(body: bytes) -> dict[str, Any] | None:
    """Top-level fields of a JSON object, each as its raw text; None if the body is JSON but no object.

    Raises BadJSON when the body is not JSON by the rules of Python's json module, which the vLLM server uses. In a long
    body the inside of long values is left for the vLLM server to check: reading it twice would cost more than passing
    it on.
    """
    if len(body) >= _LONG_BODY:
        fields = _skim(body)
        if fields is not None:
            return fields
    try:
        return _decode_fields(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        pass
    try:
        value = json.loads(body)
        if not isinstance(value, dict):
            return None
        return {key: msgspec.Raw(json.dumps(item).encode()) for key, item in value.items()}
    except RecursionError:
        raise BadJSON("it is nested too deeply") from None
    except ValueError as error:
        raise BadJSON(str(error)) from None


def _skim(body: bytes) -> dict[str, Any] | None:
    """Top-level fields of a plain JSON object by jumping over long strings and flat lists; None if it is not plain."""
    view = memoryview(body)
    fields: dict[str, Any] = {}
    position, opener = 0, b"{"
    while True:
        match = _next_key(body, position)
        if match is None or match[1] != opener:
            return fields if fields and _end(body, position) else None
        opener = b","
        start = match.end()
        first = body[start : start + 1]
        if first == b'"':
            position = _string_end(body, start)
        elif first == b"[":
            position = body.find(b"]", start) + 1
            if any(body.find(mark, start + 1, position) >= 0 for mark in (b"[", b'"', b"{")):
                return None
        else:
            found = _scalar(body, start)
            position = found.end() if found else 0
        if not position:
            return None
        fields[match[2].decode()] = view[start:position]


def _string_end(body: bytes, start: int) -> int:
    """Position after the string that begins at ``start``; 0 if it has no end or very many escaped quotes."""
    quote = start
    for _ in range(_ESCAPED_QUOTES):
        quote = body.find(b'"', quote + 1)
        if quote < 0:
            return 0
        before = quote - 1
        while body[before] == 0x5C:
            before -= 1
        if (quote - before) % 2:
            return quote + 1
    return 0


def prefill_body(path: str, fields: dict[str, Any], **more: msgspec.Raw) -> list[bytes | memoryview] | None:
    """Body of the prefill request, or None where no prefill is possible and the decoder must be asked alone.

    ``more`` are fields that it has besides.

    The body comes in pieces; those of a long one are slices of the client's body, so that nothing is copied.
    """
    limit = LIMIT_FIELD[path]
    out = {name: value for name, value in fields.items() if name not in _DROPPED}
    if path == "/v1/responses":
        if _is_set(out, "previous_response_id"):
            return None  # the earlier response lives in the decode server only
        for name in ("store", "background"):
            if name in out:
                out[name] = _FALSE
    if "max_completion_tokens" in out:
        out["max_completion_tokens"] = _ONE
    out[limit] = _ONE
    if "n" in out:
        out["n"] = _ONE
    if path == "/v1/completions":
        out.pop("response_format", None)  # no chat template here: it cannot be part of the prompt
    out["stream"] = _FALSE
    out.update(more)
    if type(next(iter(fields.values()), None)) is memoryview:
        pieces: list[bytes | memoryview] = []
        for name, value in out.items():
            opener = b',"%b":' if pieces else b'{"%b":'
            pieces += (opener % name.encode(), value if isinstance(value, memoryview) else bytes(value))
        pieces.append(b"}")
        return pieces
    return [_encode(out)]


def refusal_may_be_wrong(fields: dict[str, Any]) -> bool:
    """Whether a server may refuse the shaped request although the original is right.

    A forced tool call that was cut after one token cannot be parsed, which some vLLM versions answer with 400.
    """
    choice = fields.get("tool_choice")
    return choice is not None and bytes(choice).strip() not in (b"null", b'"none"', b'"auto"')


def _is_set(fields: dict[str, Any], name: str) -> bool:
    return name in fields and bytes(fields[name]).strip() != b"null"
