"""Where the launcher puts what it makes: in the clone, in the user's cache folder where the clone is read-only."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from disagg_prefill_lmcache_v1.launch.profiles import PACKAGE, REPOSITORY

NAME = "disagg-prefill-lmcache-v1"


def cache_folder(environ: Mapping[str, str]) -> Path:
    """``$XDG_CACHE_HOME/disagg-prefill-lmcache-v1``, by default in ``~/.cache``."""
    cache = environ.get("XDG_CACHE_HOME", "")
    return Path(cache if cache.startswith("/") else os.path.expanduser("~/.cache")) / NAME


def place(name: str, environ: Mapping[str, str]) -> Path:
    """The path of this name in the clone if it is there or can be made there, else in the cache folder."""
    path = REPOSITORY / name
    return path if path.exists() or os.access(REPOSITORY, os.W_OK) else cache_folder(environ) / name


def default_run_dir(environ: Mapping[str, str]) -> Path:
    """Beside the scripts, else in the cache folder."""
    return PACKAGE if os.access(PACKAGE, os.W_OK) else cache_folder(environ) / "run"
