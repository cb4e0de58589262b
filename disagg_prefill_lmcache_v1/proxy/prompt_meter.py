"""How long prompts are: counted where they are token ids, else estimated from their bytes by what answers have told."""

from __future__ import annotations

import re
from typing import Any

from disagg_prefill_lmcache_v1.proxy.affinity import BEGINNING, Prompt
from disagg_prefill_lmcache_v1.proxy.pool import Pool
from disagg_prefill_lmcache_v1.proxy.request import RequestContext

_TOKENS_PER_BYTE = 0.25  # of text, before any answer has told
_LEARN = 0.1
# Token ids, one prompt or a list of them, however they are set.
_begins_with_ids = re.compile(rb"[ \t\r\n]*\[[\[ \t\r\n]*[0-9]").match


class PromptMeter:
    """Measures prompts where there is anything to choose: a server of a role or, with ``always``, a way."""

    def __init__(self, always: bool, prefillers: Pool, decoders: Pool) -> None:
        self._always = always
        self._prefillers, self._decoders = prefillers, decoders
        self._tokens_per_byte = _TOKENS_PER_BYTE

    def measure(self, fields: dict[str, Any]) -> Prompt | None:
        """The prompt of a request; None where nobody asks."""
        if not self._always and len(self._prefillers.upstreams) < 2 and len(self._decoders.upstreams) < 2:
            return None
        view = memoryview(next((fields[name] for name in ("prompt", "messages", "input") if name in fields), b""))
        size, beginning = len(view), bytes(view[:BEGINNING])
        if _begins_with_ids(beginning):
            return Prompt(beginning, size, bytes(view).count(b",") + 1, is_text=False)
        return Prompt(beginning, size, round(size * self._tokens_per_byte))

    def learn(self, request: RequestContext) -> None:
        """A request is over: its answer may have told how many tokens its prompt had."""
        prompt = request.prompt
        if prompt is not None and prompt.text_bytes and request.prompt_tokens > 0:
            self._tokens_per_byte += _LEARN * (request.prompt_tokens / prompt.text_bytes - self._tokens_per_byte)
