"""Starts LMCache's multi-process cache server as this bundle needs it: ``… -m …kv.mp_server HOST PORT --size 2gb``.

It is LMCache's own server without its HTTP frontend, whose unauthenticated administration nobody needs here. Its
settings come from a file (configs/lmcache-config-mp.yaml), flags given here win. The shared memory with the KV is
removed however the server ends: LMCache leaves it behind when it is killed, as large as it is.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "lmcache-config-mp.yaml"
DEFAULT_SIZE = "2gb"
SHARED_MEMORY = Path("/dev/shm")
_UNITS = {"": 1, "b": 1, "k": 1000, "kb": 1 << 10, "m": 1000**2, "mb": 1 << 20, "g": 1000**3, "gb": 1 << 30}


def parse_size(text: str) -> int:
    """``512mb`` in bytes; units as Redis has them.

    Raises:
        argparse.ArgumentTypeError: no such size.
    """
    match = re.fullmatch(r"(\d{1,12})([kmg]?b?)", text.strip().lower())
    if not match or not int(match[1]):
        raise argparse.ArgumentTypeError(f"'{text}': allowed: a whole number and a unit, as in 512mb or 2gb")
    return int(match[1]) * _UNITS[match[2]]


def parse_address(text: str) -> tuple[str, int]:
    """``host:port``.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise argparse.ArgumentTypeError(f"'{text}': allowed: HOST:PORT")
    return host, int(port)


def flags_of(settings: Mapping[str, Any]) -> list[str]:
    """Flags of LMCache's server for entries of the settings file; a list is a flag for each of its entries."""
    words = []
    for name, value in settings.items():
        flag = "--" + name.replace("_", "-")
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, bool):
                words.append(flag if each else "--no-" + flag[2:])
            else:
                words += [flag, json.dumps(each) if isinstance(each, dict) else str(each)]
    return words


def server_words(argv: Sequence[str]) -> tuple[str, list[str]]:
    """Name of the shared memory, and the command line of LMCache's server.

    Raises:
        SystemExit: 2 for a wrong command line, 1 for a settings file that cannot be read.
    """
    parser = argparse.ArgumentParser(prog="mp_server", allow_abbrev=False)
    parser.add_argument("host")
    parser.add_argument("port", type=int)
    size = parse_size(DEFAULT_SIZE)
    parser.add_argument("--size", type=parse_size, default=size, help="memory for KV, as in 512mb or 2gb")
    parser.add_argument("--chunk-size", type=int, default=None, help="tokens of a chunk, a multiple of vLLM's block")
    parser.add_argument("--config", type=Path, default=CONFIG, help="settings file")
    parser.add_argument("--redis", type=parse_address, metavar="HOST:PORT", help="second tier; see also --l2-adapter")
    parser.add_argument("--l2-adapter", action="append", default=[], metavar="JSON", help="second tier, LMCache's JSON")
    given = parser.parse_args(argv)
    free = shutil.disk_usage(SHARED_MEMORY).free
    if given.size > free:  # LMCache would go on by itself, and send KV through its socket
        size = argv[argv.index("--size") + 1] if "--size" in argv else DEFAULT_SIZE
        raise SystemExit(f"mp_server: error: --size {size}: {SHARED_MEMORY} has {free >> 20} MiB free: give less")
    try:
        settings = yaml.safe_load(given.config.read_text()) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise SystemExit(f"mp_server: error: {given.config}: {' '.join(str(error).split())}") from None
    if given.chunk_size is not None:
        settings["chunk_size"] = given.chunk_size
    tiers = [json.loads(text) for text in given.l2_adapter]
    if given.redis:  # LMCache takes its password from LMCACHE_RESP_PASSWORD
        tiers.append({"type": "resp", "host": given.redis[0], "port": given.redis[1]})
    if tiers:
        settings["l2_adapter"] = tiers
    # As large as the size at once: what the server grows by later would not be in the shared memory.
    settings |= {"host": given.host, "port": given.port, "l1_size_gb": given.size / (1 << 30)}
    name = settings.setdefault("shm_name", f"disagg-mp-{given.port}-{os.getpid()}")
    return str(name), flags_of(settings)


def remove_at_end(name: str) -> None:
    """Leave a process behind that removes the shared memory ``name`` when this one has ended, killed or not."""
    reader, writer = os.pipe()
    if os.fork():
        os.close(reader)  # and the writer stays open as long as this process lives
        return
    os.setsid()  # a signal to the server's group must not reach it
    os.close(writer)
    os.read(reader, 1)
    for path in SHARED_MEMORY.glob(f"*{name}"):  # LMCache puts a word before it
        path.unlink(missing_ok=True)
    os._exit(0)


def main(argv: Sequence[str]) -> None:
    """Serve until SIGINT or SIGTERM."""
    name, words = server_words(argv)
    remove_at_end(name)
    from lmcache.v1.multiprocess import server

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.argv = ["lmcache-server", *words]
    given = server.parse_args()
    server.run_cache_server(
        mp_config=server.parse_args_to_mp_server_config(given),
        storage_manager_config=server.parse_args_to_config(given),
        obs_config=server.parse_args_to_observability_config(given),
    )


if __name__ == "__main__":
    main(sys.argv[1:])
