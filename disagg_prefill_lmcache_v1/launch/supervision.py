"""Supervision of a stack of processes: start, readiness, death, end. One loop, no threads, no flags.

Whatever is started inside ``with Supervisor(...)`` is ended with it. The first child that ends without having been
allowed to ends the stack: a Failure that names it. A signal that asks this process to end is noticed in the next round
of the loop (``tick``).
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from disagg_prefill_lmcache_v1.launch.messages import CONSOLE, Failure, Interrupted, Progress, info
from disagg_prefill_lmcache_v1.launch.ports import HOST, address_text
from disagg_prefill_lmcache_v1.launch.processes import Machine

TICK_S = 0.1
WORKERS_S = 3.0  # for what frees shared memory after those that had it were killed
KILLED_S = 10.0
START_FAILED_S = 5.0  # for a child that has told that it cannot start to end by itself
LOOK_EVERY_S = 1.0  # into a log


@dataclass
class Child:
    """A process that was started here. ``log`` None: it writes where this process writes."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path | None

    @property
    def pid(self) -> int:
        return self.process.pid


@dataclass
class Target:
    """A child that gets ready: its port answers, with 200 to a GET of ``path`` or (path empty) at all.

    Instead of the port there may be the path of a Unix socket.
    ``problem`` finds in the child's log why it cannot start ("": nothing yet); some go on for minutes after that.
    """

    child: Child
    port: int | str
    path: str = ""
    problem: Callable[[], str] | None = None
    host: str = HOST
    _looked: float = field(default=float("-inf"), init=False)
    _found: tuple[float, str] | None = field(default=None, init=False)

    def check(self, now: float) -> None:
        """Raises Failure when the child has told that it cannot start and does not end soon."""
        if self._found is None and self.problem is not None and now - self._looked >= LOOK_EVERY_S:
            self._looked = now
            text = self.problem()
            self._found = (now, text) if text else None
        if self._found is not None and now - self._found[0] >= START_FAILED_S:
            raise Failure(f"{self.child.name} cannot start: {self._found[1]}", self.child.log)


def describe_death(name: str, status: int) -> str:
    """What happened to a child, from its exit status or (negative) the signal that killed it."""
    if status >= 0:
        return f"{name} ended with exit status {status}: the example ends"
    with contextlib.suppress(ValueError):
        return f"{name} was killed by signal {signal.Signals(-status).name[3:]}: the example ends"
    return f"{name} was killed by signal {-status}: the example ends"


