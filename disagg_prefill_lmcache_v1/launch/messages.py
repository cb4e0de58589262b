"""What the launcher tells a person, on standard error, and how it ends.

A failure is an exception whose text is one line that names the cause; ``exit_status`` turns what a program's main
function does into messages and an exit status. Standard library alone: this runs before any environment exists.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from disagg_prefill_lmcache_v1.launch import logs

FIRST_LINE_S = 5.0  # where there is no terminal: of a wait
NEXT_LINE_S = 10.0


class Failure(Exception):
    """Ends the program with exit status 1; ``log``: a file that tells more."""

    status = 1

    def __init__(self, message: str, log: Path | None = None) -> None:
        super().__init__(message)
        self.log = log
        self.told = False


class UsageError(Failure):
    """A wrong or impossible setting: exit status 2."""

    status = 2


class Interrupted(BaseException):
    """A signal that ends the program: exit status 128 and its number."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


def mask_passwords(text: str) -> str:
    """The text without the passwords of the URLs in it."""
    text = re.sub(r"([a-z][a-z0-9+.-]*://[^:@/\s]*):[^\s,'\"]*@", r"\1:***@", text)
    return re.sub(r"([?&]password=)[^&\s'\"]*", r"\1***", text)


class Console:
    """Standard error of this process: lines that begin with ``[name]``, and at most one live line on a terminal."""

    def __init__(self, name: str = "disagg", failed: str = "error") -> None:
        self.name = name
        self.failed = failed  # the word before the cause of a failure
        self._live = False
        self._broken = False

    def line(self, text: str) -> None:
        """A line as it is. Raises BrokenPipeError once, when nobody reads any more."""
        self.end_live()
        self._write(text + "\n")

    def info(self, text: str) -> None:
        self.line(f"[{self.name}] {text}")

    def live(self, text: str) -> None:
        """Replaces the terminal's last line."""
        self._write(f"\r\033[K[{self.name}] {text}")
        self._live = True

    def end_live(self) -> None:
        if self._live:
            self._live = False
            self._write("\n")

    def report(self, failure: Failure) -> None:
        """What the log tells, then the failure in one line. Only the first time."""
        if failure.told:
            return
        failure.told = True
        for line in logs.explain(failure.log) if failure.log else ():
            text = mask_passwords(line)
            self.line(text if text.startswith(" ") else f"[{self.name}] {text}")
        text = mask_passwords(str(failure))
        if isinstance(failure, UsageError):
            self.info(f"usage: {text} (see --help)")
        else:
            self.info(f"{self.failed}: {text}" + (f" (log: {failure.log})" if failure.log else ""))

    def _write(self, text: str) -> None:
        if self._broken:
            return
        try:
            sys.stderr.write(text)
            sys.stderr.flush()
        except BrokenPipeError:
            self._broken = True
            raise


CONSOLE = Console()  # a process has one standard error; KV sharing gives it its own name


def info(text: str) -> None:
    """A line for the person who waits."""
    CONSOLE.info(text)


class Progress:
    """Tells how long a wait takes: a live line on a terminal, elsewhere a line after 5 s and then every 10 s.

    ``show`` is called in every round of the wait; its text may change. A context manager: the live line ends with it.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._begin = clock()
        self._next = FIRST_LINE_S

    @property
    def elapsed_s(self) -> float:
        return self._clock() - self._begin

    def show(self, text: str) -> None:
        elapsed = self.elapsed_s
        if sys.stderr.isatty():
            CONSOLE.live(f"{text}: {elapsed:.0f} s")
        elif elapsed >= self._next:
            info(f"{text}: {elapsed:.0f} s")
            self._next = elapsed + NEXT_LINE_S

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        CONSOLE.end_live()


def exit_status(main: Callable[[], int | None]) -> int:
    """The exit status of ``main``, whose failure is told unless that was done already."""
    try:
        status = main() or 0
        sys.stdout.flush()
        return status
    except Interrupted as interrupt:
        return interrupt.status
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        with contextlib.suppress(OSError):  # what is still in the buffers goes nowhere, without a complaint at the end
            for stream in (sys.stdout, sys.stderr):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return 128 + signal.SIGPIPE
    except Failure as failure:
        failed = failure
    except OSError as error:
        failed = Failure(str(error))
    with contextlib.suppress(BrokenPipeError):
        CONSOLE.report(failed)
    return failed.status
