"""Settings of the proxy: flags, environment, validation. No server is started except to see exit statuses."""

from __future__ import annotations

import dataclasses
import json
import socket
import subprocess
import sys

import proxy_harness
import pytest

from disagg_prefill_lmcache_v1.proxy.settings import ENV_PREFIX, Settings, build_parser, load_settings, parse_url
from disagg_prefill_lmcache_v1.settings import SettingsError, env_of, flag_of

FIELDS = dataclasses.fields(Settings)


def test_defaults_are_the_documented_ones() -> None:
    settings = load_settings([], {})
    assert settings == Settings()
    assert (settings.host, settings.port) == ("127.0.0.1", 8000)
    assert settings.prefiller_urls == ("http://127.0.0.1:8100",)
    assert settings.decoder_urls == ("http://127.0.0.1:8200",)


def test_flag_wins_over_environment() -> None:
    environ = {"DISAGG_PROXY_PORT": "9001", "DISAGG_PROXY_DECODER": "http://a:1, http://b:2"}
    assert load_settings([], environ).port == 9001
    assert load_settings(["--port", "9002"], environ).port == 9002
    assert load_settings([], environ).decoder_urls == ("http://a:1", "http://b:2")
    assert load_settings(["--decoder", "http://c:3", "--decoder", "http://d:4"], environ).decoder_urls == (
        "http://c:3",
        "http://d:4",
    )


def test_every_field_is_in_the_help() -> None:
    text = " ".join(build_parser().format_help().split())
    for field in FIELDS:
        assert flag_of(field.name) + " " in text
    assert env_of(next(field for field in FIELDS if field.name == "max_body_bytes"), ENV_PREFIX) in text


@pytest.mark.parametrize(
    "argv",
    [
        ["--port", "70000"],
        ["--port", "x"],
        ["--workers", "0"],
        ["--prefill-failure", "maybe"],
        ["--decode-only", "--prefiller", "http://a:1"],
        ["--prefill-timeout-s", "nan"],
        ["--connect-timeout-s", "-1"],
        ["--prefiller", "ftp://a"],
        ["--decoder", "http://"],
        ["--decoder", "http://a:99999"],
        ["--decoder", "http://a:1/path"],
        ["--access-log", "perhaps"],
        ["--ssl-keyfile", "/nowhere/key"],
        ["--upstreams-file", "/nowhere/file"],
    ],
)
def test_a_bad_value_names_flag_value_and_what_is_allowed(argv: list[str]) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(argv, {})
    text = str(caught.value)
    assert argv[0] in text
    assert "allowed" in text or "go together" in text
    assert "\n" not in text


def test_a_bad_environment_value_names_the_variable() -> None:
    with pytest.raises(SettingsError, match="DISAGG_PROXY_PORT 'x'"):
        load_settings([], {"DISAGG_PROXY_PORT": "x"})


def test_switch_forms() -> None:
    assert load_settings(["--access-log", "off"], {}).access_log is False
    assert load_settings(["--access-log"], {"DISAGG_PROXY_ACCESS_LOG": "0"}).access_log is True


def test_urls() -> None:
    assert parse_url("https://[::1]:9", "x").url == "https://[::1]:9"
    assert parse_url("http://host/", "x").port == 80


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(proxy_harness.PROXY), *argv], capture_output=True, text=True, timeout=60, check=False
    )


def test_command_line_failures_are_one_line() -> None:
    bad_flag = run("--no-such-flag")
    assert bad_flag.returncode == 2
    assert bad_flag.stderr.count("\n") == 1
    bad_value = run("--port", "70000")
    assert (bad_value.returncode, bad_value.stderr.count("\n")) == (2, 1)
    assert "0 to 65535" in bad_value.stderr
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        used = run("--port", str(taken.getsockname()[1]))
    assert (used.returncode, used.stderr.count("\n")) == (1, 1)
    assert "in use" in used.stderr


def test_bad_upstreams_file_is_refused_at_start(tmp_path) -> None:
    path = tmp_path / "upstreams.json"
    for value in ("{", "[]", json.dumps({"prefillers": [], "decoders": ["http://a:1"]})):
        path.write_text(value)
        result = run("--upstreams-file", str(path))
        assert (result.returncode, result.stderr.count("\n")) == (2, 1)
        assert "--upstreams-file" in result.stderr


def test_module_form_shows_help() -> None:
    command = [sys.executable, "-m", "disagg_prefill_lmcache_v1.disagg_proxy_server", "--help"]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, cwd=proxy_harness.REPOSITORY
    )
    assert result.returncode == 0
    assert "--prefiller-host" in result.stdout
