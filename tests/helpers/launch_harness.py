"""Runs the launch scripts with stand-in programs and tells what is left running."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "disagg_prefill_lmcache_v1"
STANDINS = REPOSITORY / "tests" / "helpers" / "standins"
EXAMPLE = "disagg_example_gaudi_lm.sh"
LAUNCHER = "disagg_vllm_launcher_gaudi_lm.sh"
ROLES = ("proxy", "prefiller", "decoder", "kv")
TIMEOUT_S = 60.0
# Below those that the kernel gives to clients and to port 0, which may take a chosen port before it is listened on.
PORTS = range(12_000, 32_000)


def free_ports(count: int) -> list[int]:
    """Ports that nothing listened on a moment ago."""
    return random_ports(count, apart=True)


def random_ports(count: int, *, apart: bool) -> list[int]:
    rng = random.SystemRandom()  # tests may seed the usual one
    while True:
        first = rng.choice(PORTS)
        found = rng.sample(PORTS, count) if apart else list(range(first, first + count))
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            for port in found:
                stack.enter_context(socket.socket()).bind(("0.0.0.0", port))
            return found


def free_ports_in_a_row(count: int) -> int:
    """The first of so many ports that nothing listened on a moment ago."""
    return random_ports(count, apart=False)[0]


def wait_until(condition: Callable[[], bool], what: str, seconds: float = TIMEOUT_S) -> None:
    """Waits for a condition; fails with `what` after a deadline."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.02)


def parse_dry_run(text: str) -> dict[str, tuple[dict[str, str], list[str]]]:
    """Name of each printed command -> its environment and its words."""
    commands = {}
    lines = iter(text.splitlines())
    for line in lines:
        assert line.startswith("# "), line
        words = shlex.split(next(lines))
        assert words[0] == "env", words
        count = 1
        while words[count] == "-u":
            count += 2
        first = count
        while "=" in words[count]:
            count += 1
        commands[line[2:].split(" ")[0]] = (dict(word.split("=", 1) for word in words[first:count]), words[count:])
    return commands


def option(words: list[str], flag: str) -> str:
    """The value after a flag; the last one counts, as with argparse."""
    return words[len(words) - words[::-1].index(flag)]


class Launch:
    """One set of stand-ins, free ports and a run directory for a test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.timeout_s = TIMEOUT_S  # of a whole run
        self.run_dir = folder / "run"
        self.records = folder / "records"
        self.model = folder / "model"
        for each in (self.records, self.model, folder / "home"):
            each.mkdir()
        (self.model / "config.json").write_text("{}")
        self.ports = dict(zip(ROLES, free_ports(len(ROLES)), strict=True))
        self.mark = uuid.uuid4().hex
        server = f"{sys.executable} {STANDINS}/standin_server.py"
        self.environment = {
            "PATH": f"{STANDINS}:{os.environ['PATH']}",
            "HOME": str(folder / "home"),
            "LAUNCH_TEST_MARK": self.mark,
            "DISAGG_PYTHON": sys.executable,
            "STANDIN_PYTHON": sys.executable,
            "STANDIN_RECORD": str(self.records),
            "VLLM_PROGRAM": "vllm serve",
            "KV_SERVER_PROGRAM": f"{server} kv",
            "PROXY_PROGRAM": f"{server} proxy",
            "LOAD_PROGRAM": f"{sys.executable} {STANDINS}/standin_load.py",
            "COMPARE_PROGRAM": f"{sys.executable} {STANDINS}/standin_load.py",
        }

    def arguments(self, *arguments: str, device: str = "cpu") -> list[str]:
        """Flags of a run that collides with nothing."""
        roles = [role for role in ROLES if not (role == "kv" and "--backend=shm" in arguments)]  # that has none
        ports = [f"--{role}-port={self.ports[role]}" for role in roles]
        return [f"--device={device}", f"--model={self.model}", f"--run-dir={self.run_dir}", *ports, *arguments]

    def start(self, *command: str, **environment: str) -> subprocess.Popen[str]:
        """A script of the package, running."""
        return subprocess.Popen(
            ["bash", str(PACKAGE / command[0]), *command[1:]],
            env={**self.environment, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.folder,
        )

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """A script of the package, until it ends. Nothing may be left over."""
        return self.finish(self.start(*command, **environment))

    def finish(self, process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
        try:
            out, err = process.communicate(timeout=self.timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            raise AssertionError(f"the script did not end:\n{out}\n{err}") from None
        assert self.running() == [], f"left running after:\n{err}"
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def record(self, name: str) -> dict:
        return json.loads((self.records / f"{name}.json").read_text())

    def has_record(self, name: str) -> bool:
        return (self.records / f"{name}.json").exists()

    def running(self) -> list[int]:
        """Those of them that stay; the ones on their way out get a moment."""
        deadline = time.monotonic() + 20
        while pids := list(self.marked()):
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        return pids

    def marked(self) -> Iterator[int]:
        """Processes that carry this test's mark now."""
        for entry in Path("/proc").glob("[0-9]*/environ"):
            try:
                if f"LAUNCH_TEST_MARK={self.mark}".encode() in entry.read_bytes():
                    yield int(entry.parent.name)
            except OSError:
                continue

    def command_lines(self) -> list[bytes]:
        """Those of all processes: Redis writes its title over its environment, so it has no mark."""
        lines = []
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                lines.append(entry.read_bytes())
        return lines

    def kill_leftovers(self) -> None:
        for pid in self.marked():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
