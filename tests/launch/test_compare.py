"""``--compare`` of the example, with stand-in servers and steps (tests/helpers/standins)."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from launch_harness import EXAMPLE, LAUNCHER, Launch, option, parse_dry_run, wait_until

# No KV server: its port would have to be free of old connections for a minute, which a busy machine does not promise.
NO_SERVER = "--kv-url=lm://127.0.0.1:1"
STEPS = ("check", "plain", "pair", "result")


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    launch = Launch(tmp_path)
    yield launch
    launch.kill_leftovers()


def commands(launch: Launch, *flags: str, device: str = "cpu") -> dict[str, tuple[dict[str, str], list[str]]]:
    done = launch.run(EXAMPLE, *launch.arguments("--compare", "--dry-run", *flags, device=device))
    assert done.returncode == 0, done.stderr
    return parse_dry_run(done.stdout)


def test_both_arms_run_one_after_the_other(launch: Launch) -> None:
    launch.run_dir.mkdir()
    old = launch.run_dir / "compare.json"
    old.write_text("{}")
    done = launch.run(
        EXAMPLE, *launch.arguments("--compare", NO_SERVER, "--request-rate=1,2", "--goodput", "ttft:500", "tpot:15")
    )
    assert done.returncode == 0, done.stderr
    assert not old.exists()  # it would pass for this run's
    order = ["plain is ready", "plain2 is ready", "prefiller is ready", "decoder is ready", "done;"]
    places = [done.stderr.index(line) for line in order]
    assert max(places[:2]) < min(places[2:4]) < places[4]
    for log in ("plain", "plain2", "plain_proxy", "prefiller", "decoder", "proxy"):
        assert "stand-in" in (launch.run_dir / f"{log}.log").read_text()
    times = [(launch.records / f"compare-{step}.json").stat().st_mtime for step in STEPS]
    assert times == sorted(times)
    words = launch.record("compare-pair")["argv"]
    assert option(words, "--request-rate") == "1,2"
    assert words[words.index("--goodput") + 1 :] == ["ttft:500", "tpot:15"]
    assert words == [word.replace("plain", "pair") for word in launch.record("compare-plain")["argv"]]  # the same load
    assert option(launch.record("load")["argv"], "--num-prompts") == "0"  # the probe


def test_plain_servers_are_the_same_without_the_connector(launch: Launch) -> None:
    made = commands(launch, "--backend=mp", "--prefillers=2", "--", "--seed", "7")
    pairs = {"plain": "prefiller", "plain2": "prefiller2", "plain3": "decoder"}
    for plain, server in pairs.items():
        environment, words = made[plain]
        own_environment, own_words = made[server]
        flags = ("--kv-transfer-config", "--middleware")
        of_connector = [place for place, word in enumerate(own_words) if word in flags]
        assert len(of_connector) == 3
        for place in reversed(of_connector):
            del own_words[place : place + 2]
        assert words == own_words  # port, block size and the caller's own arguments too
        assert environment.items() <= own_environment.items()
        assert "DISAGG_KV_VISIBILITY" not in environment
        assert "LMCACHE_CONFIG_FILE" not in environment
    words = made["plain-proxy"][1]
    assert "--decode-only" in words
    assert "--prefiller" not in words
    assert [words[place + 1] for place, word in enumerate(words) if word == "--decoder"] == [
        f"http://127.0.0.1:{option(made[name][1], '--port')}" for name in pairs
    ]


def test_plain_servers_take_the_same_cards(launch: Launch) -> None:
    made = commands(launch, "--tensor-parallel-size=2", device="cuda")
    for plain, server in (("plain", "prefiller"), ("plain2", "decoder")):
        assert made[plain][0]["CUDA_VISIBLE_DEVICES"] == made[server][0]["CUDA_VISIBLE_DEVICES"]
    assert made["plain"][0]["CUDA_VISIBLE_DEVICES"] != made["plain2"][0]["CUDA_VISIBLE_DEVICES"]


@pytest.mark.parametrize("step", ["plain", "pair"])
def test_the_interrupt_key_leaves_nothing_running(launch: Launch, step: str) -> None:
    process = launch.start(
        EXAMPLE, *launch.arguments("--compare", NO_SERVER), STANDIN_LOAD_SECONDS=f"compare-{step}:300"
    )
    wait_until(lambda: launch.has_record(f"compare-{step}") or process.poll() is not None, f"step {step} runs", 120)
    process.send_signal(signal.SIGINT)
    done = launch.finish(process)  # which looks for leftovers
    assert done.returncode == 130, done.stderr
    assert launch.has_record("compare-pair") == (step == "pair")


@pytest.mark.parametrize(
    ("step", "status", "ends_with", "said"),
    [
        ("check", 2, 2, "the load of the comparison is refused"),
        ("plain", 1, 1, "step plain of the comparison failed (exit status 1"),
        ("result", 1, 1, "step result of the comparison failed (exit status 1"),
    ],
)
def test_a_step_that_fails_ends_it(launch: Launch, step: str, status: int, ends_with: int, said: str) -> None:
    done = launch.run(
        EXAMPLE, *launch.arguments("--compare", NO_SERVER), STANDIN_LOAD_STATUS=f"compare-{step}:{status}"
    )
    assert done.returncode == ends_with
    assert said in done.stderr
    later = STEPS[STEPS.index(step) + 1 :]
    assert not any(launch.has_record(f"compare-{each}") for each in later)
    assert ("starting plain" in done.stderr) == (step != "check")  # refused before any server is started


def test_a_probe_that_fails_ends_it(launch: Launch) -> None:
    done = launch.run(EXAMPLE, *launch.arguments("--compare", NO_SERVER), STANDIN_LOAD_STATUS="load:1")
    assert done.returncode == 1
    assert "comparing answers with one server's failed" in done.stderr
    assert not launch.has_record("compare-pair")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--workload=azure-code"], "--workload goes with --compare"),
        (["--goodput", "ttft:5"], "--goodput goes with --compare"),
        (["--sweep"], "--sweep goes with --compare"),
        (["--request-rate=1,2"], "--request-rate: several rates go with --compare"),
        (["--compare", "--serve"], "--compare and --serve: allowed: one of them"),
        (["--compare", "--num-prompts=0"], "--num-prompts 0: --compare needs requests"),
        (["--compare", "--sweep", "--request-rate=1"], "--sweep and --request-rate: allowed: one of them"),
        (["--compare", "--goodput", "itl:5"], "--goodput 'itl:5': allowed: ttft:MS, tpot:MS, e2el:MS"),
        (["--compare", "--goodput"], "--goodput needs a value"),
        (["--compare", "--burstiness=0"], "--burstiness 0: allowed: a number above 0"),
        (["--compare", "--input-len=8000", "--output-len=200"], "is more than --max-model-len 8192"),
    ],
)
def test_settings_that_do_not_fit_together(launch: Launch, flags: list[str], said: str) -> None:
    done = launch.run(EXAMPLE, *launch.arguments(*flags))
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_server_takes_no_part_of_it(launch: Launch) -> None:
    done = launch.run(LAUNCHER, "decoder", *launch.arguments("--dry-run"), DISAGG_GOODPUT="ttft:5 tpot:6")
    assert done.returncode == 0, done.stderr
