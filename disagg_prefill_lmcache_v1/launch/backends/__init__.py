"""Ways for the KV cache from the prefill server to the decode server."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from disagg_prefill_lmcache_v1.launch.backends.base import Backend
from disagg_prefill_lmcache_v1.launch.backends.lm import Lm
from disagg_prefill_lmcache_v1.launch.backends.mp import Mp
from disagg_prefill_lmcache_v1.launch.backends.nixl import Nixl
from disagg_prefill_lmcache_v1.launch.backends.redis import Redis
from disagg_prefill_lmcache_v1.launch.backends.shm import Shm
from disagg_prefill_lmcache_v1.settings import resolve

BACKENDS: Mapping[str, type[Backend]] = {each.name: each for each in (Lm, Redis, Shm, Nixl, Mp)}


def make_backend(
    name: str,
    *,
    environ: Mapping[str, str],
    profile: Mapping[str, str],
    host: str,
    port: int | None,
    ranks: int,
    prefillers: int = 1,
    decoders: int = 1,
    advertise_host: str = "",
    url: str = "",
    run_dir: Path = Path(),
) -> Backend:
    """The backend of this name with its own settings; ``port`` None: its default.

    Raises:
        SettingsError: a setting of its own that is not allowed.
    """
    kind = BACKENDS[name]
    own = resolve(kind, {}, environ, prefix="", fallback=profile, fallback_name="profile ").values
    port = kind.default_port if port is None else port
    return kind(
        host="127.0.0.1" if kind.local else host, port=port, ranks=ranks,
        prefillers=prefillers, decoders=decoders, advertise_host=advertise_host, url=url, run_dir=run_dir, **own,
    )  # fmt: skip
