"""Supervision: recorded histories replayed with a fake clock, and the real process table."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from launch_harness import free_ports, wait_until

from disagg_prefill_lmcache_v1.launch.messages import Failure, Interrupted
from disagg_prefill_lmcache_v1.launch.processes import MARK, Machine, living, lookup
from disagg_prefill_lmcache_v1.launch.supervision import Child, Supervisor, Target

ROOT = Path(__file__).resolve().parents[2]
GRACE_S = 20.0
PORTS = {"kv-server": 8300, "prefiller": 8100, "decoder": 8200, "proxy": 8000}


# --- a machine of the imagination


@dataclass
class FakeProcess:
    pid: int
    status: int | None = None

    def poll(self) -> int | None:
        return self.status


@dataclass(frozen=True)
class FakeRow:
    pid: int
    group: int = 0
    is_tracker: bool = False


@dataclass
class FakeMachine:
    """Plays a history: (second, event, value) with the events

    exit (name, status), answers (port), signal (number), appears and vanishes (pid of a process that is no child).
    ``stubborn``: names and pids that ignore TERM. The signals that the supervisor sends go to ``sent``.
    """

    history: Sequence[tuple[float, str, Any]] = ()
    stubborn: Collection[Any] = ()
    foreign_ports: Collection[int] = ()
    trackers: Collection[int] = ()
    children: dict[str, FakeProcess] = field(default_factory=dict)
    others: set[int] = field(default_factory=set)  # found by their mark
    orphans: dict[int, int] = field(default_factory=dict)  # by their group: pid -> group
    answering: set[int] = field(default_factory=set)
    sent: list[tuple[int, str, Any]] = field(default_factory=list)
    notice: Callable[[int], None] | None = None
    clock: float = 0.0

    def __post_init__(self) -> None:
        self._left = sorted(self.history, key=lambda event: event[0])

    def now(self) -> float:
        return self.clock

    def pause(self, seconds: float) -> None:
        assert self.clock < 10_000, "this history never ends"
        self.clock += seconds
        while self._left and self._left[0][0] <= self.clock:
            _, event, value = self._left.pop(0)
            getattr(self, f"_{event}")(value)

    def _exit(self, value: tuple[str, int]) -> None:
        self.children[value[0]].status = value[1]

    def _answers(self, port: int) -> None:
        self.answering.add(port)

    def _signal(self, number: int) -> None:
        if self.notice:
            self.notice(number)

    def _appears(self, pid: int) -> None:
        self.others.add(pid)

    def _vanishes(self, pid: int) -> None:
        self.others.discard(pid)

    def start(self, words: Sequence[str], environment: Mapping[str, str], log: Path | None, **_: Any) -> FakeProcess:
        process = FakeProcess(100 + len(self.children))
        self.children[words[0]] = process
        return process

    def members(self, groups: Collection[int]) -> list[FakeRow]:
        mine = {process.pid: process.pid for process in self.children.values() if process.status is None}
        groups_of = {**mine, **self.orphans, **dict.fromkeys(sorted(self.others), 0)}
        return [FakeRow(pid, group, pid in self.trackers) for pid, group in groups_of.items()]

    def signal(self, pid: int, number: int) -> None:
        name = next((name for name, process in self.children.items() if process.pid == pid), None)
        self.sent.append((round(self.clock), signal.Signals(number).name, name or pid))
        if number == signal.SIGKILL or (name or pid) not in self.stubborn:
            if name:
                self.children[name].status = -number
            self.others.discard(pid)
            self.orphans.pop(pid, None)
            if number == signal.SIGKILL:
                self.others -= set(self.trackers)  # they end once the others are dead

    def answers(self, port: int, path: str, host: str) -> bool:
        return port in self.answering

    def is_ours(self, port: int, pid: int, host: str) -> bool:
        return port not in self.foreign_ports

    @contextlib.contextmanager
    def guard(self, end: Callable[[set[int]], None]) -> Iterator[Callable[[int], None]]:
        yield lambda group: None

    @contextlib.contextmanager
    def ending_signals(self, notice: Callable[[int], None]) -> Iterator[None]:
        self.notice = notice
        yield
        self.notice = None


def run_stack(machine: FakeMachine, *, problem: Callable[[], str] | None = None) -> int:
    """What the example does: servers, readiness, a load; returns the load's status."""
    with Supervisor(grace_s=GRACE_S, machine=machine) as supervisor:  # type: ignore[arg-type]
        targets = [
            Target(supervisor.start(name, [name], {}, Path(f"{name}.log")), port, "/health", problem)
            for name, port in PORTS.items()
        ]
        supervisor.await_ready(60, targets)
        load = supervisor.start("load", ["load"], {}, None)
        return supervisor.await_end(load, "loading")


