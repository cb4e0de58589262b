"""What the scripts hand over to: ``python launch example|server SCRIPT ARGUMENTS``, and ``export ARGUMENTS``.

On the standard library alone.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def main() -> int:
    """Runs the program that is asked for; returns the exit status."""
    # Python has put this folder first, whose modules are not top-level ones.
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    from disagg_prefill_lmcache_v1.launch import example, server
    from disagg_prefill_lmcache_v1.launch.export import command_line

    if sys.argv[1:2] == ["export"]:
        return command_line.main(sys.argv[2:], os.environ)
    if len(sys.argv) < 3 or sys.argv[1] not in ("example", "server"):
        print("[disagg] usage: python -m disagg_prefill_lmcache_v1.launch export --help", file=sys.stderr)
        return 2
    program = {"example": example.main, "server": server.main}[sys.argv[1]]
    return program(sys.argv[3:], os.environ, sys.argv[2])


if __name__ == "__main__":
    sys.exit(main())