class Supervisor:
    """See the module. ``grace_s``: from TERM to KILL at the end."""

    def __init__(
        self,
        *,
        grace_s: float,
        describe: Callable[[str, int], str] = describe_death,
        machine: Machine | None = None,
    ) -> None:
        self.machine = machine or Machine()
        self._grace_s = grace_s
        self._describe = describe
        self._children: list[Child] = []  # the living, in the order of their start
        self._groups: set[int] = set()
        self._signal: int | None = None
        self._tell_guard: Callable[[int], None] = lambda group: None
        self._exits = contextlib.ExitStack()

    def __enter__(self) -> Supervisor:
        self._exits.enter_context(self.machine.ending_signals(self._notice))
        self._tell_guard = self._exits.enter_context(self.machine.guard(self._end_orphans))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        interrupted = self._signal  # what comes from here on changes nothing
        try:
            if isinstance(error, Failure):  # told at once: the end may take a while
                with contextlib.suppress(BrokenPipeError):
                    CONSOLE.report(error)
        finally:
            self.stop()
            self._exits.close()
        if kind is None and interrupted is not None:
            raise Interrupted(interrupted)

    def _notice(self, number: int) -> None:
        if self._signal is None:
            self._signal = number

    def _end_orphans(self, groups: set[int]) -> None:
        """What the guard does after this process was killed."""
        self._children, self._groups = [], groups
        self.stop()

    # --- one round

    def start(
        self,
        name: str,
        words: Sequence[str],
        environment: Mapping[str, str],
        log: Path | None,
        *,
        stdin: int = subprocess.DEVNULL,
        pass_fds: Collection[int] = (),
    ) -> Child:
        """Starts a child; see ``Machine.start``. Raises Failure."""
        process = self.machine.start(words, environment, log, stdin=stdin, pass_fds=pass_fds)
        child = Child(name, process, log)
        self._children.append(child)
        self._groups.add(child.pid)
        self._tell_guard(child.pid)
        return child

    def release(self, child: Child) -> None:
        """Its end is no fault from here on; what is left of it is ended with the stack all the same."""
        self._children.remove(child)

    def check(self, may_end: Child | None = None) -> int | None:
        """The exit status of ``may_end`` if it has ended. Raises Failure for any other child that has, Interrupted."""
        if self._signal is not None:
            raise Interrupted(self._signal)
        allowed = None
        for child in list(self._children):
            status = child.process.poll()
            if status is None:
                continue
            self._children.remove(child)
            if not any(row.group == child.pid for row in self.machine.members({child.pid})):
                self._groups.discard(child.pid)  # the number may be given again
            if child is not may_end:
                raise Failure(self._describe(child.name, status), child.log)
            allowed = status
        return allowed

    def tick(self) -> None:
        """A round of a loop that waits for something: all children are checked, and a short pause."""
        self.check()
        self.machine.pause(TICK_S)

    # --- waits

    def await_ready(self, timeout_s: float, targets: Sequence[Target]) -> None:
        """Until all answer. Raises Failure: one ended, cannot start, was late, or another program has its port."""
        pending = list(targets)
        with Progress(self.machine.now) as progress:
            while True:
                self.check()
                pending = [target for target in pending if not self._is_ready(target, progress.elapsed_s)]
                if not pending:
                    return
                if progress.elapsed_s >= timeout_s:
                    child = pending[0].child
                    raise Failure(f"{child.name} was not ready after {timeout_s:g} s", child.log)
                for target in pending:
                    target.check(self.machine.now())
                names = ", ".join(target.child.name for target in pending)
                progress.show(f"waiting for {names} (at most {timeout_s:g} s)")
                self.machine.pause(TICK_S)

    def _is_ready(self, target: Target, elapsed_s: float) -> bool:
        if not self.machine.answers(target.port, target.path, target.host):
            return False
        self.check()
        name, where = target.child.name, address_text(target.port)
        if not self.machine.is_ours(target.port, target.child.pid, target.host):
            raise Failure(f"{where} is answered by another program, not by the {name} started here")
        path = f" ({target.path})" if target.path else ""
        info(f"{name} is ready on {where}{path} after {elapsed_s:.0f} s")
        return True

    def await_end(self, child: Child, text: str = "") -> int:
        """The exit status of a child, negative for a signal; ``text`` for the progress. Raises Failure for another."""
        with Progress(self.machine.now) as progress:
            while (status := self.check(child)) is None:
                if text:
                    progress.show(text)
                self.machine.pause(TICK_S)
            return status

    def run_step(self, text: str, words: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        """A command until it ends, with a progress line. Raises Failure unless it ends with 0."""
        if self.await_end(self.start(text, words, environment, log), text) != 0:
            raise Failure(f"{text} failed", log)

    # --- the end

    def stop(self) -> None:
        """TERM, a grace period, KILL, until nothing of the stack is left. Never raises; signals do not cut it short."""
        steps = (
            (signal.SIGTERM, self._grace_s, False),
            (signal.SIGKILL, WORKERS_S, True),
            (signal.SIGKILL, KILLED_S, False),
        )
        with Progress(self.machine.now) as progress:
            for number, within_s, spare_trackers in steps:
                if self._send(number, within_s, spare_trackers, progress):
                    return
            with contextlib.suppress(BrokenPipeError):
                left = " ".join(str(row.pid) for row in self.machine.members(self._groups))
                info(f"could not be ended: {left}")

    def _send(self, number: int, within_s: float, spare_trackers: bool, progress: Progress) -> bool:
        """Sends each process of the stack a signal, once, until none is left (True) or time is over."""
        told: set[int] = set()
        begin, empty = self.machine.now(), 0
        # Seen empty twice, as the table is not read at once; and what a dying process has just started is told too.
        while empty < 2:
            for child in self._children:
                child.process.poll()  # collects it
            left = self.machine.members(self._groups)
            empty = 0 if left else empty + 1
            for row in left:
                if row.pid not in told and not (spare_trackers and row.is_tracker):
                    self.machine.signal(row.pid, number)
                    told.add(row.pid)
            if left and self.machine.now() - begin >= within_s:
                return False
            if left:
                with contextlib.suppress(BrokenPipeError):
                    progress.show("ending all servers")
                self.machine.pause(TICK_S)
        return True
