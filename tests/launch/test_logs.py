"""What is shown of a failed server's log. The excerpts in logs/ are vLLM 0.32's, with frames and paths cut."""

from __future__ import annotations

from pathlib import Path

import pytest

from disagg_prefill_lmcache_v1.launch.logs import LINE_LIMIT, explain, root_cause, start_problem

EXCERPTS = Path(__file__).parent / "logs"
IMPORT_ERROR = "ImportError: libucp.so.0: cannot open shared object file: No such file or directory"
NO_ROOM = "ValueError: To serve at least one request with the model's max seq len (4096), (0.03 GiB KV cache is needed"


@pytest.mark.parametrize(
    ("name", "cause", "will_not_start"),
    [
        ("bad_flag", "api_server.py: error: unrecognized arguments: --no-such-flag", False),
        ("bad_len", "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig", False),
        ("connector_raises", IMPORT_ERROR, True),
        ("tp2_raises", IMPORT_ERROR, True),
        ("scheduler_raises", IMPORT_ERROR, True),
        ("hanging", IMPORT_ERROR, True),  # these two went on for ever: a thread of the engine was left
        ("kv_small", NO_ROOM, True),
    ],
)
def test_the_cause_of_real_failures(name: str, cause: str, will_not_start: bool) -> None:
    log = EXCERPTS / f"{name}.log"
    lines = log.read_text().splitlines()
    found = root_cause(lines)
    assert found[0].startswith(cause)
    assert not any("root cause" in line for line in found)
    problem = start_problem(log)
    assert problem.startswith(cause) if will_not_start else problem == ""
    shown = explain(log)
    assert shown[0] == f"cause, from {log}:"
    assert shown[1].strip().startswith(cause)
    assert shown[-1].strip() == lines[-1].strip()[:LINE_LIMIT]


def test_the_cause_may_have_further_lines() -> None:
    found = root_cause((EXCERPTS / "bad_len.log").read_text().splitlines())
    assert len(found) == 2
    assert found[1].strip().startswith("Value error, User-specified max_model_len (99999999) is greater than")


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("", []),
        ("all is well\nstill well", []),
        ("kv_shm_server: --size 900000gb: 10 MiB of memory are available", ["kv_shm_server: --size 900000gb: 10 MiB"]),
        ("ERROR:    [Errno 98] address already in use\nINFO:     Waiting", ["[Errno 98] address already in use"]),
        ("Fatal Python error: Segmentation fault\n\nThread 1", ["Fatal Python error: Segmentation fault"]),
        ("terminate called\n  what():  std::bad_alloc", ["  what():  std::bad_alloc"]),
        ("a.B.C.XError: one\nDuring handling\nYError: two", ["YError: two"]),
        (
            "torch.OutOfMemoryError: no room\nException: WorkerProc initialization failed",
            ["torch.OutOfMemoryError: no"],
        ),
        # What dies after the cause was told is noise.
        ("XError: cause\nRuntimeError: See root cause above\nAttributeError: noise", ["XError: cause"]),
        ("XError: cause\nKeyboardInterrupt\nasyncio.exceptions.CancelledError", ["XError: cause"]),
        ("RuntimeError: See root cause above\nXError: later", ["XError: later"]),
        ("[2026-11-25 01:02:03,456] LMCache ERROR: no store (a.py:1:b)", ["no store (a.py:1:b)"]),
        ("(EngineCore pid=1) ERROR 11-25 01:02:03 [a.py:1] KeyError: 'x'\n(EngineCore pid=1) INFO", ["KeyError: 'x'"]),
        ("an XError: in a sentence", []),
    ],
)
def test_the_cause(text: str, cause: list[str]) -> None:
    found = root_cause(text.splitlines())
    assert len(found) == len(cause)
    assert all(line.startswith(start) for line, start in zip(found, cause, strict=True))


def test_a_log_without_a_cause_shows_its_end(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    assert explain(log) == []
    log.write_text("")
    assert explain(log) == []
    log.write_bytes(b"".join(b"line %d \xff\n" % number for number in range(100)))
    assert explain(log) == [f"last lines of {log}:", *(f"    line {number} \ufffd" for number in range(85, 100))]


def test_a_long_log_is_read_from_its_end(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    with log.open("w") as file:
        file.write("XError: long ago\n" + ("x" * 1000 + "\n") * 6000)
        file.write("YError: " + "y" * 1000 + "\n")
    assert explain(log)[1] == "    YError: " + "y" * (LINE_LIMIT - 8)
