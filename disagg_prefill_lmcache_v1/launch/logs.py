"""What the log of a failed server tells: the line that names the cause, and the end.

vLLM's processes tell the same failure several times over: the worker raises, its engine core says that a worker failed,
the API server that its engine core did ("See root cause above"). The cause is the last exception that is not such a
follow-up.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

READ_BYTES = 4 << 20  # of the end of a log
START_BYTES = 1 << 18  # of the log of a start
TAIL_LINES = 15
CAUSE_LINES = 4  # an exception's text may have several
LINE_LIMIT = 400  # characters

# "(EngineCore pid=12) ERROR 11-25 01:02:03 [core.py:99] text", "[2026-11-25 01:02:03,456] LMCache ERROR: text"
_PREFIX = re.compile(
    r"(?:\([^()]*pid=\d+\)\s?)?"
    r"(?:(?P<level>DEBUG|INFO|WARNING|ERROR|CRITICAL)\s+\d\d-\d\d \d\d:\d\d:\d\d(?:\.\d+)? \[[^\]]*\]\s?"
    r"|\[\d{4}-\d\d-\d\d [\d:,]+\] LMCache (?P<lmcache>\w+):\s?"
    r"|(?P<uvicorn>INFO|WARNING|ERROR|CRITICAL):\s+)?"
)
_EXCEPTION = re.compile(r"(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Timeout|Interrupt|Exit|Died)(?:: .*)?")
_ERROR = re.compile(
    r"(?:[\w./-]+: )*(?:fatal (?:\w+ )?)?error: .*|[\w./-]+: --[\w-]+ .*|\s*what\(\): .*", re.IGNORECASE
)
_FOLLOW_UP = re.compile(r"root cause|stack trace|EngineDeadError|\w+ initialization failed", re.IGNORECASE)
_END = re.compile(
    r"(?:\w+\.)*(?:CancelledError|KeyboardInterrupt|SystemExit|BrokenPipeError)"
)  # what ends because others do
# Of an exception's text: not a further line.
_OTHER = re.compile(r"Traceback|During handling|The above exception|\s+For further information visit|\s+File \"")
# What vLLM says when its engine will not come up, whether its API server ends then or not.
_START_FAILED = re.compile(r"EngineCore failed to start|WorkerProc failed to start|Engine core initialization failed")


def read_end(path: Path, size: int = READ_BYTES) -> list[str]:
    """The last lines of a log; none if it cannot be read."""
    with contextlib.suppress(OSError), path.open("rb") as log:
        begin = max(log.seek(0, os.SEEK_END) - size, 0)
        log.seek(begin)
        return log.read(size).decode(errors="replace").splitlines()
    return []


def root_cause(lines: Sequence[str]) -> list[str]:
    """The lines that name why a server failed; none if nothing looks like it."""
    stripped = [_strip(line) for line in lines]
    found: list[int] = []
    for index, (text, _) in enumerate(stripped):
        if not _EXCEPTION.fullmatch(text) or _END.match(text):
            continue
        if not _FOLLOW_UP.search(text):
            found.append(index)
        elif found:
            break  # what comes after it is the noise of the end
    if found:
        return _cut([stripped[found[-1]][0], *_continued(lines, stripped, found[-1])])
    for text, is_error in reversed(stripped):
        if text.strip() and (is_error or _ERROR.fullmatch(text)) and not _FOLLOW_UP.search(text):
            return _cut([text])
    return []


def _strip(line: str) -> tuple[str, bool]:
    """A line without what a logger has put before it, and whether that said error."""
    match = _PREFIX.match(line)
    assert match is not None  # all of it may be missing
    return line[match.end() :], bool({"ERROR", "CRITICAL"}.intersection(match.groups()))


def _continued(lines: Sequence[str], stripped: Sequence[tuple[str, bool]], index: int) -> list[str]:
    """The further lines of an exception's text: they have the same prefix as its first, or (none) are indented."""
    prefix = lines[index][: len(lines[index]) - len(stripped[index][0])]
    found = []
    for line, (text, _) in zip(lines[index + 1 :], stripped[index + 1 :], strict=True):
        same = line.startswith(prefix) if prefix else text.startswith("  ")
        if not same or not text.strip() or _EXCEPTION.fullmatch(text) or _OTHER.match(text):
            break
        found.append(text)
    return found


def _cut(lines: list[str]) -> list[str]:
    return [line[:LINE_LIMIT] for line in lines[:CAUSE_LINES]]


def start_problem(path: Path) -> str:
    """Why a vLLM server will not start, by its log; "" while there is no sign of it."""
    lines = read_end(path, START_BYTES)
    if not any(_START_FAILED.search(line) for line in lines):
        return ""
    return " ".join(" ".join(root_cause(lines)).split()) or "its engine failed"


def explain(path: Path) -> list[str]:
    """What to show of a failed program's log: the cause, then the last lines. Nothing of an empty log."""
    lines = read_end(path)
    if not lines:
        return []
    cause = root_cause(lines)
    told = [f"cause, from {path}:", *(f"    {line}" for line in cause)] if cause else []
    return [*told, f"last lines of {path}:", *(f"    {line[:LINE_LIMIT]}" for line in lines[-TAIL_LINES:])]