ALL_READY = [(second, "answers", port) for second, port in zip((1, 20, 30, 2), PORTS.values(), strict=True)]


def test_a_run_without_faults(capsys: pytest.CaptureFixture[str]) -> None:
    machine = FakeMachine([*ALL_READY, (40, "exit", ("load", 3))])
    assert run_stack(machine) == 3
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "ready on" in line] == [
        f"[disagg] {name} is ready on port {port} (/health) after {second} s"
        for second, name, port in (
            (1, "kv-server", 8300), (2, "proxy", 8000), (20, "prefiller", 8100), (30, "decoder", 8200)
        )
    ]  # fmt: skip
    assert "[disagg] waiting for prefiller, decoder (at most 60 s): 5 s" in lines
    assert "[disagg] loading: 5 s" in lines
    assert list(machine.children) == [*PORTS, "load"]
    assert machine.sent == [(40, "SIGTERM", name) for name in PORTS]


@pytest.mark.parametrize(
    ("event", "message", "log"),
    [
        ((10, "exit", ("decoder", -9)), "decoder was killed by signal KILL: the example ends", "decoder.log"),
        ((10, "exit", ("decoder", 0)), "decoder ended with exit status 0: the example ends", "decoder.log"),
        ((33, "exit", ("proxy", 7)), "proxy ended with exit status 7: the example ends", "proxy.log"),
        ((33, "exit", ("kv-server", -77)), "kv-server was killed by signal 77: the example ends", "kv-server.log"),
    ],
)
def test_a_death_ends_the_stack_and_is_named(
    event: Any, message: str, log: str, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = FakeMachine([*ALL_READY, event, (50, "exit", ("load", 0))])
    with pytest.raises(Failure, match=message) as caught:
        run_stack(machine)
    assert caught.value.log == Path(log)
    assert f"[disagg] error: {message} (log: {log})" in capsys.readouterr().err
    dead = event[2][0]
    told = {who for second, _, who in machine.sent if second == event[0]} - {"load"}
    assert told == set(PORTS) - {dead}
    assert all(process.status is not None for process in machine.children.values())


def test_a_server_that_is_late_is_named() -> None:
    with pytest.raises(Failure, match=r"^prefiller was not ready after 60 s$") as caught:
        run_stack(FakeMachine([event for event in ALL_READY if event[2] != 8100]))
    assert caught.value.log == Path("prefiller.log")


def test_another_program_on_the_port_is_told() -> None:
    with pytest.raises(Failure, match="port 8200 is answered by another program, not by the decoder started here"):
        run_stack(FakeMachine(ALL_READY, foreign_ports=[8200]))


def test_a_server_that_cannot_start_and_does_not_end_is_noticed_long_before_the_timeout() -> None:
    machine = FakeMachine(ALL_READY[:1])
    with pytest.raises(Failure, match="cannot start: ImportError: libucp") as caught:
        run_stack(machine, problem=lambda: "ImportError: libucp" if machine.clock > 12 else "")
    assert caught.value.log is not None
    assert 17 < machine.clock < 20


def test_a_server_that_tells_why_and_ends_is_reported_by_its_end() -> None:
    machine = FakeMachine([(14, "exit", ("decoder", 1))])
    with pytest.raises(Failure, match="decoder ended with exit status 1"):
        run_stack(machine, problem=lambda: "ImportError" if machine.clock > 12 else "")


@pytest.mark.parametrize("second", [10, 35])
@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGHUP, 129), (signal.SIGINT, 130), (signal.SIGPIPE, 141), (signal.SIGTERM, 143)],
)
def test_signals(number: int, status: int, second: float) -> None:
    machine = FakeMachine([*ALL_READY, (second, "signal", number), (second, "signal", signal.SIGQUIT)])
    with pytest.raises(Interrupted) as caught:
        run_stack(machine)
    assert caught.value.status == status
    assert {moment for moment, name, _ in machine.sent if name == "SIGTERM"} == {second}


def test_a_signal_during_the_end_changes_nothing() -> None:
    machine = FakeMachine([*ALL_READY, (40, "exit", ("load", 0)), (42, "signal", signal.SIGINT)], stubborn=["proxy"])
    assert run_stack(machine) == 0
    assert (60, "SIGKILL", "proxy") in machine.sent


def test_term_then_workers_then_trackers() -> None:
    """At the end: TERM, a grace period, KILL to all but resource trackers, which then end by themselves."""
    machine = FakeMachine(
        [*ALL_READY, (30, "appears", 7), (30, "appears", 8), (40, "exit", ("load", 0)), (45, "appears", 9)],
        stubborn=["decoder", 7, 8],
        trackers=[8],
    )
    assert run_stack(machine) == 0
    late = [(second, name, who) for second, name, who in machine.sent if second > 40]
    assert late == [
        (45, "SIGTERM", 9),  # what a dying process has just started is told too
        (60, "SIGKILL", "decoder"),
        (60, "SIGKILL", 7),
    ]
    assert machine.others == set()


