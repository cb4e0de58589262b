"""The launcher's messages: failures, progress, passwords."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from disagg_prefill_lmcache_v1.launch import messages
from disagg_prefill_lmcache_v1.launch.messages import (
    Console,
    Failure,
    Interrupted,
    Progress,
    UsageError,
    exit_status,
    mask_passwords,
)

ROOT = Path(__file__).resolve().parents[2]


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_comes_after_5_seconds_and_then_every_10(capsys: pytest.CaptureFixture[str]) -> None:
    now = 100.0
    progress = Progress(clock=lambda: now)
    for second in (1, 4, 5, 6, 12, 15, 16):
        now = 100.0 + second
        progress.show("waiting for decoder")
    assert capsys.readouterr().err.splitlines() == [f"[disagg] waiting for decoder: {second} s" for second in (5, 15)]


def test_on_a_terminal_progress_is_one_live_line(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = FakeTerminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    now = 0.0
    with Progress(clock=lambda: now) as progress:
        progress.show("waiting")
        now = 1.0
        progress.show("waiting")
        messages.info("ready")
    assert terminal.getvalue() == ("\r\033[K[disagg] waiting: 0 s\r\033[K[disagg] waiting: 1 s\n[disagg] ready\n")


@pytest.mark.parametrize(
    ("failure", "line"),
    [
        (Failure("the decoder died"), "[disagg] error: the decoder died"),
        (Failure("it died", Path("a.log")), "[disagg] error: it died (log: a.log)"),
        (UsageError("--kv-port 0: allowed: 1"), "[disagg] usage: --kv-port 0: allowed: 1 (see --help)"),
        (Failure("redis://u:s3cret@h:1 is gone"), "[disagg] error: redis://u:***@h:1 is gone"),
    ],
)
def test_a_failure_is_one_line(failure: Failure, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    Console().report(failure)
    assert capsys.readouterr().err == line + "\n"


@pytest.mark.parametrize(
    ("raised", "status", "line"),
    [
        (None, 0, ""),
        (Failure("cause"), 1, "[disagg] error: cause\n"),
        (UsageError("cause"), 2, "[disagg] usage: cause (see --help)\n"),
        (FileNotFoundError(2, "No such file", "x"), 1, "[disagg] error: [Errno 2] No such file: 'x'\n"),
        (Interrupted(15), 143, ""),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_the_exit_status_of_a_main_function(
    raised: BaseException | None, status: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> int:
        if raised:
            raise raised
        return 0

    assert exit_status(main) == status
    assert capsys.readouterr().err == line


def test_a_failure_is_told_once_with_what_its_log_tells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "decoder.log"
    log.write_text("begin\nValueError: redis://u:s3cret@h:1 does not answer\nend\n")
    failure = Failure("decoder died", log)
    Console().report(failure)
    Console().report(failure)
    assert capsys.readouterr().err.splitlines() == [
        f"[disagg] cause, from {log}:",
        "    ValueError: redis://u:***@h:1 does not answer",
        f"[disagg] last lines of {log}:",
        "    begin",
        "    ValueError: redis://u:***@h:1 does not answer",
        "    end",
        f"[disagg] error: decoder died (log: {log})",
    ]


@pytest.mark.parametrize("statement", ["print('a' * 100_000)", "messages.info('text')"])
def test_an_output_that_nobody_reads_ends_the_program_without_noise(statement: str) -> None:
    code = f"from disagg_prefill_lmcache_v1.launch import messages\ndef main():\n    {statement}\n"
    code += "raise SystemExit(messages.exit_status(main))"
    reading, writing = os.pipe()
    os.close(reading)
    where = {"stderr": writing} if "info" in statement else {"stdout": writing, "stderr": subprocess.PIPE}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, check=False, **where)
    os.close(writing)
    assert (done.returncode, done.stderr or b"") == (141, b"")


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("redis://user:s3cret@h:1/0", "redis://user:***@h:1/0"),
        ("rediss://:s3:cr/e@t@h:1", "rediss://:***@h:1"),
        ("redis://h:1/0?password=s3cret&x=1", "redis://h:1/0?password=***&x=1"),
        ("{'remote_url': 'redis://:s3cret@h:1', 'a': 'b@c'}", "{'remote_url': 'redis://:***@h:1', 'a': 'b@c'}"),
        ("lm://127.0.0.1:8300 a@b", "lm://127.0.0.1:8300 a@b"),
    ],
)
def test_passwords_are_masked(text: str, masked: str) -> None:
    assert mask_passwords(text) == masked
