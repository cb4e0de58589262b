"""KV that the decode server fetches from the prefill server (``--kv-hand-over params``), as vLLM's NixlConnector does.

The prefill request asks for it, the prefill answer says where the KV is held, and the decode request says so to the
decode server, which fetches it and has it freed. It may be fetched once: what is fetched again is other requests' KV by
then. So there is none for what the decode server would fetch more than once, or not at all.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec

FIELD = "kv_transfer_params"
ASK = msgspec.Raw(b'{"do_remote_decode":true,"do_remote_prefill":false}')
# What each of these fields may be: each choice is a request of its own in the engine, and so is each beam; with
# log-probabilities of the prompt the decode server computes all of it itself.
_ONCE = {
    "n": (b"1", b"null"), "best_of": (b"1", b"null"), "use_beam_search": (b"false", b"null"),
    "prompt_logprobs": (b"null",), "echo": (b"false", b"null"),
}  # fmt: skip
_several_prompts = re.compile(rb'\s*\[\s*["\[]').match
_object_start = re.compile(rb"[ \t\r\n]*\{[ \t\r\n]*").match


class _Answer(msgspec.Struct):
    kv_transfer_params: msgspec.Raw = msgspec.Raw(b"null")


_decode = msgspec.json.Decoder(_Answer).decode


def is_possible(fields: Mapping[str, Any]) -> bool:
    """Whether the KV of this request is fetched exactly once. ``fields`` are raw JSON texts."""
    if not fields or any(name in fields and bytes(fields[name]).strip() not in once for name, once in _ONCE.items()):
        return False
    if FIELD in fields and bytes(fields[FIELD]).strip() != b"null":
        return False  # a trusted client says itself
    prompt = fields.get("prompt")
    return prompt is None or _several_prompts(memoryview(prompt)[:64]) is None


def told(body: bytes) -> bytes:
    """The prefill answer's ``kv_transfer_params``, JSON; b"" if it has none."""
    try:
        params = bytes(_decode(body).kv_transfer_params)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return b""
    return params if params.startswith(b"{") else b""


def with_params(body: bytes, params: bytes) -> bytes:
    """The client's body, a JSON object with at least one field, with ``kv_transfer_params`` before all others.

    Of a field that is there twice the last one counts: a client's own ``null`` would hide it, so that goes.
    """
    start = _object_start(body)
    if start is None:
        return body
    if b'"kv_transfer_params"' in body:
        fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        fields.pop(FIELD, None)
        return msgspec.json.encode({**fields, FIELD: msgspec.Raw(params)})
    return b'{"%b":%b,%b' % (FIELD.encode(), params, memoryview(body)[start.end() :])
