"""Which Python the scripts choose, and how they set it up; with a stand-in Python that has no packages."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from launch_harness import EXAMPLE, PACKAGE, REPOSITORY, Launch, wait_until

from disagg_prefill_lmcache_v1.launch import places, profiles
from disagg_prefill_lmcache_v1.launch.interpreter import choose_interpreter


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    launch = Launch(tmp_path)
    yield launch
    launch.kill_leftovers()


FAKE_PYTHON = r"""#!/bin/bash
# Stand-in for a python without packages: records pip's work, makes "environments" that hold itself.
case "$*" in
  *"import sys; sys.exit(not"*) exit 0 ;;
  */launch\ example\ *) exec "$STANDIN_PYTHON" "$@" ;; # the launcher itself
  *"import venv, ensurepip"*) exit ${STANDIN_NO_VENV:-0} ;;
  "-m venv --clear "*) mkdir -p "$4/bin" && cp "$0" "$4/bin/python" && echo "venv $4" >>"$STANDIN_PIP" ;;
  *"pip --version"*) [[ $0 == */bin/python ]] ;;
  *" install "* | *" uninstall "*)
    words=$*
    echo "${words#*--no-input }" >>"$STANDIN_PIP"
    [[ -z ${STANDIN_PIP_SECONDS:-} ]] || sleep "$STANDIN_PIP_SECONDS"
    exit "${STANDIN_PIP_STATUS:-0}" ;;
  *--has-version*) exit 1 ;;
  *--has-servers*) exit 1 ;;
  *--untouched*) exit "${STANDIN_TOUCHED:-0}" ;;
  *--missing*) [[ -n ${STANDIN_COMPLETE:-} ]] && echo || { echo one==1; echo two==2; } ;;
  *) exit 0 ;;
