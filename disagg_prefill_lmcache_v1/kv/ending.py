"""An error at start ends the process."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Iterator

# vLLM's own way, the traceback in the log and the word to the parent process, gets this long.
GRACE_S = 3.0


@contextlib.contextmanager
def process_ends_on_error() -> Iterator[None]:
    """End this process soon after an error inside, if it is one that vLLM has started for an engine or a worker.

    Its end is what vLLM's API server waits for; but threads that are not daemons (LMCache's, NIXL's) outlive the error,
    and the server would wait on its socket for minutes.
    """
    try:
        yield
    except BaseException:
        if multiprocessing.parent_process() is not None:
            threading.Thread(target=_end_process, name="kv-end", daemon=True).start()
        raise


def _end_process() -> None:
    time.sleep(GRACE_S)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(1)
