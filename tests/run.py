"""Sets up what the tests need and runs pytest, which runs the linters too (tests/repository). Standard library."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[0] = str(REPOSITORY)  # instead of this folder

from disagg_prefill_lmcache_v1.launch.interpreter import choose_interpreter  # noqa: E402
from disagg_prefill_lmcache_v1.launch.messages import Failure, exit_status, info  # noqa: E402
from disagg_prefill_lmcache_v1.launch.profiles import load_profile  # noqa: E402
from disagg_prefill_lmcache_v1.launch.setup import set_up_program, set_up_python, set_up_redis  # noqa: E402
from disagg_prefill_lmcache_v1.launch.supervision import Child, Supervisor  # noqa: E402

# Tests of these folders run beside all others: both mostly wait, for processes to start and for time limits. Those of
# real servers take all cores and come after them.
BESIDE = ("proxy", "repository")
REAL = "stack"


def run_pytest(supervisor: Supervisor, python: str, arguments: Sequence[str]) -> None:
    """All tests, or what the arguments say. Raises Failure when a test has failed."""

    def start(log: Path | None, *more: str) -> Child:
        child = supervisor.start("pytest", [python, "-m", "pytest", "--durations=15", *more], os.environ, log)
        supervisor.release(child)  # how each has ended is told when all have
        return child

    def end(child: Child) -> None:
        while child.process.poll() is None:
            supervisor.tick()
        statuses.append(child.process.returncode)

    statuses: list[int] = []
    if arguments:
        end(start(None, *arguments))
    else:
        tests = REPOSITORY / "tests"
        folders = {file.parent for file in tests.glob("*/test_*.py")} - {tests / name for name in (*BESIDE, REAL)}
        log = REPOSITORY / "runs" / "tests" / "beside.log"
        second = start(log, *(f"tests/{name}" for name in BESIDE))
        end(start(None, *map(str, sorted([*folders, *tests.glob("test_*.py")]))))
        end(second)
        print(log.read_text(errors="replace"), flush=True)
        end(start(None, f"tests/{REAL}"))
    if any(statuses):
        raise Failure(f"pytest: exit status {max(statuses, key=abs)}")


def run(pytest_arguments: Sequence[str]) -> None:
    """Raises Failure when a test has failed or cannot be run."""
    profile = load_profile("cpu")  # the tests run on CPU whatever the machine has
    interpreter = choose_interpreter(os.environ.get("DISAGG_PYTHON", ""), profile, os.environ)
    log = REPOSITORY / "runs" / "tests" / "setup.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    os.chdir(REPOSITORY)
    with Supervisor(grace_s=float(profile.get("STOP_GRACE"))) as supervisor:
        for extra in (profile.get("SETUP_EXTRA"), "test"):
            set_up_python(supervisor, interpreter, profile, extra, log)
        python = interpreter.path
        if subprocess.run([python, "-c", "import pytest, ruff"], capture_output=True, check=False).returncode:
            raise Failure(f"pytest and ruff are missing in {python}: install the extra 'test'")
        try:
            set_up_redis(supervisor, "redis-server", log)
        except Failure as failure:
            info(f"Redis tests are left out: {failure}")
        try:
            if not any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))):
                set_up_program(supervisor, "chromium-headless-shell", "chromium-headless-shell", "", log)
        except Failure as failure:
            info(f"tests that look at pages are left out: {failure}")
        run_pytest(supervisor, str(python), pytest_arguments)


if __name__ == "__main__":
    sys.exit(exit_status(lambda: run(sys.argv[1:])))
