"""Waits until a server has no request left, for whoever is about to stop it: a preStop hook, a script.

    python -m disagg_prefill_lmcache_v1.launch.drain --url http://127.0.0.1:8100 --settle 40 --limit 600

First ``--settle`` seconds, in which proxies learn that the server is going, from DNS or from the upstreams file; it
serves meanwhile. Then until ``/in-flight`` of the server (kv/in_flight.py) says 0: a prefill answer that is held for
its KV counts. Without ``--url`` it only waits. Exit status 0 when nothing is left, 1 after ``--limit`` or where the
server does not tell, 2 for bad flags.
"""

from __future__ import annotations

import os
import sys
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass

from disagg_prefill_lmcache_v1.settings import SettingsError, load, setting

PATH = "/in-flight"
_PAUSE_S, _ANSWER_S, _TOLD_S = 0.5, 10.0, 5.0
_GONE_AFTER = 10  # answers in a row that failed: the server is gone, or does not count


@dataclass(frozen=True)
class DrainSettings:
    """Times in seconds."""

    url: str = setting("", "server that is to be stopped", pattern=r"https?://[^\s/]+/?", allowed="http://HOST:PORT")
    settle: float = setting(40.0, "seconds until nobody sends new requests", low=0, high=3600)
    limit: float = setting(600.0, "longest wait for requests in progress after that, seconds", low=0, high=86400)


def in_flight(url: str) -> int:
    """Requests in progress. Raises OSError or ValueError where the server does not tell."""
    with urllib.request.urlopen(url.rstrip("/") + PATH, timeout=_ANSWER_S) as answer:
        return int(answer.read())


def drain(settings: DrainSettings) -> bool:
    """Whether no request is left."""
    time.sleep(settings.settle)
    if not settings.url:
        return True
    end, told, failed = time.monotonic() + settings.limit, 0.0, 0
    while True:
        try:
            left, failed, state = in_flight(settings.url), 0, "requests in progress"
        except (OSError, ValueError) as error:
            left, failed, state = -1, failed + 1, f"it does not tell: {error}"
        if not left:
            return True
        now = time.monotonic()
        ended = now >= end or failed >= _GONE_AFTER
        if ended or now - told >= _TOLD_S:
            told = now
            print(f"drain: {settings.url}: {left if left > 0 else ''} {state}", file=sys.stderr, flush=True)
        if ended:
            return False
        time.sleep(_PAUSE_S)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status."""
    try:
        settings = load(
            DrainSettings, sys.argv[1:] if argv is None else argv, os.environ, prefix="DISAGG_DRAIN_",
            prog="drain", description="Waits until a server has no request left.",
        )  # fmt: skip
    except SettingsError as error:
        print(f"drain: error: {error}", file=sys.stderr)
        return 2
    return 0 if drain(settings) else 1


if __name__ == "__main__":
    sys.exit(main())
