"""The operating system's side of supervision: starting processes that can be found again, seeing which live, signals.

A process of a stack is found by its process group, or, where it or a child of it has left that, by a mark in its
environment. A child that is started here ends with this process, even when that is killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from disagg_prefill_lmcache_v1.launch import ports
from disagg_prefill_lmcache_v1.launch.messages import Failure

MARK = "DISAGG_STACK_ID"
ENDING_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGPIPE, signal.SIGTERM)
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


@dataclass(frozen=True)
class Process:
    """A row of the process table."""

    pid: int
    parent: int
    group: int

    def title(self) -> str:
        """Its words, "" once it has ended."""
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{self.pid}/cmdline").read_bytes().split(b"\0")
            return b" ".join(words).decode(errors="replace").strip()
        return ""

    @property
    def is_tracker(self) -> bool:
        """Python's resource tracker: it frees the shared memory of a process that was killed, and ends by itself."""
        return "multiprocessing.resource_tracker" in self.title()


def lookup(pid: int) -> Process | None:
    """A process that lives. Zombies do not: in a container nothing may ever collect them."""
    with contextlib.suppress(OSError, ValueError):
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        state, parent, group = stat.rpartition(")")[2].split()[:3]
        if state not in "ZX":
            return Process(pid, int(parent), int(group))
    return None


def living() -> Iterator[Process]:
    """All processes that live."""
    for entry in os.scandir("/proc"):
        if entry.name.isdigit() and (row := lookup(int(entry.name))):
            yield row


class Machine:
    """What a supervisor needs of the machine; ``mark`` is unique to it and stands in each child's environment."""

    def __init__(self) -> None:
        self.mark = f"{os.getpid()}-{secrets.token_hex(8)}"

    now = staticmethod(time.monotonic)
    pause = staticmethod(time.sleep)

    def start(
        self,
        words: Sequence[str],
        environment: Mapping[str, str],
        log: Path | None,
        *,
        stdin: int = subprocess.DEVNULL,
        pass_fds: Collection[int] = (),
    ) -> subprocess.Popen[bytes]:
        """A process in a session of its own (Ctrl-C is for the launcher, which ends all in order).

        ``environment`` is all that it gets, but for the mark. ``log`` None: its output goes where this one's goes.

        Raises:
            Failure: there is no such program, or no such directory for the log.
        """
        outer = environment.get(MARK)
        environment = {
            **environment,
            MARK: f"{outer},{self.mark}" if outer else self.mark,
            "SPT_NOENV": "1",  # keeps setproctitle from overwriting the environment, where the mark is looked for
        }
        with contextlib.ExitStack() as stack:
            try:
                output = stack.enter_context(log.open("wb")) if log else None
                return subprocess.Popen(
                    words,
                    env=environment,
                    stdin=stdin,
                    stdout=output,
                    stderr=subprocess.STDOUT if log else None,
                    pass_fds=tuple(pass_fds),
                    start_new_session=True,
                    preexec_fn=_end_with(os.getpid()),
                )
            except OSError as error:
                raise Failure(f"cannot start {words[0]}: {error.strerror} ({error.filename})") from error

    def members(self, groups: Collection[int]) -> list[Process]:
        """The living processes of these groups, and those with the mark."""
        return [row for row in living() if row.group in groups or self._is_marked(row.pid)]

    def _is_marked(self, pid: int) -> bool:
        with contextlib.suppress(OSError):
            return self.mark.encode() in Path(f"/proc/{pid}/environ").read_bytes()
        return False

    def signal(self, pid: int, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)

    def answers(self, port: int | str, path: str, host: str = ports.HOST) -> bool:
        """Whether a server answers (with 200 to a GET of ``path``, or at all where that is empty)."""
        if isinstance(port, str) or not path:
            return ports.answers(port, host)
        # Only the proxy has this path, behind its key if there is one.
        key = os.environ.get("DISAGG_PROXY_API_KEY", "") if path == "/ready" else ""
        return ports.http_answers(port, path, key=key, host=host)

    def is_ours(self, port: int | str, pid: int, host: str = ports.HOST) -> bool:
        """Whether the port's server is this child or another process of the stack."""
        pids = [pid, *(row.pid for row in self.members({pid}))]
        return ports.socket_is_ours(port, pids) if isinstance(port, str) else ports.port_is_ours(port, pids, host)

    @contextlib.contextmanager
    def guard(self, end: Callable[[set[int]], None]) -> Iterator[Callable[[int], None]]:
        """A process that calls ``end`` with the groups that it was told of when this one is killed before the exit.

        Yields the function that tells it of a group. It holds no file of this process open.
        """
        read_end, write_end = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                _await_orphans(read_end, end)
            finally:
                os._exit(0)
        os.close(read_end)
        try:
            yield lambda group: _write(write_end, f"{group}\n")
        finally:
            _write(write_end, "end\n")
            os.close(write_end)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)

    @contextlib.contextmanager
    def ending_signals(self, notice: Callable[[int], None]) -> Iterator[None]:
        """Calls ``notice`` for each signal that asks this process to end.

        The interrupt counts even where it is ignored, as in what a shell script starts in the background; a hang-up or
        TERM that is ignored stays so (nohup). Python itself ignores the broken pipe.
        """
        kept = {number for number in (signal.SIGHUP, signal.SIGTERM) if signal.getsignal(number) is signal.SIG_IGN}
        wanted = [number for number in ENDING_SIGNALS if number not in kept]
        before = {number: signal.signal(number, lambda number, _: notice(number)) for number in wanted}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _await_orphans(pipe: int, end: Callable[[set[int]], None]) -> None:
    """The guard's life, in a process of its own."""
    os.setsid()
    for number in ENDING_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    for descriptor in {int(name) for name in os.listdir("/proc/self/fd")} - {0, 1, 2, pipe}:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    with os.fdopen(pipe) as lines:
        words = lines.read().split()
    if "end" not in words:
        end({int(word) for word in words})


def _write(pipe: int, text: str) -> None:
    with contextlib.suppress(BrokenPipeError):  # somebody has killed the guard
        os.write(pipe, text.encode())


def _end_with(parent: int) -> Callable[[], None]:
    """For the child, before it becomes another program."""

    def prepare() -> None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:  # it has ended meanwhile
            os._exit(1)

    return prepare
