"""Settings declared once: flags, environment, fallback, errors, the documentation table."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import pytest

from disagg_prefill_lmcache_v1 import settings
from disagg_prefill_lmcache_v1.settings import SettingsError, load, parser_of, resolve, setting, table, validate


@dataclass(frozen=True)
class Example:
    """A field of each kind."""

    name: str = setting("", "a name", pattern=r"[a-z]+", allowed="lower case letters")
    port: int = setting(8000, "a port", low=1, high=65535)
    rate: float = setting(1.0, "a rate", above=0)
    colour: str = setting("red", "a colour", choices=("red", "blue"), aliases=("--color",))
    urls: tuple[str, ...] = setting((), "several")
    loud: bool = setting(False, "a switch")
    log: bool = setting(True, "a switch that is on")
    folder: Path | None = setting(None, "a folder", kind="path", aliases=("--dir",))
    goals: tuple[str, ...] = setting((), "words", kind="words", pattern=r"[a-z]+:[0-9]+", allowed="NAME:N")
    rates: tuple[float, ...] = setting((1.5,), "rates", kind="numbers", above=0)
    hidden: int = setting(2, "environment only", flag=False, env="HIDDEN_NUMBER", low=0)
    computed: str = "not a setting"

    def __post_init__(self) -> None:
        validate(self)


def read(*argv: str, **environ: str) -> Example:
    return load(Example, argv, environ, prefix="TEST_", prog="example")


def test_flag_then_environment_then_fallback_then_default() -> None:
    parser = parser_of(Example, prefix="TEST_")
    given = vars(parser.parse_args(["--port", "1"]))
    found = resolve(
        Example,
        given,
        {"TEST_PORT": "2", "TEST_COLOUR": "blue", "HIDDEN_NUMBER": "7", "TEST_NAME": ""},
        prefix="TEST_",
        fallback={"COLOUR": "red", "RATE": "2.5", "NAME": "abc"},
        fallback_name="profile ",
    )
    assert found.values == {
        **{field.name: field.default for field in dataclasses.fields(Example) if field.name != "computed"},
        "port": 1, "colour": "blue", "rate": 2.5, "hidden": 7, "name": "abc",
    }  # fmt: skip
    assert (found.sources["port"], found.sources["colour"]) == ("--port", "TEST_COLOUR")
    assert (found.sources["rate"], found.sources["loud"]) == ("profile RATE", "")


def test_kinds() -> None:
    example = read("--urls", "a,b", "--urls", "c", "--loud", "--log", "false", "--dir", "/x", "--name", "abc")
    assert (example.urls, example.loud, example.log) == (("a", "b", "c"), True, False)
    assert (example.folder, example.name) == (Path("/x"), "abc")
    assert read(TEST_URLS="a, b", TEST_LOUD="yes").urls == ("a", "b")
    assert read("--log").log is True
    assert read("--goals", "a:1", "b:2", "--loud").goals == read(TEST_GOALS="a:1 b:2").goals == ("a:1", "b:2")
    assert read("--rates", "1,2.5").rates == read(TEST_RATES="1, 2.5").rates == (1.0, 2.5)
    assert read().rates == (1.5,)


@pytest.mark.parametrize(
    ("argv", "environ", "text"),
    [
        (["--port", "70000"], {}, "--port '70000': allowed: a whole number from 1 to 65535"),
        (["--port", "1.5"], {}, "--port '1.5': allowed: a whole number from 1 to 65535"),
        ([], {"TEST_PORT": "x"}, "TEST_PORT 'x': allowed: a whole number from 1 to 65535"),
        (["--rate", "0"], {}, "--rate 0: allowed: a number above 0"),
        (["--rate", "nan"], {}, "--rate 'nan': allowed: a number above 0"),
        (["--colour", "green"], {}, "--colour 'green': allowed: red, blue"),
        (["--name", "A1"], {}, "--name 'A1': allowed: lower case letters"),
        (["--goals", "a:1", "b"], {}, "--goals 'a:1,b': allowed: NAME:N"),
        (["--rates", "1,0"], {}, "--rates 0: allowed: a number above 0, or several with commas"),
        (["--rates", "1,x"], {}, "--rates '1,x': allowed: a number above 0, or several with commas"),
        (["--log", "maybe"], {}, "--log 'maybe': allowed: true, false"),
        ([], {"HIDDEN_NUMBER": "-1"}, "HIDDEN_NUMBER '-1': allowed: a whole number from 0 on"),
    ],
)
def test_a_bad_value_names_its_source_and_what_is_allowed(argv, environ, text) -> None:
    with pytest.raises(SettingsError) as caught:
        read(*argv, **environ)
    assert str(caught.value) == text


def test_a_bad_value_by_code_is_refused_too() -> None:
    with pytest.raises(SettingsError, match="--colour 'green'"):
        Example(colour="green")
    with pytest.raises(SettingsError, match="--rate inf"):
        Example(rate=float("inf"))


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--no-such"], "example: error: unknown flag --no-such (see --help)\n"),
        (["--port"], "example: error: --port needs a value (see --help)\n"),
        (["--goals"], "example: error: --goals needs a value (see --help)\n"),
        (["--loud=1"], "example: error: --loud takes no value (see --help)\n"),
        (["word"], "example: error: unexpected argument 'word' (see --help)\n"),
        (["--hidden", "1"], "example: error: unknown flag --hidden (see --help)\n"),
        (["--por", "1"], "example: error: unknown flag --por (see --help)\n"),
    ],
)
def test_a_wrong_command_line_is_one_line(argv, text, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        read(*argv)
    assert (caught.value.code, capsys.readouterr().err) == (2, text)


def test_help_and_table_have_every_setting() -> None:
    text = parser_of(Example, prefix="TEST_").format_help()
    rows = table(Example, prefix="TEST_")
    for field in dataclasses.fields(Example):
        if field.name == "computed":
            assert settings.flag_of(field.name) not in rows
        elif field.metadata["flag"]:
            assert settings.flag_of(field.name) in text
            assert f"`{settings.flag_of(field.name)}`" in rows
    assert "| `--folder`, `--dir` | `TEST_FOLDER` |  | a folder |" in rows
    assert "| `HIDDEN_NUMBER` | `2` | environment only |" in rows
    assert "| `--log` | `TEST_LOG` | `true` | a switch that is on |" in rows
