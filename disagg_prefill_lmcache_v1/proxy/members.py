"""The upstreams file: which servers there are, read again whenever it changes."""

from __future__ import annotations

import json
import os

from disagg_prefill_lmcache_v1.proxy.settings import SettingsError, parse_url


def read_members(path: str) -> tuple[list[str], list[str]]:
    """Prefill and decode URLs from an upstreams file. Raises SettingsError."""
    allowed = 'allowed: {"prefillers": [URL, ...], "decoders": [URL, ...]}'
    try:
        with open(path, encoding="utf-8") as file:
            value = json.load(file)
        prefillers, decoders = value["prefillers"], value["decoders"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise SettingsError(f"--upstreams-file {path!r}: {error!r}; {allowed}") from None
    for urls in (prefillers, decoders):
        if not isinstance(urls, list) or not urls or not all(isinstance(url, str) for url in urls):
            raise SettingsError(f"--upstreams-file {path!r}: {allowed}, each with one URL or more")
        for url in urls:
            parse_url(url, f"--upstreams-file {path!r}")
    return prefillers, decoders


def file_stamp(path: str) -> tuple[int, int]:
    """Changes whenever the file does; (0, 0) while it is missing."""
    try:
        status = os.stat(path)
    except OSError:
        return (0, 0)
    return (status.st_mtime_ns, status.st_size)
