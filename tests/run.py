"""Sets up what the tests need and runs ruff, ShellCheck, pytest. ``tests/run.sh`` starts it; standard library alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[0] = str(REPOSITORY)  # instead of this folder

from disagg_prefill_lmcache_v1.launch.interpreter import choose_interpreter  # noqa: E402
from disagg_prefill_lmcache_v1.launch.messages import Failure, exit_status, info  # noqa: E402
from disagg_prefill_lmcache_v1.launch.profiles import load_profile  # noqa: E402
from disagg_prefill_lmcache_v1.launch.setup import set_up_python, set_up_redis  # noqa: E402
from disagg_prefill_lmcache_v1.launch.supervision import Supervisor  # noqa: E402


def run(pytest_arguments: Sequence[str]) -> None:
    """Raises Failure when a step has failed; the next ones run all the same."""
    profile = load_profile("cpu")  # the tests run on CPU whatever the machine has
    interpreter = choose_interpreter(os.environ.get("DISAGG_PYTHON", ""), profile, os.environ)
    log = REPOSITORY / "runs" / "tests" / "setup.log"
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
        scripts = sorted(str(path) for pattern in ("disagg_*/**/*.sh", "tests/*.sh") for path in Path().glob(pattern))
        shellcheck = shutil.which("shellcheck", path=f"{Path(python).parent}{os.pathsep}{os.environ['PATH']}")
        if shellcheck is None:
            raise Failure("shellcheck is missing: install the extra 'test'")
        steps = {
            "ruff check": [python, "-m", "ruff", "check", "."],
            f"shellcheck of {len(scripts)} scripts": [shellcheck, "-x", *scripts],
            "pytest": [python, "-m", "pytest", "--durations=15", *pytest_arguments],
        }
        failed = [name for name, words in steps.items() if not passes(supervisor, name, words)]
    if failed:
        raise Failure(f"failed: {', '.join(failed)}")


def passes(supervisor: Supervisor, name: str, words: Sequence[str]) -> bool:
    """One step, in a group of its own, so that nothing of it outlives this program."""
    info(name)
    begin = time.monotonic()
    status = supervisor.await_end(supervisor.start(name, words, os.environ, None))
    result = f"FAILED (exit status {status})" if status else "passed"
    info(f"{name}: {result} after {time.monotonic() - begin:.0f} s")
    return not status


if __name__ == "__main__":
    sys.exit(exit_status(lambda: run(sys.argv[1:])))
