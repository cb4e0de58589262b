"""The KV connector of --backend nixl: vLLM's own NixlConnector with the promises of the other backends.

The prefill server holds the blocks of a request that asks for it and tells so in its answer (``kv_transfer_params``);
the decode server that gets these fetches the blocks, by NIXL, beside the engine's steps. All of this is vLLM's. Added
are

- whose KV it is: both sides make a digest of all that it depends on, model, adapter, cache_salt, images and tokens.
  What comes with another one, or without, is not fetched: vLLM itself takes whatever block it is told for the prompt;
- until when the blocks are surely held: what has not arrived by then is computed, for vLLM itself takes what lies in
  blocks that others have by now;
- loading is a choice for each request (policy.py), and what was really loaded is counted (meter.py, reuse.py);
- word of whether the blocks are held (visibility.py);
- settings of the connector in a YAML file (``DISAGG_NIXL_CONFIG_FILE``);
- the build of NIXL that is installed, by whatever name.

The class has the name of vLLM's: vLLM's configuration treats that one in ways of its own.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import time
from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from lmcache.logging import init_logger

# vLLM imports NIXL by the name of a package that only chooses one of its builds, and needs all of them installed.
BUILDS = ("nixl_cu13", "nixl_cu12")
CONFIG_VARIABLE = "DISAGG_NIXL_CONFIG_FILE"
# In kv_transfer_params: whose KV it is, and until when it is held, by the prefill server's monotonic clock.
DIGEST, UNTIL = "disagg_digest", "disagg_until"
# Seconds; the offset of both clocks is that of the middle of an exchange which may take 5 s.
CLOCK_ERROR_S = 3.0
# While KV is held vLLM goes on with empty steps, a millisecond apart: on the CPU they take the decode server its cores.
REST_S = 0.02
LEASE_S = 30  # vLLM's default of kv_lease_duration
# Settings that the file may have, each with its type; the second ones go to kv_connector_extra_config.
TOP = {"kv_buffer_device": str, "kv_buffer_size": (int, float)}
EXTRA = {"backends": list, "kv_lease_duration": int, "num_threads": int}


def find_nixl() -> str:
    """Let ``nixl`` be the installed build of it; returns why it cannot be used, "" if it can."""
    os.environ.setdefault("UCX_RCACHE_MAX_UNRELEASED", "1024")  # as vLLM does, before the library is loaded
    for name in ("nixl", *BUILDS):
        if importlib.util.find_spec(name) is None:
            continue
        try:
            parts = {part: importlib.import_module(f"{name}.{part}") for part in ("_api", "_bindings")}
        except ImportError as error:
            return f"NIXL cannot be used: {error}"
        sys.modules["nixl"] = sys.modules[name]
        sys.modules.update({f"nixl.{part}": module for part, module in parts.items()})
        return ""
    return "NIXL is not installed: pip install nixl, or choose another --backend"


PROBLEM = find_nixl()
logger = init_logger(__name__)

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole  # noqa: E402
from vllm.distributed.kv_transfer.kv_connector.v1.nixl import NixlPullConnector  # noqa: E402

from disagg_prefill_lmcache_v1.kv import patches  # noqa: E402
from disagg_prefill_lmcache_v1.kv.ending import process_ends_on_error  # noqa: E402
from disagg_prefill_lmcache_v1.kv.fingerprint import digest, model_fingerprint  # noqa: E402
from disagg_prefill_lmcache_v1.kv.identity import Identities  # noqa: E402
from disagg_prefill_lmcache_v1.kv.load_scheduler import LoadScheduler  # noqa: E402
from disagg_prefill_lmcache_v1.kv.meter import LoadMetrics, LoadStats, Meter  # noqa: E402
from disagg_prefill_lmcache_v1.kv.policy import LoadPolicy  # noqa: E402
from disagg_prefill_lmcache_v1.kv.reuse import ReuseAccount  # noqa: E402
from disagg_prefill_lmcache_v1.kv.settings import from_environment  # noqa: E402
from disagg_prefill_lmcache_v1.kv.support import refuse_model  # noqa: E402
from disagg_prefill_lmcache_v1.kv.visibility import Announcer  # noqa: E402


def take_settings(transfer_config: Any, path: str) -> None:
    """Put the settings of the YAML file into vLLM's configuration; what that has already wins.

    Raises:
        ValueError: the file cannot be read, or has a key or a value that is not allowed.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{CONFIG_VARIABLE} {path}: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{CONFIG_VARIABLE} {path}: allowed: keys and values")
    kinds = TOP | EXTRA
    for name, value in content.items():
        if name not in kinds:
            raise ValueError(f"{CONFIG_VARIABLE} {path}: unknown key {name!r}: allowed: {', '.join(kinds)}")
        if not isinstance(value, kinds[name]) or isinstance(value, bool):
            raise ValueError(f"{CONFIG_VARIABLE} {path}: {name}: {value!r} is not of the kind that is allowed")
        if name == "kv_lease_duration" and value < 2 * CLOCK_ERROR_S:
            allowed = f"{2 * CLOCK_ERROR_S:g} seconds or more"
            raise ValueError(f"{CONFIG_VARIABLE} {path}: {name}: {value}: allowed: {allowed}")
        if name in TOP:
            setattr(transfer_config, name, value)
        else:
            transfer_config.kv_connector_extra_config.setdefault(name, value)


