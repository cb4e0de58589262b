"""Notices prefill and decode servers that cannot share KV, by what they tell with their health (kv/tell_layout.py).

Such servers answer all requests, and compute every prompt twice. The proxy says so in its log, on ``/ready`` and on the
status page, and does not ask a prefill server whose KV no decode server can load.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

from disagg_prefill_lmcache_v1.proxy.health import Upstream

log = logging.getLogger("disagg_proxy")

_field = re.compile(r"([a-z-]{1,20})=([A-Za-z0-9_.-]{1,32})(?: |$)")
# What has to be equal beside the sizes, in words.
_EQUAL = {"heads": "KV heads", "head-size": "head size", "dtype": "KV type", "chunk": "tokens a chunk"}
_OUTCOME = "no KV is shared, and prompts go to the decode server alone"


def mismatch(prefill: Upstream, decode: Upstream) -> str:
    """Why this decode server cannot load what this prefill server stores, in a sentence; "" if it can or is unknown."""
    here, there = dict(_field.findall(prefill.kv_layout)), dict(_field.findall(decode.kv_layout))
    if "ranks" in here and "reads" in there and here["ranks"] != there["reads"]:
        return (
            f"prefill server {prefill.name} has tensor parallel size {here['ranks']}, decode server {decode.name} "
            f"loads KV of servers of size {there['reads']}: {_OUTCOME}; start both with the same --tensor-parallel-size"
        )
    for name, words in _EQUAL.items():
        if name in here and name in there and here[name] != there[name]:
            return (
                f"prefill server {prefill.name} has {words} {here[name]}, decode server {decode.name} {there[name]}: "
                f"{_OUTCOME}; start both with the same model, types and configuration of LMCache"
            )
    return ""


class LayoutWatch:
    """Compares all prefill servers with all decode servers; belongs to one event loop."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def look(self, prefillers: Sequence[Upstream], decoders: Sequence[Upstream]) -> None:
        """Note which prefill servers are of no use, and tell what is new."""
        found: list[str] = []
        known = [decoder for decoder in decoders if decoder.kv_layout]
        for prefiller in prefillers:
            reasons = [mismatch(prefiller, decoder) for decoder in known]
            prefiller.kv_mismatch = reasons[0] if reasons and all(reasons) else ""
            found += [reason for reason in reasons if reason]
        for text in found:
            if text not in self.problems:
                log.warning("%s", text)
        if self.problems and not found:
            log.info("prefill and decode servers can share KV again")
        self.problems = found

    def told(self, prefillers: Sequence[Upstream], decoders: Sequence[Upstream]) -> dict[str, list[str]]:
        """``problems``, for an answer in JSON; nothing where there are none."""
        self.look(prefillers, decoders)
        return {"problems": self.problems} if self.problems else {}
