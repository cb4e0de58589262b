"""The linters, as .pre-commit-config.yaml calls them. What they check stands in pyproject.toml, imports too."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
HOOKS = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
SCRIPTS = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("disagg*/*.sh", "tests/*.sh", ".ci/run")
    for path in ROOT.glob(pattern)
)
FILES = {"python": ["."], "shell": SCRIPTS}


@pytest.mark.parametrize("hook", [hook for hook in HOOKS if hook["id"] != "repository"], ids=lambda hook: hook["id"])
def test_linter(hook: dict[str, Any]) -> None:
    program, *arguments = hook["entry"].split()
    program = str(Path(sys.executable).parent / program.removeprefix(".venv/bin/"))
    names = [name for kind in hook.get("types", []) for name in FILES[kind]]
    command = [program, *arguments, *names]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120)
    assert done.returncode == 0, "\n" + done.stdout


def test_there_is_something_to_lint() -> None:
    assert {hook["id"] for hook in HOOKS} >= {"ruff-check", "ruff-format", "shellcheck", "imports", "repository"}
    assert len(SCRIPTS) >= 6


def test_settings_and_launcher_need_the_standard_library_alone() -> None:
    """They run before anything is installed."""
    modules = ["disagg_prefill_lmcache_v1.settings", "disagg_prefill_lmcache_v1.launch.profiles"]
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {', '.join(modules)}"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
