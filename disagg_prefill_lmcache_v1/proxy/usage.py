"""Tokens of prompts and of their reuse, as the decode server's answers tell them.

What was reused is what its workers have loaded, in a header; where there is none it is what vLLM's usage counts as
cached, which includes loads that have failed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from disagg_prefill_lmcache_v1.proxy.header_fields import REUSED_TOKENS
from disagg_prefill_lmcache_v1.proxy.headers import Header
from disagg_prefill_lmcache_v1.proxy.metrics import Metrics
from disagg_prefill_lmcache_v1.proxy.request import RequestContext

_prompt_tokens = re.compile(rb'"(?:prompt|input)_tokens"\s*:\s*(\d{1,15})').search
_created_tokens = re.compile(rb'"cache_creation_input_tokens"\s*:\s*(\d{1,15})').search
_cached_tokens = re.compile(rb'"(?:cached_tokens|cache_read_input_tokens)"\s*:\s*(\d{1,15})').search


def told_reuse(headers: Iterable[Header]) -> int:
    """What the decode server says that it has reused, -1 if it does not say."""
    for name, value, _ in headers:
        if name == REUSED_TOKENS and value.isdigit() and len(value) < 16:
            return int(value)
    return -1


class UsageMeter:
    """Reads the usage out of answers and counts it."""

    def __init__(self, metrics: Metrics) -> None:
        self._values = metrics.values
        self._reports, self._prompts, self._reuses, self._full = (
            metrics.index(f"disagg_{name}")
            for name in ("usage_reports", "prompt_tokens", "reused_tokens", "full_reuse_requests")
        )

    def note_answer(self, request: RequestContext, body: bytes) -> bytes:
        """Note the usage of a whole answer. Returns the header lines that tell it, b"" if there is none."""
        start = body.rfind(b'"usage"')
        if start < 0:
            return b""
        self.note(request, body[start : start + 1024])
        if request.prompt_tokens < 0:
            return b""
        return b"x-prompt-tokens: %d\r\n" % request.prompt_tokens

    def note(self, request: RequestContext, text: bytes) -> None:
        """Note the usage in the JSON text of an answer's end."""
        found = _prompt_tokens(text, max(text.rfind(b'"usage"'), 0))
        if found is None:
            return
        start, prompt = found.start(), int(found[1])
        found = _cached_tokens(text, start)
        cached = request.cached_tokens = int(found[1]) if found else 0
        if request.reused_tokens < 0:
            request.reused_tokens = cached
        reused = request.reused_tokens
        if request.path == "/v1/messages":  # there input_tokens leaves out what came from a cache or went into one
            found = _created_tokens(text, start)
            prompt += cached + (int(found[1]) if found else 0)
        request.prompt_tokens = prompt
        values = self._values
        values[self._reports] += 1.0
        values[self._prompts] += prompt
        values[self._reuses] += reused
        if reused >= prompt - 1:
            values[self._full] += 1.0
