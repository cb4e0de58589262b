"""Servers on several machines, and several servers of a role on one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from launch_harness import EXAMPLE, LAUNCHER, Launch, free_ports_in_a_row, option, parse_dry_run

from disagg_prefill_lmcache_v1.settings import authority, is_loopback


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    launch = Launch(tmp_path)
    yield launch
    launch.kill_leftovers()


def command(launch: Launch, role: str, *flags: str, **environment: str) -> tuple[dict[str, str], list[str]]:
    """Environment and words of one server that the launcher would start."""
    done = launch.run(LAUNCHER, role, "--dry-run", *launch.arguments(*flags), **environment)
    assert done.returncode == 0, done.stderr
    return parse_dry_run(done.stdout)[role]


def values(words: list[str], flag: str) -> list[str]:
    return [words[index + 1] for index, word in enumerate(words) if word == flag]


def test_servers_on_three_machines_name_each_other(launch: Launch) -> None:
    listen = "--host=0.0.0.0"
    for role in ("prefiller", "decoder"):
        environment, words = command(launch, role, listen, "--kv-url=lm://10.0.0.4:8300")
        assert option(words, "--host") == "0.0.0.0"
        assert environment["LMCACHE_REMOTE_URL"] == "lm://10.0.0.4:8300"
    assert command(launch, "kv-server", listen)[1][-2:] == ["0.0.0.0", str(launch.ports["kv"])]
    prefillers = ["http://10.0.0.1:8100", "https://[fd00::1]:8100"]
    flags = [f"--prefiller-url={url}" for url in prefillers]
    words = command(launch, "proxy", listen, *flags, "--decoder-url=http://b:1,http://c:1")[1]
    assert option(words, "--host") == "0.0.0.0"
    assert values(words, "--prefiller") == prefillers
    assert values(words, "--decoder") == ["http://b:1", "http://c:1"]


def test_what_listens_everywhere_is_reached_by_the_loopback_address(launch: Launch) -> None:
    words = command(launch, "proxy", "--host=0.0.0.0")[1]
    assert values(words, "--decoder") == [f"http://127.0.0.1:{launch.ports['decoder']}"]
    words = command(launch, "proxy", "--host=::")[1]
    assert values(words, "--decoder") == [f"http://[::1]:{launch.ports['decoder']}"]
    assert command(launch, "decoder", "--host=0.0.0.0")[0]["LMCACHE_REMOTE_URL"].startswith("lm://127.0.0.1:")


def test_nixl_servers_tell_where_others_reach_them(launch: Launch) -> None:
    port = launch.ports["kv"]
    for index, role in enumerate(("prefiller", "decoder")):
        there = command(launch, role, "--backend=nixl", "--host=0.0.0.0", "--advertise-host=10.0.0.7")[0]
        here = command(launch, role, "--backend=nixl")[0]
        for environment, host, devices in ((there, "10.0.0.7", "all"), (here, "127.0.0.1", "lo")):
            assert environment["VLLM_NIXL_SIDE_CHANNEL_HOST"] == host
            assert environment["VLLM_NIXL_SIDE_CHANNEL_PORT"] == str(port + index)
            assert environment["UCX_NET_DEVICES"] == devices


def test_the_example_starts_as_many_servers_as_asked(launch: Launch) -> None:
    first = {"prefiller": free_ports_in_a_row(2), "decoder": free_ports_in_a_row(3), "kv": free_ports_in_a_row(6)}
    launch.ports |= first
    flags = ["--prefillers=2", "--decoders=3", "--tensor-parallel-size=2"]
    done = launch.run(EXAMPLE, "--dry-run", *launch.arguments(*flags, device="cuda"))
    assert done.returncode == 0, done.stderr
    commands = parse_dry_run(done.stdout)
    names = ["prefiller", "prefiller2", "decoder", "decoder2", "decoder3"]
    assert [name for name in commands if name.startswith(("prefiller", "decoder"))] == names
    cards = [commands[name][0]["CUDA_VISIBLE_DEVICES"] for name in names]
    assert cards == ["0,1", "2,3", "4,5", "6,7", "8,9"]
    ports = [int(option(commands[name][1], "--port")) for name in names]
    assert ports == [*(first["prefiller"] + i for i in range(2)), *(first["decoder"] + i for i in range(3))]
    proxy, load = commands["proxy"][1], commands["load"][1]
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    assert values(proxy, "--prefiller") + values(proxy, "--decoder") == urls
    assert values(load, "--prefiller-url") + values(load, "--decoder-url") == [urls[0], *urls[2:]]
    assert len({commands[name][0]["DISAGG_KV_VISIBILITY"] for name in names}) == 5


def test_the_example_runs_several_servers_to_its_end(launch: Launch) -> None:
    launch.ports |= {"prefiller": free_ports_in_a_row(2), "decoder": free_ports_in_a_row(2)}
    done = launch.run(EXAMPLE, *launch.arguments("--prefillers=2", "--decoders=2"))
    assert done.returncode == 0, done.stderr
    for role in ("prefiller", "decoder"):
        for number in range(2):
            assert launch.has_record(f"vllm-{launch.ports[role] + number}")
    assert (launch.run_dir / "decoder2.log").exists()
    assert "decoder2 is ready" in done.stderr


@pytest.mark.parametrize(
    ("role", "flags", "said"),
    [
        ("", ["--decoder-url=http://b:1"], "--decoder-url: the example starts its servers itself"),
        ("proxy", ["--decoder-url=b:1"], "--decoder-url 'b:1': allowed: http://HOST:PORT or https://HOST:PORT"),
        ("proxy", ["--host=a b"], "--host 'a b': allowed: an address or a name"),
        ("decoder", ["--decoders=2"], "--decoders is the example's"),
        ("decoder", ["--kv-url=redis://h:1"], "--kv-url: --backend lm allows lm://HOST:PORT"),
        ("decoder", ["--kv-url=lm://h"], "--kv-url: --backend lm allows lm://HOST:PORT"),
        ("decoder", ["--backend=mp", "--kv-url=mp://h:1"], "the server of --backend mp must run on the machine of"),
        ("kv-server", ["--backend=mp", "--host=0.0.0.0"], "the server of --backend mp is for this machine alone"),
        ("kv-server", ["--backend=redis", "--host=0.0.0.0"], "is for this machine alone (another Redis: --kv-url)"),
        ("prefiller", ["--backend=nixl", "--host=0.0.0.0"], "with --backend nixl needs --advertise-host"),
        ("prefiller", ["--backend=nixl", "--kv-url=nixl://h:1"], "with --backend nixl there is no KV server"),
        ("", ["--backend=nixl", "--save-decode-cache"], "--save-decode-cache is not supported with --backend nixl"),
        ("decoder", ["--backend=mp", "--save-decode-cache"], "--save-decode-cache is not supported with --backend mp"),
        ("decoder", ["--advertise-host=0.0.0.0"], "--advertise-host 0.0.0.0: allowed: what other machines"),
        ("decoder", ["--backend=redis", "--kv-url=redis://h:1", "--redis-url=redis://h:1"], "are the same setting"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(launch: Launch, role: str, flags: list[str], said: str) -> None:
    script = (LAUNCHER, role) if role else (EXAMPLE,)
    done = launch.run(*script, *launch.arguments(*flags))
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert list(launch.records.iterdir()) == []


def test_servers_must_have_ports_of_their_own(launch: Launch) -> None:
    first = launch.ports["prefiller"] = free_ports_in_a_row(2)
    launch.ports["decoder"] = first + 1
    done = launch.run(EXAMPLE, *launch.arguments("--prefillers=2"))
    assert done.returncode == 2
    assert f"--decoder-port {first + 1} is one of the 2 ports from --prefiller-port {first} on" in done.stderr


@pytest.mark.parametrize(
    ("host", "environment", "flags", "told"),
    [
        ("127.0.0.1", {}, [], False),
        ("0.0.0.0", {}, [], True),
        ("0.0.0.0", {"VLLM_API_KEY": "secret"}, [], False),
        ("0.0.0.0", {}, ["--", "--api-key=secret"], False),
    ],
)
def test_what_others_reach_without_a_key_says_so(
    launch: Launch, host: str, environment: dict[str, str], flags: list[str], told: bool
) -> None:
    # No KV server answers, so nothing is started; the line comes before that is found.
    done = launch.run(LAUNCHER, "decoder", *launch.arguments(f"--host={host}", *flags), **environment)
    assert done.returncode == 1
    line = f"decoder listens on {host}:{launch.ports['decoder']} without TLS or a key"
    assert (done.stderr.count(line) == 1) is told, done.stderr
    assert "secret" not in done.stderr


def test_the_store_that_is_named_must_answer(launch: Launch) -> None:
    done = launch.run(LAUNCHER, "decoder", *launch.arguments(f"--kv-url=lm://127.0.0.1:{launch.ports['kv']}"))
    assert done.returncode == 1
    assert f"no KV server answers at lm://127.0.0.1:{launch.ports['kv']}" in done.stderr


def test_loopback_addresses() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.1.2.3", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "node-1", "")))
    assert [authority("::1", 1), authority("a", 2)] == ["[::1]:1", "a:2"]
