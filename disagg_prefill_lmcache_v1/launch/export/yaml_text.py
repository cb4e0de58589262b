"""YAML of plain data, in block style: dictionaries, lists, texts, numbers, true, false and null. No library needed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

# What needs no quotes in any YAML version: no number, no word with a meaning, no sign that begins something.
_PLAIN = re.compile(r"[A-Za-z/][\w./@-]*(:[\w./@-]+)*( [\w./@-]+)*")
_WORDS = {"true", "false", "yes", "no", "on", "off", "y", "n", "null", "none"}


def dump(value: Any) -> str:
    """One document."""
    return "\n".join(_lines(value)) + "\n"


def dump_all(values: list[Any], comment: str = "") -> str:
    """Several documents in one file, a comment before the first."""
    head = "".join(f"# {line}\n" for line in comment.splitlines())
    return head + "---\n".join(dump(value) for value in values)


def _scalar(value: Any) -> str:
    if isinstance(value, str) and (not _PLAIN.fullmatch(value) or value.lower() in _WORDS):
        return json.dumps(value, ensure_ascii=False)
    return value if isinstance(value, str) else json.dumps(value)


def _lines(value: Any) -> Iterator[str]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            if isinstance(item, (dict, list, tuple)) and item:
                yield f"{_scalar(key)}:"
                yield from (f"  {line}" for line in _lines(item))
            else:
                yield f"{_scalar(key)}: {next(_lines(item))}"
    elif isinstance(value, (list, tuple)) and value:
        for item in value:
            first, *rest = _lines(item)
            yield f"- {first}"
            yield from (f"  {line}" for line in rest)
    elif isinstance(value, (dict, list, tuple)):
        yield "{}" if isinstance(value, dict) else "[]"
    else:
        yield _scalar(value)
