"""CPU for the load before the servers: one that waits for it on a machine that they share measures itself."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

_NICE = -10


def go_first(pid: int | None = None) -> None:
    """Let a process (None: this one) have the CPU when it wants it, where that is allowed (root); else nothing changes.

    Linux weighs sessions first (autogroups) and processes within them, so that of this process is raised too, if it is
    one that this process leads: a terminal's is not.
    """
    pid = pid or os.getpid()
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, pid, _NICE)
        if os.getsid(pid) == os.getpid():
            Path(f"/proc/{pid}/autogroup").write_text(f"{_NICE}", encoding="ascii")
