"""How long files, functions and classes may be. Tests are not limited; of them only the bash is counted."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FILE, FUNCTION, CLASS, README, BASH = 450, 60, 250, 200, 250  # lines


def files() -> dict[str, str]:
    """Text of every Python and bash file and of the README; what a run leaves behind is not among them."""
    found = {}
    for path in sorted(ROOT.rglob("*")):
        name = path.relative_to(ROOT)
        if any(part == "runs" or (part.startswith(".") and part != ".ci") for part in name.parts) or path.is_dir():
            continue
        if path.suffix in (".py", ".sh") or name.as_posix() == "README.md" or not path.suffix:
            text = path.read_text(encoding="utf-8", errors="replace")
            if path.suffix or text.startswith("#!/usr/bin/env bash"):
                found[name.as_posix()] = text
    return found


def lengths(name: str, text: str) -> Iterator[tuple[str, int, int]]:
    """What there is in a file, its lines, and how many are allowed."""
    if name == "README.md":
        yield name, text.count("\n"), README
    elif name.endswith(".py") and not name.startswith("tests/"):
        yield name, text.count("\n"), FILE
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                limit = CLASS if isinstance(node, ast.ClassDef) else FUNCTION
                yield f"{name}:{node.lineno} {node.name}", (node.end_lineno or 0) - node.lineno + 1, limit


def test_nothing_is_too_long() -> None:
    counted = [(name, *length) for name, text in files().items() for length in lengths(name, text)]
    assert len(counted) > 500
    found = [f"{what}: {lines} lines, at most {limit}" for _, what, lines, limit in counted if lines > limit]
    assert not found, "\n" + "\n".join(found)


def test_there_is_little_bash() -> None:
    counted = {name: text.count("\n") for name, text in files().items() if not name.endswith((".py", ".md"))}
    assert "disagg_prefill_lmcache_v1/disagg_example_gaudi_lm.sh" in counted
    assert ".ci/run" in counted
    assert sum(counted.values()) <= BASH, counted
