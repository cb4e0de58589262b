"""Becomes a program whose output goes through a filter that hides passwords in URLs: ``masked.py PROGRAM ARGUMENTS``.

LMCache writes its settings, the store's URL among them, to its log. Runs by itself, on the standard library alone.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path


def with_masked_output(url: str, words: Sequence[str]) -> tuple[str, ...]:
    """The words of a command, through the filter if the store's URL may hold a password."""
    return (sys.executable, __file__, *words) if any(sign in url for sign in "@?") else tuple(words)


def main() -> None:
    """Starts the filter as a child and becomes the program."""
    read_end, write_end = os.pipe()
    if os.fork() == 0:
        os.close(write_end)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # it ends when the last writer has ended
        sys.path[0] = str(Path(__file__).resolve().parents[2])
        from disagg_prefill_lmcache_v1.launch.messages import mask_passwords

        with os.fdopen(read_end, "rb") as lines, os.fdopen(1, "wb", 0) as out:
            for line in lines:
                out.write(mask_passwords(line.decode(errors="surrogateescape")).encode(errors="surrogateescape"))
        os._exit(0)
    os.close(read_end)
    for target in (1, 2):
        os.dup2(write_end, target)
    os.close(write_end)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores it, and what is ignored is inherited
    os.execvp(sys.argv[1], sys.argv[1:])


if __name__ == "__main__":
    main()
