"""Tells when a request's KV can be found in ``lmcache server``: the promise of visibility.py for backend mp.

The worker hands over what a step has stored; a thread here looks it up as a decode server would, and announces it. A
lookup covers the shards of all ranks, so one rank does it for all.
"""

from __future__ import annotations

import dataclasses
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from lmcache.logging import init_logger

from disagg_prefill_lmcache_v1.kv.visibility import Announcer

logger = init_logger(__name__)

_THREADS = 8  # lookups at a time; each mostly waits for the server
_AGAIN_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05)  # pauses between lookups; the last one again and again
_REST_S = 1.0  # chunks of other ranks and of other engines may be on their way this long after ours


@dataclasses.dataclass
class Stored:
    """What a step's metadata says of a request whose prefill it completes."""

    request_id: str
    token_ids: list[int]
    end: int  # tokens in whole chunks
    cache_salt: str


class Confirmer:
    """See the module's text.

    Args:
        adapter: LMCache's worker adapter.
        timeout_s: how long a request's KV is looked for.
    """

    def __init__(self, adapter: Any, announcer: Announcer, timeout_s: float) -> None:
        self._adapter, self._announcer, self._timeout_s = adapter, announcer, timeout_s
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="kv-confirm")
        self._last_reason = ""

    def confirm(self, stored: Stored) -> None:
        """Announce the request when its chunks are found. Called after its last store was handed over."""
        future = self._adapter.store_futures.get(stored.request_id)
        self._pool.submit(self._confirm, stored, future, time.monotonic())

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _confirm(self, stored: Stored, future: Any, begin: float) -> None:
        try:
            reason = self._search(stored, future, begin)
        except Exception as error:  # whatever it is: an answer waits for the announcement
            reason = f"{type(error).__name__}: {error}"
        if reason and reason != self._last_reason:
            logger.warning("KV of request %s is not visible: %s", stored.request_id, reason)
        self._last_reason = reason
        milliseconds = (time.monotonic() - begin) * 1000
        self._announcer.end(stored.request_id, 0, 1, "failed" if reason else "stored", reason, milliseconds)

    def _search(self, stored: Stored, future: Any, begin: float) -> str:
        """Look until all chunks are found (returns "") or it is clear that they will not be (returns why)."""
        chunk, tries, settled, found = self._adapter.lmcache_tokens_per_chunk, 0, 0.0, 0
        while self._adapter.is_healthy:
            found = self._look_up(stored, f"{stored.request_id}-seen-{tries}")
            if found * chunk >= stored.end:
                return ""
            now = time.monotonic()
            if not settled and (future is None or future.query()):
                settled = now  # nothing of ours is on its way any more
            if (settled and now - settled > _REST_S) or now - begin > self._timeout_s:
                whole = stored.end // chunk
                return f"{whole - found} of {whole} chunks are not in the KV server: is it full?"
            time.sleep(_AGAIN_S[min(tries, len(_AGAIN_S) - 1)])
            tries += 1
        return "the KV server does not answer"

    def _look_up(self, stored: Stored, name: str) -> int:
        """Chunks from the beginning that a decode server would find. Their locks are given back."""
        adapter, client = self._adapter, self._adapter.req_client
        key = adapter._create_key(stored.token_ids, 0, stored.end, request_id=name, cache_salt=stored.cache_salt)
        key = key.no_worker_id_version()
        readers = adapter.parallel_strategy.kv_tp_size
        client.lookup(key, readers).result(timeout=self._timeout_s)
        found = None
        while found is None:
            found = client.query_prefetch_status(name).result(timeout=self._timeout_s)
            if found is None:
                time.sleep(_AGAIN_S[0])
        if found:
            client.free_lookup_locks(key, readers)
        client.end_session(name)
        return int(found)
