"""The KV connector with one fault: every third load of a server that loads does not arrive.

``FAILING_LOADS`` says how: "whole" (nothing of it), "part" (its second half is missing). Given to the example
with KV_CONNECTOR_MODULE; the answers must be as without it.
"""

from __future__ import annotations

import itertools
import os
from typing import Any

import torch

from disagg_prefill_lmcache_v1.kv import connector as kv_connector

EVERY = 3


class LMCacheDisaggConnectorV1(kv_connector.LMCacheDisaggConnectorV1):
    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        super().register_kv_caches(kv_caches)
        if self._worker.role == "kv_producer":
            return
        how, count, load = os.environ.get("FAILING_LOADS", "whole"), itertools.count(1), self._worker.load

        def failing(request_id: str, tokens: list[int], slots: torch.Tensor, *rest: Any) -> torch.Tensor:
            if next(count) % EVERY:
                return load(request_id, tokens, slots, *rest)
            print(f"FAILED LOAD of {request_id}, {len(tokens)} tokens, {how}", flush=True)
            cached = rest[0]
            missing = torch.zeros(len(slots), dtype=torch.bool)
            if how == "part":
                half = cached + (len(slots) - cached) // 2
                missing |= load(request_id, tokens[:half], slots[:half], *rest).any()
                missing[half:] = True
            else:
                missing[cached:] = True
            return missing

        self._worker.load = failing