def test_what_cannot_be_killed_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    machine = FakeMachine([*ALL_READY, (40, "exit", ("load", 0))])
    machine.signal = lambda pid, number: None  # type: ignore
    assert run_stack(machine) == 0
    assert "[disagg] could not be ended: 100 101 102 103" in capsys.readouterr().err
    assert machine.clock == pytest.approx(40 + GRACE_S + 3 + 10, abs=1)


def test_a_step_that_fails_is_named_with_its_log() -> None:
    machine = FakeMachine([(3, "exit", ("pip", 1))])
    with (
        pytest.raises(Failure, match=r"^installing torch failed$") as caught,
        Supervisor(
            grace_s=1,
            machine=machine,  # type: ignore[arg-type]
        ) as supervisor,
    ):
        supervisor.run_step("installing torch", ["pip"], {}, Path("setup.log"))
    assert caught.value.log == Path("setup.log")


def test_the_number_of_a_group_that_is_gone_is_not_used_again() -> None:
    """The groups that are ended at last: not that of a child without descendants, which may be another's by then."""
    machine = FakeMachine([(3, "exit", ("load", 0)), (4, "exit", ("parent", 0))])
    asked: list[set[int]] = []
    with Supervisor(grace_s=1, machine=machine) as supervisor:  # type: ignore[arg-type]
        load, parent, server = (supervisor.start(name, [name], {}, None) for name in ("load", "parent", "server"))
        machine.orphans[7] = parent.pid
        assert (supervisor.await_end(load), supervisor.await_end(parent)) == (0, 0)
        members = machine.members
        machine.members = lambda groups: asked.append(set(groups)) or members(groups)  # type: ignore
    assert asked[0] == {parent.pid, server.pid}


def test_what_the_process_table_did_not_show_at_first_is_ended_too() -> None:
    """While a parent dies and its child starts, one look at the table may show neither."""
    machine = FakeMachine()
    looks = iter([[], [FakeRow(7)], [], []])
    machine.members = lambda groups: next(looks)  # type: ignore
    with Supervisor(grace_s=1, machine=machine):  # type: ignore[arg-type]
        pass
    assert machine.sent == [(0, "SIGTERM", 7)]


def test_a_signal_in_the_last_moment_counts() -> None:
    machine = FakeMachine()
    with pytest.raises(Interrupted), Supervisor(grace_s=1, machine=machine):  # type: ignore[arg-type]
        machine._signal(signal.SIGTERM)


def test_a_child_that_was_released_may_end_and_is_ended_with_the_stack() -> None:
    machine = FakeMachine([(3, "exit", ("first", 9))])
    with Supervisor(grace_s=1, machine=machine) as supervisor:  # type: ignore[arg-type]
        for name in ("first", "second"):
            supervisor.release(supervisor.start(name, [name], {}, None))
        while machine.clock < 5:
            supervisor.tick()
    assert machine.sent == [(5, "SIGTERM", "second")]


# --- the real one


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


SLEEP = "import time; time.sleep(300)"
STUBBORN = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up\\n', end='', flush=True); {SLEEP}"


def marked(supervisor: Supervisor) -> list[int]:
    return [row.pid for row in supervisor.machine.members(())]


def test_processes_that_left_their_group_and_parent_are_ended(tmp_path: Path) -> None:
    code = f"import os, subprocess, sys; subprocess.Popen([sys.executable, '-c', {STUBBORN!r}], start_new_session=True)"
    with Supervisor(grace_s=0.3) as supervisor:
        child = supervisor.start("parent", python(code), os.environ, tmp_path / "log")
        assert supervisor.await_end(child) == 0
        wait_until(lambda: "up" in (tmp_path / "log").read_text(), "the orphan is up")
        assert len(marked(supervisor)) == 1
    assert marked(supervisor) == []


def test_a_process_without_the_mark_is_found_by_its_group() -> None:
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {SLEEP!r}], env={{}})"
    with Supervisor(grace_s=5) as supervisor:
        child = supervisor.start("parent", python(code), os.environ, None)

        def grandchild() -> set[int]:
            """Until it has its own program, it has the child's environment, with the mark."""
            return {row.pid for row in supervisor.machine.members({child.pid})} - {child.pid, *marked(supervisor)}

        wait_until(grandchild, "one without the mark is found")
        unmarked = grandchild()
        assert len(unmarked) == 1
    assert not unmarked & {row.pid for row in living()}