def refuse_groups(kv_cache_config: Any) -> None:
    """Raise ValueError if a fetch may fail and this vLLM (0.26) would not compute what it was to bring."""
    if len(kv_cache_config.kv_cache_groups) > 1 and not hasattr(NixlPullConnector, "get_transfer_results"):
        raise ValueError(
            "models with several kinds of attention need --disable-hybrid-kv-cache-manager with --backend nixl: this "
            "vLLM goes on with KV that could not be fetched"
        )


@dataclass
class Fetch:
    """KV that a worker fetches.

    Attributes:
        key: of its measurement, see meter.py.
        tokens: that vLLM counts as computed when it is there.
        until: see UNTIL.
        engine: that has it.
        blocks: that it is written to.
    """

    key: str
    tokens: int
    until: float
    engine: str
    blocks: set[int]
    begin: float = field(default_factory=time.perf_counter)


class NixlConnector(NixlPullConnector):
    """See the module's text.

    Raises (at server start, and the process ends):
        ValueError, RuntimeError: with what to change.
    """

    _loads: LoadScheduler | None = None  # the scheduler's
    _meter: Meter | None = None  # the worker's

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        with process_ends_on_error():
            if PROBLEM:
                raise RuntimeError(PROBLEM)
            refuse_model(vllm_config)
            refuse_groups(kv_cache_config)
            if path := os.environ.get(CONFIG_VARIABLE):
                take_settings(vllm_config.kv_transfer_config, path)
            device = vllm_config.device_config.device.type
            if device == "cpu":
                patches.let_nixl_sleep(sys.modules["nixl._bindings"])
            super().__init__(vllm_config, role, kv_cache_config)
            if role == KVConnectorRole.WORKER:
                self._start_worker(device)
            else:
                self._start_scheduler(vllm_config)

    def _start_worker(self, device: str) -> None:
        if device == "cpu":
            patches.survive_seeded_requests()
        elif device == "hpu":
            patches.report_everything(self)
        self._meter = Meter(device)
        self._fetches: dict[str, Fetch] = {}
        self._fetched: LoadStats | None = None
        self._invalid: set[int] = set()

    def _start_scheduler(self, vllm_config: Any) -> None:
        ranks = vllm_config.parallel_config.world_size
        self._lease_s = vllm_config.kv_transfer_config.get_from_extra_config("kv_lease_duration", LEASE_S)
        self._holds = vllm_config.kv_transfer_config.kv_role != "kv_consumer"
        self._rests = self._holds and vllm_config.device_config.device.type == "cpu"
        self._announcer = Announcer()
        self._fingerprint, self._identities = model_fingerprint(vllm_config), Identities()
        self._reuse = ReuseAccount(self._announcer, ranks, beside=True)
        self._loads = LoadScheduler(LoadPolicy(from_environment().load, beside=True), ranks)
        self._most: dict[str, int] = {}  # tokens that a fetch can spare; vLLM computes the prompt's last one
        self._external: dict[str, tuple[int, float]] = {}  # fetches that begin with the next step: tokens, UNTIL

    # worker side

    def register_kv_caches(self, kv_caches: Any) -> None:
        with process_ends_on_error():
            super().register_kv_caches(kv_caches)

    def bind_connector_metadata(self, connector_metadata: Any) -> None:
        super().bind_connector_metadata(connector_metadata)
        if self._meter:
            self._meter.step_begin(getattr(connector_metadata, "step", None))

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        metadata = self._connector_metadata
        for name, (tokens, until) in getattr(metadata, "external", {}).items():
            if request := metadata.reqs_to_recv.get(name):
                blocks = {block for group in request.local_block_ids for block in group}
                key = f"{metadata.step.number}:{name}"
                self._fetches[name] = Fetch(key, tokens, until, request.remote.engine_id, blocks)
        super().start_load_kv(forward_context, **kwargs)

    def wait_for_save(self) -> None:
        if self._meter:
            self._meter.step_end()
        super().wait_for_save()

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        results = super().get_transfer_results(finished_req_ids)
        results.failed_recving.update(self._ended(results.finished_recving, results.failed_recving))
        return results

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str], set[str]]:
        """The same where vLLM (0.26) tells failures by their blocks alone."""
        sent, received = super().get_finished(finished_req_ids)
        self._invalid |= super().get_block_ids_with_load_errors()
        blocks = {name: self._fetches[name].blocks for name in received or () if name in self._fetches}
        failed = [name for name, its in blocks.items() if its & self._invalid]
        for name in self._ended(blocks, failed):
            self._invalid |= blocks[name]
        return sent, received

    def get_block_ids_with_load_errors(self) -> set[int]:
        invalid, self._invalid = self._invalid, set()
        return invalid | super().get_block_ids_with_load_errors()

    def _ended(self, received: Iterable[str], failed: Container[str]) -> set[str]:
        """Account for fetches that have ended; returns those that came when their KV may no longer have been held."""
        times, used, late = {}, {}, set()
        for name in received:
            if fetch := self._fetches.pop(name, None):
                if name not in failed and self._is_late(fetch):
                    late.add(name)
                loaded = 0 if name in failed or name in late else fetch.tokens
                times[fetch.key] = [time.perf_counter() - fetch.begin, 1, loaded]
                used[name] = [0.0, 1, loaded]
        if late:
            logger.warning("KV of %s came when it may no longer have been held: computed", ", ".join(sorted(late)))
        self._fetched = LoadStats(data={"load_times": times, "used_tokens": used}) if times else None
        return late

    def _is_late(self, fetch: Fetch) -> bool:
        ahead = self.connector_worker._engine_clock_offset.get(fetch.engine)
        return ahead is None or time.perf_counter() + ahead > fetch.until - CLOCK_ERROR_S

    # both sides: measurements go from the workers to the scheduler, totals from there to the API server

    def get_kv_connector_stats(self) -> LoadStats | None:
        if self._meter is not None:
            stats, self._fetched = self._fetched, None
            measured = self._meter.take()
            return stats.aggregate(measured) if stats and measured else stats or measured
        totals = self._loads.take() if self._loads else {}
        return LoadStats(data=totals) if totals else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> LoadStats:
        return LoadStats(data=data or {})

    @classmethod
    def build_prom_metrics(cls, *args: Any) -> LoadMetrics:
        return LoadMetrics(*args)

    # scheduler side

    def update_connector_output(self, connector_output: Any) -> None:
        stats = connector_output.kv_connector_stats
        if isinstance(stats, LoadStats):
            self._loads.observe(stats.data)
            self._reuse.loaded(stats.data.get("used_tokens", {}))
            connector_output.kv_connector_stats = None  # the totals follow by get_kv_connector_stats
        super().update_connector_output(connector_output)

    def on_new_request(self, request: Any) -> None:
        given = request.kv_transfer_params
        if given is not None:
            identity = self._identity(request)
            if not isinstance(given, dict) or identity is None:
                request.kv_transfer_params = None
            elif self._holds and given.get("do_remote_decode") is True and request.max_tokens == 1:
                # with more tokens it would hold more blocks than the prompt's, and the last ones are fetched
                request.kv_transfer_params = {"do_remote_decode": True, "do_remote_prefill": False, DIGEST: identity}
            elif given.get(DIGEST) != identity or not isinstance(given.get(UNTIL), float):
                request.kv_transfer_params = None
        super().on_new_request(request)

    def _identity(self, request: Any) -> str | None:
        """Digest of all that the KV of this request depends on; None if that cannot be told."""
        identity = self._identities.digest(request)
        if identity is None or request.prompt_token_ids is None:
            return None
        items = [
            [feature.mm_position.offset, str(feature.identifier)]
            for feature in getattr(request, "mm_features", None) or ()
        ]
        return digest(self._fingerprint, identity, sorted(items), [*request.prompt_token_ids])

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        name = request.request_id
        self._reuse.looked_up(name, num_computed_tokens)
        self._most[name] = max(request.num_prompt_tokens - 1 - num_computed_tokens, 0)
        found, asynchronous = super().get_num_new_matched_tokens(request, num_computed_tokens)
        if found and not self._loads.choose(name, found):
            return 0, False  # vLLM has the blocks given back
        return found, asynchronous

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        super().update_state_after_alloc(request, blocks, num_external_tokens)
        name = request.request_id
        if num_external_tokens:
            self._external[name] = (num_external_tokens, request.kv_transfer_params[UNTIL])
        self._loads.scheduled(name, num_external_tokens)
        self._reuse.scheduled(name, min(num_external_tokens, self._most.get(name, 0)))

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        if self._rests and not scheduler_output.total_num_scheduled_tokens:
            time.sleep(REST_S)
        meta = super().build_connector_meta(scheduler_output)
        begun = [(r.req_id, len(r.prompt_token_ids or ()), r.num_computed_tokens)
                 for r in scheduler_output.scheduled_new_reqs]  # fmt: skip
        meta.step = self._loads.step(begun, scheduler_output.num_scheduled_tokens)
        meta.external, self._external = self._external, {}
        if self._holds:
            for request_id, _, _ in begun:
                self._announcer.begin(request_id)
        return meta

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        until = time.perf_counter() + self._lease_s  # before vLLM's own begins
        return self._finished(request, until, *super().request_finished(request, block_ids))

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        until = time.perf_counter() + self._lease_s
        return self._finished(request, until, *super().request_finished_all_groups(request, block_ids))

    def _finished(
        self, request: Any, until: float, held: bool, params: dict[str, Any] | None
    ) -> tuple[bool, dict[str, Any] | None]:
        name, asked = request.request_id, request.kv_transfer_params or {}
        self._loads.finished(name)
        self._reuse.finished(name)
        self._most.pop(name, None)
        if self._holds:
            state = "stored" if held else "failed" if asked.get("do_remote_decode") else "none"
            reason = "the request has ended without blocks to be held" if state == "failed" else ""
            self._announcer.end(name, 0, 1, state, reason)
        return held, {**params, DIGEST: asked.get(DIGEST), UNTIL: until} if params and DIGEST in asked else params