esac
"""


class Clone:
    """A copy of the repository's scripts with a stand-in Python 3.11 on the PATH."""

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self.root = launch.folder / "clone"
        self.package = self.root / PACKAGE.name
        shutil.copytree(PACKAGE, self.package, ignore=shutil.ignore_patterns("__pycache__", "*.log"))
        (self.root / "pyproject.toml").write_text("first\n")
        tools = launch.folder / "tools"
        tools.mkdir()
        for name in ("python3.11", "python3.12", "python3.13", "python3"):
            (tools / name).write_text(FAKE_PYTHON)
            (tools / name).chmod(0o755)
        self.pip = launch.folder / "pip.txt"
        del launch.environment["DISAGG_PYTHON"]
        launch.environment |= {"PATH": f"{tools}:{launch.environment['PATH']}", "STANDIN_PIP": str(self.pip)}

    def start(self, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", str(self.package / EXAMPLE), *self.launch.arguments()],
            env={**self.launch.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.launch.finish(self.start(**environment))

    def steps(self) -> list[str]:
        return self.pip.read_text().splitlines() if self.pip.exists() else []


@pytest.fixture
def clone(launch: Launch) -> Clone:
    return Clone(launch)


STEPS = [
    "install --no-deps --extra-index-url https://download.pytorch.org/whl/cpu torch==2.13.0+cpu",
    "install one==1 two==2",
    "uninstall -y torchvision torchaudio torchcodec",
]


def test_set_up_makes_an_environment_once(clone: Clone) -> None:
    venv = clone.root / ".venv"
    done = clone.run()
    assert done.returncode == 0, done.stderr
    assert clone.steps() == [f"venv {venv}", *STEPS]
    assert "setting up" in done.stderr
    begin = time.monotonic()
    again = clone.run()
    assert again.returncode == 0, again.stderr
    assert "setting up" not in again.stderr
    assert time.monotonic() - begin < 20
    assert len(clone.steps()) == 4
    (clone.root / "pyproject.toml").write_text("second\n")
    assert clone.run().returncode == 0
    assert clone.steps()[4:] == STEPS


def test_an_environment_that_lacks_nothing_is_not_installed_into(clone: Clone) -> None:
    done = clone.run(STANDIN_COMPLETE="1")
    assert done.returncode == 0, done.stderr
    assert clone.steps()[1:] == [STEPS[0], STEPS[2]]


def test_a_failed_set_up_is_done_again(clone: Clone) -> None:
    done = clone.run(STANDIN_PIP_STATUS="1")
    assert done.returncode == 1
    assert "error: installing torch 2.13.0 for CPU failed (log: " in done.stderr
    assert list(clone.launch.records.iterdir()) == []
    assert clone.run().returncode == 0
    assert clone.steps()[-3:] == STEPS


def test_an_interrupted_set_up_leaves_nothing_running(clone: Clone) -> None:
    process = clone.start(STANDIN_PIP_SECONDS="60")
    wait_until(lambda: len(clone.steps()) > 1, "pip running")
    process.terminate()
    assert clone.launch.finish(process).returncode == 143


def test_a_run_that_waits_for_another_set_up_can_be_ended(clone: Clone) -> None:
    with (clone.root / "pyproject.toml").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        process = clone.start()
        assert process.stderr
        while "waiting for another set-up of this clone" not in process.stderr.readline():
            assert process.poll() is None
        process.terminate()
        assert clone.launch.finish(process).returncode == 143
    assert clone.steps() == []


def test_an_active_environment_is_set_up_in_place(clone: Clone) -> None:
    venv = clone.launch.folder / "active"
    (venv / "bin").mkdir(parents=True)
    shutil.copy(clone.launch.folder / "tools" / "python3.11", venv / "bin" / "python")
    assert clone.run(VIRTUAL_ENV=str(venv)).returncode == 0
    assert clone.steps() == STEPS
    assert not (clone.root / ".venv").exists()
    done = clone.run(VIRTUAL_ENV=str(venv))
    assert done.returncode == 0
    assert len(clone.steps()) == 3


def test_an_active_environment_with_another_torch_is_not_touched(clone: Clone) -> None:
    venv = clone.launch.folder / "active"
    (venv / "bin").mkdir(parents=True)
    shutil.copy(clone.launch.folder / "tools" / "python3.11", venv / "bin" / "python")
    done = clone.run(VIRTUAL_ENV=str(venv), STANDIN_TOUCHED="1")
    assert done.returncode == 1
    assert "already has a vLLM, LMCache or torch of its own" in done.stderr
    assert clone.steps() == []


def test_a_python_without_venv_is_named(clone: Clone) -> None:
    done = clone.run(STANDIN_NO_VENV="1")
    assert done.returncode == 1
    assert re.search(r"python3 cannot make virtual environments: install python3-venv", done.stderr)


@pytest.mark.parametrize(
    ("device", "has_servers", "environ", "kind"),
    [
        ("cpu", False, {}, "bundle REPO/.venv/bin/python"),
        ("cpu", True, {}, "system PATH"),
        ("cpu", True, {"VIRTUAL_ENV": "PWD/env"}, "active PWD/env/bin/python"),
        ("cpu", True, {"DISAGG_PYTHON": "/x/python", "VIRTUAL_ENV": "PWD/env"}, "given /x/python"),
        ("hpu", False, {}, "system python3"),
        ("hpu", True, {}, "system PATH"),
    ],
)
def test_python_is_chosen_without_touching_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, has_servers: bool, environ: dict[str, str], kind: str
) -> None:
    (tmp_path / "env" / "bin").mkdir(parents=True)
    (tmp_path / "env" / "bin" / "python").symlink_to(sys.executable)
    python3 = tmp_path / "python3"
    python3.write_text(f"#!/bin/sh\nexit {0 if has_servers else 1}\n")
    python3.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    environ = {name: value.replace("PWD", str(tmp_path)) for name, value in environ.items()}
    found = choose_interpreter(environ.get("DISAGG_PYTHON", ""), profiles.load_profile(device), environ)
    expected = kind.replace("REPO", str(REPOSITORY)).replace("PWD", str(tmp_path)).replace("PATH", str(python3))
    assert f"{found.kind} {found.path}" == expected


def test_a_read_only_clone_is_set_up_elsewhere(clone: Clone) -> None:
    """Also as root, who loses the right to write everywhere for it."""
    cache = clone.launch.folder / "home" / ".cache" / "disagg-prefill-lmcache-v1"
    for folder, _, _ in os.walk(clone.root):
        os.chmod(folder, 0o555)
    ports = [f"--{role}-port={port}" for role, port in clone.launch.ports.items()]
    unprivileged = ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override"] if os.geteuid() == 0 else []
    process = subprocess.Popen(
        [*unprivileged, "bash", str(clone.package / EXAMPLE), "--device=cpu", *ports],
        env=clone.launch.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    done = clone.launch.finish(process)
    for folder, _, _ in os.walk(clone.root):
        os.chmod(folder, 0o755)
    assert done.returncode == 0, done.stderr
    assert clone.steps() == [f"venv {cache / '.venv'}", *STEPS]
    assert not (clone.root / ".venv").exists()
    assert (cache / "run" / "decoder.log").exists()
    (server,) = clone.launch.records.glob(f"vllm-{clone.launch.ports['decoder']}.json")
    assert clone.launch.record(server.stem)["argv"][1] == str(cache / ".models" / "tiny-llama")


@pytest.mark.parametrize(("cache", "expected"), [("", "HOME/.cache"), ("/x/cache", "/x/cache"), ("y", "HOME/.cache")])
def test_the_cache_folder_is_the_users(monkeypatch: pytest.MonkeyPatch, cache: str, expected: str) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    folder = places.cache_folder({"XDG_CACHE_HOME": cache})
    assert str(folder) == f"{expected.replace('HOME', '/home/someone')}/disagg-prefill-lmcache-v1"
