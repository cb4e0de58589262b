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
    from disagg_prefill_lmcache_v1.launch import entry, server
    from disagg_prefill_lmcache_v1.launch.export import command_line

    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("example", "server"):
        return {"example": entry.main, "server": server.main}[name](arguments[1:], os.environ, arguments[0])
    return command_line.main(arguments if name == "export" else [name, *arguments], os.environ)


if __name__ == "__main__":
    sys.exit(main())
