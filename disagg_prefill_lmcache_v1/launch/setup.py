"""Installs what the servers need where that is ours to do: a virtual environment, its packages, the model, Redis.

On an accelerator vLLM, LMCache and torch are the machine's own and nothing is installed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from disagg_prefill_lmcache_v1.launch.commands import build_command
from disagg_prefill_lmcache_v1.launch.interpreter import Interpreter
from disagg_prefill_lmcache_v1.launch.messages import Failure, Progress, info
from disagg_prefill_lmcache_v1.launch.plan import Plan
from disagg_prefill_lmcache_v1.launch.profiles import REPOSITORY, Profile
from disagg_prefill_lmcache_v1.launch.supervision import Supervisor

PYPROJECT = REPOSITORY / "pyproject.toml"
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
# These come as CUDA builds; with CPU torch their import fails and takes transformers down with it.
CUDA_BUILDS = ("torchvision", "torchaudio", "torchcodec")
LOCK_TIMEOUT_S = 1800
BASE_PYTHON_CHECK = "import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))"


def set_up_python(supervisor: Supervisor, interpreter: Interpreter, profile: Profile, extra: str, log: Path) -> None:
    """Installs an extra of pyproject.toml into the interpreter's environment if that is ours to fill.

    A stamp makes the next call take no time. Raises Failure.
    """
    if interpreter.kind not in ("bundle", "active") or not profile.get("SETUP_EXTRA"):
        return
    venv = interpreter.venv
    ours = venv / ".disagg"
    if interpreter.kind == "active" and extra == profile.get("SETUP_EXTRA") and not ours.exists():
        if interpreter.has_servers(profile.device):
            return
        if interpreter.ask("--untouched").returncode:
            raise Failure(
                f"{venv} already has a vLLM, LMCache or torch of its own: complete it by hand or deactivate it"
            )
        ours.touch()  # filled by set-up from here on, even if this run is interrupted
    stamp = venv / f".disagg-{extra}-{hashlib.sha256(PYPROJECT.read_bytes()).hexdigest()[:16]}"
    if stamp.exists():
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    with set_up_lock(supervisor):
        if not stamp.exists():  # another run may just have made it
            info(f"setting up {venv} for '{extra}' (first time: a few minutes; log: {log})")
            install_extra(supervisor, interpreter, profile, extra, log)
            stamp.touch()


@contextlib.contextmanager
def set_up_lock(supervisor: Supervisor) -> Iterator[None]:
    """One set-up of this clone at a time. Raises Failure after 30 minutes."""
    with PYPROJECT.open("rb") as file, Progress() as progress:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if progress.elapsed_s > LOCK_TIMEOUT_S:
                    raise Failure(f"another set-up of {REPOSITORY} has been running for 30 minutes") from None
                progress.show("waiting for another set-up of this clone")
                supervisor.tick()
        yield


def install_extra(supervisor: Supervisor, interpreter: Interpreter, profile: Profile, extra: str, log: Path) -> None:
    """Makes the virtual environment if need be and installs an extra's missing packages. Raises Failure."""
    python, venv = interpreter.path, interpreter.venv
    pip = [python, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    if interpreter.kind == "bundle" and not _succeeds(python, "-m", "pip", "--version"):
        base = find_base_python(profile)
        supervisor.run_step(f"creating {venv}", [base, "-m", "venv", "--clear", str(venv)], os.environ, log)
    servers, torch = extra == profile.get("SETUP_EXTRA"), profile.get("SETUP_TORCH")
    if servers and interpreter.ask("--has-version", "torch", f"{torch}+cpu").returncode:
        # Torch first and alone, what it needs comes with the rest: where this index cannot be reached (a mirror has the
        # CPU build then), every package that is asked through it costs some 8 s of retries.
        words = ["install", "--no-deps", "--extra-index-url", TORCH_INDEX, f"torch=={torch}+cpu"]
        supervisor.run_step(f"installing torch {torch} for CPU", [*pip, *words], os.environ, log)
    answer = interpreter.ask("--missing", extra)
    if answer.returncode:
        raise Failure(f"cannot read the extra '{extra}' of {PYPROJECT} with {python}")
    packages = [line for line in answer.stdout.splitlines() if line]
    if packages:
        info(f"packages to install: {' '.join(packages)}")
        supervisor.run_step(f"installing the packages of '{extra}'", [*pip, "install", *packages], os.environ, log)
    if servers:
        supervisor.run_step("removing CUDA builds", [*pip, "uninstall", "-y", *CUDA_BUILDS], os.environ, log)


def _succeeds(*words: str) -> bool:
    with contextlib.suppress(OSError):
        return subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, check=False).returncode == 0
    return False


def find_base_python(profile: Profile) -> str:
    """A Python that vLLM's CPU build has wheels for and that can make virtual environments. Raises Failure."""
    found = ""
    for candidate in profile.words("SETUP_PYTHONS"):
        if not _succeeds(candidate, "-c", BASE_PYTHON_CHECK):
            continue
        found = candidate
        if _succeeds(candidate, "-c", "import venv, ensurepip"):
            return shutil.which(candidate) or candidate
    if found:
        raise Failure(f"{found} cannot make virtual environments: install python3-venv (apt-get install {found}-venv)")
    raise Failure("no Python 3.11, 3.12 or 3.13 found: install one, or name it with DISAGG_PYTHON")


def build_model(supervisor: Supervisor, plan: Plan[Any], log: Path) -> None:
    """Makes the small local model where the plan has one; takes no time when it is there. Raises Failure."""
    if plan.model.built:
        command = build_command(plan, "model")
        supervisor.run_step(
            f"building the model {plan.model.name}", command.words, command.full_environment(plan.environ), log
        )


def set_up_redis(supervisor: Supervisor, program: str, log: Path) -> None:
    """Installs redis-server where that is allowed without a question. Raises Failure when it cannot be had."""
    set_up_program(supervisor, program.split()[0], "redis-server", ", or use --redis-url", log)


def set_up_program(supervisor: Supervisor, name: str, package: str, otherwise: str, log: Path) -> None:
    """Installs a package of the system for the program ``name``, as set_up_redis; ``otherwise``: what else helps."""
    if shutil.which(name):
        return
    sudo = [] if os.geteuid() == 0 else ["sudo", "-n"]
    if not shutil.which("apt-get") or (sudo and not _succeeds(*sudo, "true")):
        raise Failure(f"{name} is missing: install it (apt-get install {package}){otherwise}")
    install = f"apt-get install -y --no-install-recommends {package}"
    script = f"{install} || {{ apt-get update && {install}; }}"
    # RUNLEVEL=1 keeps the package from starting a server of its own.
    words = [*sudo, "env", "RUNLEVEL=1", "DEBIAN_FRONTEND=noninteractive", "sh", "-c", script]
    child = supervisor.start("set-up", words, os.environ, log)
    if supervisor.await_end(child, f"installing {package}") or not shutil.which(name):
        raise Failure(f"installing {package} failed (log: {log}): install it by hand{otherwise}")