def test_a_stack_within_a_stack_is_found_by_both() -> None:
    with Supervisor(grace_s=5) as outer, Supervisor(grace_s=5) as inner:
        environment = {**os.environ, MARK: outer.machine.mark}
        child = inner.start("child", python(SLEEP), environment, None)
        assert marked(outer) == marked(inner) == [child.pid]


@pytest.mark.parametrize("mistake", ["program", "log"])
def test_what_cannot_be_started_is_one_line(mistake: str, tmp_path: Path) -> None:
    words = ["no-such-program"] if mistake == "program" else python(SLEEP)
    log = tmp_path / ("log" if mistake == "program" else "nowhere/log")
    with (
        pytest.raises(Failure, match=r"^cannot start \S+: No such file or directory \(\S+\)$"),
        Supervisor(grace_s=5) as supervisor,
    ):
        supervisor.start("server", words, os.environ, log)


def test_readiness_is_the_childs_own(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    server = f"import http.server as h; h.test(h.SimpleHTTPRequestHandler, port={port}, bind='127.0.0.1')"
    with Supervisor(grace_s=5) as supervisor:
        child = supervisor.start("server", python(server), os.environ, tmp_path / "log")
        supervisor.await_ready(30, [Target(child, port, "/"), Target(child, port)])
        other = supervisor.start("other", python(SLEEP), os.environ, tmp_path / "other.log")
        with pytest.raises(Failure, match="another program"), Supervisor(grace_s=5) as second:
            second.await_ready(30, [Target(Child("impostor", other.process, None), port)])


PARENT = """
import os, signal, sys, time
from disagg_prefill_lmcache_v1.launch.messages import exit_status
from disagg_prefill_lmcache_v1.launch.supervision import Supervisor

def main():
    with Supervisor(grace_s={grace_s}) as supervisor:
        child = supervisor.start("child", [sys.executable, "-c", {child!r}], os.environ, None)
        print(child.pid, flush=True)
        while True:
            supervisor.tick()

raise SystemExit(exit_status(main))
"""


@pytest.fixture
def parent() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        python(PARENT.format(child=SLEEP, grace_s=5)),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),  # as a shell does with what it starts by &
    ) as process:
        yield process
        process.kill()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signals_end_the_child_too(parent: subprocess.Popen[str], number: int, status: int) -> None:
    assert parent.stdout
    child = int(parent.stdout.readline())
    parent.send_signal(number)
    assert parent.wait(60) == status
    assert not Path(f"/proc/{child}").exists()


def test_a_child_ends_with_a_launcher_that_is_killed(parent: subprocess.Popen[str]) -> None:
    assert parent.stdout
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait(60)
    wait_until(lambda: child not in {row.pid for row in living()}, "the child is gone")


STUBBORN_FAMILY = f"""
import signal, subprocess, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", {STUBBORN!r}], start_new_session=True)
subprocess.Popen([sys.executable, "-c", {STUBBORN!r}], env={{}})
{SLEEP}
"""


def test_all_ends_with_a_launcher_that_is_killed_though_it_ignores_term() -> None:
    process = subprocess.Popen(
        python(PARENT.format(child=STUBBORN_FAMILY, grace_s=0.5)), cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout
        lines = sorted(process.stdout.readline().strip() for _ in range(3))  # the child's number, and who ignores TERM
        assert lines[1:] == ["up", "up"]
        family = [int(lines[0]), *(row.pid for row in living() if row.parent == int(lines[0]))]
        assert len(family) == 3
    finally:
        process.kill()
        process.communicate(timeout=60)
    wait_until(lambda: not any(map(lookup, family)), "all are gone", 60)


def test_the_guard_holds_nothing_open_and_ends_with_the_supervisor() -> None:
    def open_files(pid: int) -> int:
        return len(list(Path(f"/proc/{pid}/fd").iterdir()))

    before = {row.pid for row in living() if row.parent == os.getpid()}
    with Supervisor(grace_s=1):
        (guard,) = {row.pid for row in living() if row.parent == os.getpid()} - before
        wait_until(lambda: open_files(guard) == 4, "the three standard ones and its pipe")
        os.kill(guard, signal.SIGTERM)  # which it ignores: it is this process that is to end
        assert lookup(guard)
    assert not Path(f"/proc/{guard}").exists()


def test_signal_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE)]
    with Supervisor(grace_s=1):
        assert signal.getsignal(signal.SIGTERM) != before[1]
    after = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE)]
    assert after == before


def test_a_zombie_is_not_waited_for() -> None:
    process = subprocess.Popen(["true"], start_new_session=True)
    try:
        wait_until(lambda: process.pid not in {row.pid for row in living()}, "it has ended")
        assert Path(f"/proc/{process.pid}").exists()
        begin = time.monotonic()
        assert Machine().members({process.pid}) == []
        assert time.monotonic() - begin < 30
    finally:
        process.wait()
