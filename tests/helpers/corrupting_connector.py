"""The KV connector with one fault: the decoder adds a little to the keys of one layer of every chunk that it loads.

Given to the example with KV_CONNECTOR_MODULE, it shows that the correctness probe can fail.
"""

from __future__ import annotations

from typing import Any

from disagg_prefill_lmcache_v1.kv import connector as kv_connector

LAYER = 3


class LMCacheDisaggConnectorV1(kv_connector.LMCacheDisaggConnectorV1):
    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        super().register_kv_caches(kv_caches)
        if self._worker.role != "kv_consumer":
            return
        mover = self._worker.paged.mover
        scatter = mover.scatter

        def corrupting_scatter(chunk: Any, slots: Any) -> None:
            chunk = chunk.clone()
            chunk[0, LAYER] += 0.5
            scatter(chunk, slots)

        mover.scatter = corrupting_scatter
