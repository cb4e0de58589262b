"""The KV cache sharing scripts with a mock of vLLM: order, faults, endings, commands. No model is run here."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from launch_harness import free_ports, wait_until

from disagg_prefill_lmcache_v1.launch import kv_sharing
from disagg_prefill_lmcache_v1.launch.profiles import REPOSITORY

ROOT = Path(__file__).resolve().parents[2]
MOCKS = ROOT / "tests" / "helpers" / "mock_kv_sharing"
SCRIPT = ROOT / "kv_cache_sharing_lmcache_v1.py"
SCRIPT_TP2 = ROOT / "kv_cache_sharing_lmcache_v1_tp2.py"
MARKER = f"MOCK_RUN={uuid.uuid4().hex}"  # in the environment of all that is started here


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "mock-model"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    return directory


def environment(**more: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("DISAGG_", "MOCK_", "KV_"))}
    server = f"{{python}} {MOCKS / 'mock_kv_server.py'}"
    return {**kept, **dict([MARKER.split("=")]), "PYTHONPATH": str(MOCKS), "KV_SERVER_PROGRAM": server, **more}


def arguments(model: Path, *more: str) -> list[str]:
    return ["--device", "cpu", "--model", str(model), "--prompt-len", "700", "--max-tokens", "5", *more]


def run(model: Path, *more: str, script: Path = SCRIPT, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(script), *arguments(model, *more)],
        env=environment(**variables),
        cwd="/",
        capture_output=True,
        text=True,
        timeout=60,
    )


def processes() -> dict[str, bytes]:
    """Process id and command line of everything that this test run has started with `environment`."""
    found = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and MARKER.encode() in (entry / "environ").read_bytes():
                found[entry.name] = (entry / "cmdline").read_bytes()
    return found


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    yield
    wait_until(lambda: processes() == {}, "no process is left", 20)  # those on their way out get a moment


def test_one_stores_and_the_other_retrieves(model: Path, tmp_path: Path) -> None:
    done = run(model, "--json", str(tmp_path / "out.json"), "--log-dir", str(tmp_path / "logs"))
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    assert (result["prompt_tokens"], result["reused_tokens"]) == (700, 699)
    assert result["texts_equal"] is True
    assert result["store_text"] == result["retrieve_text"] != ""
    assert (result["recompute_s"], result["retrieve_s"], result["speed_up"]) == (0.1, 0.01, 10.0)
    assert result["recompute_reused_tokens"] == 0
    assert (result["backend"], result["tensor_parallel_size"], result["problems"]) == ("lm", 1, [])
    for text in ("699 of 700", "texts equal", "speed-up"):
        assert text in done.stdout
    assert {path.name for path in (tmp_path / "logs").iterdir()} == {"kv_server.log", "store.log", "retrieve.log"}


def test_reused_is_what_was_loaded_not_what_vllm_counts(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    done = run(model, "--json", str(out), MOCK_NOT_LOADED="retrieve:256")
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert (result["reused_tokens"], result["cached_tokens"]) == (699 - 256, 699)
    assert "443 of 700 (256 that vLLM counts as cached were not loaded)" in done.stdout
    done = run(model, "--json", str(out), MOCK_NOT_LOADED="retrieve:699")
    assert done.returncode == 1
    assert "nothing was reused" in done.stderr.splitlines()[-1]
    assert json.loads(out.read_text())["problems"] == ["nothing was reused"]


def test_texts_that_part_at_a_tie_are_told_and_no_failure(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    done = run(model, "--json", str(out), MOCK_OTHER_TEXT="retrieve", MOCK_TIE="store:0.0009")
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert (result["texts_equal"], result["problems"]) == (False, [])
    assert "log-probabilities 0.00090 apart" in result["difference"]
    assert "a tie: token 5" in done.stdout
    done = run(model, "--json", str(out), MOCK_OTHER_TEXT="retrieve", MOCK_TIE="store:0.0011")
    assert done.returncode == 1
    assert "NO: token 5" in done.stdout


def test_a_fork_of_an_engine_may_end(model: Path) -> None:
    done = run(model, MOCK_FORK="retrieve", MOCK_STORE_DELAY="store:2.5")
    assert done.returncode == 0, done.stderr


def test_the_retrieve_waits_until_all_ranks_have_stored(model: Path, tmp_path: Path) -> None:
    path = str(tmp_path / "out.json")
    done = run(model, "--json", path, script=SCRIPT_TP2, MOCK_STORE_DELAY="store:0.7")
    assert done.returncode == 0, done.stderr
    result = json.loads(Path(path).read_text())
    assert result["tensor_parallel_size"] == 2
    assert result["store_s"] >= 0.7
    done = run(model, "--timeout", "3", script=SCRIPT_TP2, MOCK_RANK_SILENT="store:1")
    assert done.returncode == 1
    assert "not visible in the store after 3 s" in done.stderr


@pytest.mark.parametrize(
    ("fault", "value", "cause"),
    [
        ("MOCK_NO_REUSE", "retrieve", "nothing was reused"),
        ("MOCK_OTHER_TEXT", "retrieve", "the two texts differ: token 5 is "),
        ("MOCK_STATE", "store:failed", "the KV cache was not stored: mock reason"),
        ("MOCK_FAIL_START", "retrieve", "the retrieve instance failed: ValueError: mock: no memory for the KV cache"),
        ("MOCK_FAIL_START", "store", "the store instance failed: ValueError: mock: no memory"),
        ("MOCK_KILL", "store", "the store process was killed by SIGKILL"),
        ("MOCK_KILL", "retrieve", "the retrieve process was killed by SIGKILL"),
    ],
)
def test_what_goes_wrong_is_named_and_ends_both(model: Path, fault: str, value: str, cause: str) -> None:
    begin = time.monotonic()
    done = run(model, **{fault: value})
    assert done.returncode == 1
    assert cause in done.stderr.splitlines()[-1]
    assert time.monotonic() - begin < 50
    assert "Traceback" not in done.stderr.splitlines()[-1]
    if fault == "MOCK_KILL":
        assert "mock: about to be killed" in done.stderr, "the log's end is not shown"


def test_an_instance_whose_engine_failed_at_start_is_noticed_though_it_goes_on(model: Path) -> None:
    done = run(model, MOCK_LINGER=f"retrieve:{Path(__file__).parent / 'logs' / 'hanging.log'}")
    assert done.returncode == 1
    assert "failed: retrieve cannot start: ImportError: libucp.so.0: cannot open" in done.stderr.splitlines()[-1]


def test_a_step_that_hangs_ends_at_its_deadline(model: Path) -> None:
    done = run(model, "--timeout", "4", MOCK_HANG="retrieve")
    assert done.returncode == 1
    assert "warming up the retrieve instance took longer than 4 s" in done.stderr


def test_an_instance_that_does_not_end_is_killed_and_the_result_stands(model: Path) -> None:
    done = run(model, MOCK_HANG_AT_END="retrieve")
    assert done.returncode == 0
    assert "the retrieve instance does not end: it is killed" in done.stderr


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_everything(model: Path, number: signal.Signals, status: int) -> None:
    with subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments(model)],
        env=environment(MOCK_HANG="store"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "both instances are ready" in line:
                break
        process.send_signal(number)
        assert process.wait(60) == status


@pytest.mark.parametrize(
    ("which", "cause"),
    [
        (b"mock_kv_server", "the kv_server process was killed by SIGKILL"),
        (b"VLLM::MockEngine", "VLLM::MockEngine of the "),
    ],
)
def test_a_killed_process_ends_the_run(model: Path, which: bytes, cause: str) -> None:
    with subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments(model)],
        env=environment(MOCK_HANG="store"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "both instances are ready" in line:
                break
        found = [pid for pid, words in processes().items() if which in words]
        assert found
        os.kill(int(found[0]), signal.SIGKILL)
        assert process.wait(60) == 1
        assert cause in process.stderr.read()


def test_a_given_server_is_used_and_must_answer(model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"lm://127.0.0.1:{server.getsockname()[1]}"
        done = run(model, "--remote-url", url, KV_SERVER_PROGRAM="must-not-be-started")
        assert done.returncode == 0, done.stderr
        used = run(model, "--kv-port", url.rpartition(":")[2])
        assert used.returncode == 2
        assert "--kv-port" in used.stderr
    done = run(model, "--remote-url", url)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"[kv-sharing] failed: no KV server answers at {url}")


def test_a_missing_or_failing_server_program_is_named(model: Path) -> None:
    done = run(model, KV_SERVER_PROGRAM="no-such-program")
    assert (done.returncode, "no-such-program is not there" in done.stderr) == (1, True)
    done = run(model, KV_SERVER_PROGRAM="false")
    assert (done.returncode, "the kv_server process ended with status 1" in done.stderr) == (1, True)


def test_redis_is_started_and_asked(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("redis")
    program = f"{sys.executable} {ROOT / 'tests' / 'helpers' / 'standins' / 'standin_server.py'} redis"
    done = run(model, "--backend", "redis", "--log-dir", str(tmp_path), REDIS_SERVER_PROGRAM=program)
    assert done.returncode == 0, done.stderr
    assert "kv_server is ready" in done.stderr
    assert "stand-in redis" in (tmp_path / "kv_server.log").read_text()
    assert "KV goes by redis://127.0.0.1:" in done.stderr


def test_a_password_is_in_no_log_and_no_argument_list(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("redis")
    (port,) = free_ports(1)
    words = [sys.executable, str(ROOT / "tests" / "helpers" / "standins" / "standin_server.py"), "redis", str(port)]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL) as server:
        try:
            wait_until(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0, "Redis up")
            url = f"redis://me:s3cret@127.0.0.1:{port}/0"
            with subprocess.Popen(
                [sys.executable, str(SCRIPT), *arguments(model, "--backend", "redis", "--log-dir", str(tmp_path))],
                env=environment(DISAGG_REMOTE_URL=url), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            ) as process:  # fmt: skip
                assert process.stdout is not None
                seen: set[bytes] = set()
                while process.poll() is None:
                    seen.update(processes().values())
                output = process.stdout.read()
        finally:
            server.kill()
    assert process.returncode == 0, output
    assert any(b"kv_sharing_instance" in line for line in seen)
    assert not [line for line in seen if b"s3cret" in line]
    for role in ("store", "retrieve"):
        assert f"role {role}, store redis://me:***@127.0.0.1:{port}/0" in (tmp_path / f"{role}.log").read_text()
    assert "s3cret" not in output + "".join(path.read_text() for path in tmp_path.glob("*.log"))


def test_a_redis_that_does_not_answer_is_named_without_its_password(model: Path) -> None:
    pytest.importorskip("redis")
    done = run(model, "--remote_server", "redis", "--remote-url", "redis://user:s3cret@127.0.0.1:9/0")
    assert done.returncode == 1
    assert "redis://user:***@127.0.0.1:9/0 does not answer PING" in done.stderr
    assert "s3cret" not in done.stderr + done.stdout


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--remote-server", "nfs"], "--remote-server"),
        (["--remote-url", "redis://h:1"], "--remote-url"),
        (["--tp_size", "0"], "--tp_size"),
        (["--kv-port", "70000"], "--kv-port"),
        (["--backend", "shm", "--kv-port", "7777"], "--kv-port: --backend shm has no port"),
        (["--prompt-len", "9000"], "--prompt-len 9000"),
        (["--prompt", "a", "--prompt-file", "b"], "--prompt-file"),
        (["--prompt-file", "/does/not/exist"], "/does/not/exist"),
        (["--timeout", "0"], "--timeout"),
        (["--json", "/does/not/exist/x.json"], "--json"),
        (["--model", "/does/not/exist"], "--model"),
        (["--model", "/"], "config.json"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_bad_usage_is_one_line_and_starts_nothing(model: Path, more: list[str], text: str) -> None:
    done = run(model, *more, KV_SERVER_PROGRAM="must-not-be-started")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    assert text in done.stderr


def test_a_gated_model_needs_a_token(model: Path, tmp_path: Path) -> None:
    more = ["--model", "meta-llama/Llama-3.1-8B-Instruct"]
    variables = {"HF_HOME": str(tmp_path), "HF_TOKEN": "", "KV_SERVER_PROGRAM": "must-not-be-started"}
    done = run(model, *more, **variables)
    assert done.returncode == 1
    assert "set HF_TOKEN" in done.stderr
    assert "must-not-be-started is not there" in run(model, *more, **{**variables, "HF_TOKEN": "mock"}).stderr


def test_a_prompt_of_the_user(model: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("some text")
    out = tmp_path / "out.json"
    for more in (["--prompt", "some text"], ["--prompt-file", str(tmp_path / "prompt.txt")]):
        done = run(model, *more, "--json", str(out))
        assert done.returncode == 0, done.stderr
        assert json.loads(out.read_text())["prompt_tokens"] == len("some text") + 1
    (tmp_path / "prompt.txt").write_text("x" * 9000)
    done = run(model, "--prompt-file", str(tmp_path / "prompt.txt"))
    assert done.returncode == 2
    assert "9001 tokens" in done.stderr


# --- commands and environments


def dry_run(*more: str, script: Path = SCRIPT, **variables: str) -> dict[str, dict[str, object]]:
    done = subprocess.run(
        [sys.executable, str(script), "--dry-run", *more],
        env=environment(**{"KV_SERVER_PROGRAM": "", **variables}),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    commands = {}
    for title, line in zip(lines[::2], lines[1::2], strict=True):
        words = shlex.split(line)
        pairs = dict(word.split("=", 1) for word in words[1:] if "=" in word.split(" ", 1)[0] and word[0].isupper())
        commands[title.removeprefix("# ")] = {"environment": pairs, "words": words[1 + len(pairs) :]}
    return commands


def test_the_two_roles_differ_by_data(model: Path) -> None:
    commands = dry_run("--device", "cpu", "--model", str(model), "--", "--seed", "3")
    assert list(commands) == ["kv_server", "store", "retrieve"]
    for role, kv_role in (("store", "kv_producer"), ("retrieve", "kv_consumer")):
        words, variables = commands[role]["words"], commands[role]["environment"]
        config = json.loads(words[words.index("--kv-transfer-config") + 1])
        assert config["kv_role"] == kv_role
        assert "LMCache" in config["kv_connector"]
        assert config["kv_load_failure_policy"] == "recompute"
        assert role in config["kv_connector_extra_config"]["lmcache_rpc_port"]
        assert words[-2:] == ["--seed", "3"]
        assert variables["LMCACHE_CONFIG_FILE"].endswith("configs/lmcache-config-lm.yaml")
        assert variables["LMCACHE_REMOTE_URL"].startswith("lm://127.0.0.1:")
        assert variables["DISAGG_KV_LOAD"] == "always"
        assert variables["HF_HUB_OFFLINE"] == "1"
        assert "VLLM_KV_TRANSFER_CONFIG" not in variables
        assert variables["DISAGG_KV_VISIBILITY"].endswith(f"-{role}")
        assert ("DISAGG_KV_WAIT_TIMEOUT" in variables) is (role == "store")


@pytest.mark.parametrize(("script", "sets"), [(SCRIPT, ("0", "1")), (SCRIPT_TP2, ("0,1", "2,3"))])
def test_on_hpu_the_plugin_is_told_and_cards_are_apart(script: Path, sets: tuple[str, str]) -> None:
    commands = dry_run("--device", "hpu", script=script)
    for role, cards in zip(("store", "retrieve"), sets, strict=True):
        words, variables = commands[role]["words"], commands[role]["environment"]
        assert variables["HABANA_VISIBLE_MODULES"] == cards
        assert variables["PT_HPU_GPU_MIGRATION"] == "1"
        assert variables["VLLM_KV_TRANSFER_CONFIG"] == words[words.index("--kv-transfer-config") + 1]
        assert words[words.index("--tensor-parallel-size") + 1] == str(len(cards.split(",")))
        assert words[words.index("--model") + 1] == "meta-llama/Llama-3.1-8B-Instruct"


def test_cuda_cards_and_a_shared_one() -> None:
    commands = dry_run("--device", "cuda", CUDA_VISIBLE_DEVICES="4,6")
    assert [commands[role]["environment"]["CUDA_VISIBLE_DEVICES"] for role in ("store", "retrieve")] == ["4", "6"]
    commands = dry_run("--device", "cuda", CUDA_VISIBLE_DEVICES="4")
    for role in ("store", "retrieve"):
        words = commands[role]["words"]
        assert commands[role]["environment"]["CUDA_VISIBLE_DEVICES"] == "4"
        assert float(words[words.index("--gpu-memory-utilization") + 1]) < 0.5


def test_shared_memory() -> None:
    commands = dry_run("--device", "cpu", "--remote_server", "shm", "--log-dir", "/no/such")
    server = commands["kv_server"]["words"]
    socket = "/no/such/kv_store.sock"
    assert server[-4:] == ["disagg_prefill_lmcache_v1.kv.stores.shm_server", socket, "--size", "2gb"]
    assert commands["kv_server"]["environment"]["PYTHONPATH"].split(":")[0] == str(REPOSITORY)
    for role in ("store", "retrieve"):
        environment = commands[role]["environment"]
        assert environment["DISAGG_SHM_URL"] == f"shm://{socket}"
        assert "LMCACHE_REMOTE_URL" not in environment
    commands = dry_run("--device", "cpu", "--backend", "shm", DISAGG_REMOTE_URL="shm:///run/mine")
    assert "kv_server" not in commands
    assert commands["store"]["environment"]["DISAGG_SHM_URL"] == "shm:///run/mine"


def test_peer_to_peer() -> None:
    commands = dry_run("--device", "cpu", "--backend", "nixl", "--kv-port", "7777")
    assert set(commands) == {"store", "retrieve"}
    sides = (("store", "lmcache-prefiller-config", "7777"), ("retrieve", "lmcache-decoder-config", "7778"))
    for role, config, port in sides:
        environment, words = commands[role]["environment"], commands[role]["words"]
        assert environment["VLLM_NIXL_SIDE_CHANNEL_PORT"] == port
        assert Path(environment["DISAGG_NIXL_CONFIG_FILE"]).stem == config
        assert environment["UCX_NET_DEVICES"] == "lo"
        assert json.loads(words[words.index("--kv-transfer-config") + 1])["kv_connector"] == "NixlConnector"
        assert not {"LMCACHE_REMOTE_URL", "LMCACHE_CONFIG_FILE"} & set(environment)


def test_the_multi_process_server() -> None:
    commands = dry_run("--device", "cpu", "--backend", "mp", "--kv-port", "7777")
    assert commands["kv_server"]["words"][-6:-2] == ["127.0.0.1", "7777", "--size", "2gb"]
    for role in ("store", "retrieve"):
        words = commands[role]["words"]
        config = json.loads(words[words.index("--kv-transfer-config") + 1])
        assert config["kv_connector_extra_config"]["lmcache.mp.port"] == 7777
        assert words[words.index("--block-size") + 1] == commands["kv_server"]["words"][-1] == "32"
        assert not {"LMCACHE_REMOTE_URL", "LMCACHE_CONFIG_FILE"} & set(commands[role]["environment"])


def test_redis_and_passwords() -> None:
    server = dry_run("--device", "cpu", "--remote_server", "redis", "--kv-port", "7777")["kv_server"]["words"]
    assert server[0] == "redis-server"
    assert server[server.index("--port") + 1] == "7777"
    assert server[server.index("--maxmemory-policy") + 1] == "allkeys-lru"
    url = "rediss://:s3cret@h:1/0?password=s3cret&x=1"
    commands = dry_run("--device", "cpu", "--backend", "redis", DISAGG_REMOTE_URL=url)
    assert "kv_server" not in commands
    assert "s3cret" not in json.dumps(commands)
    words = ["--device", "cpu", "--backend", "redis", "--redis-url", url]
    configuration = kv_sharing.configure(kv_sharing.settings_class(1), words, {}, "test")
    command = kv_sharing.instance_command(kv_sharing.make_plan(configuration, {}, Path("/logs")), "store", 3)
    assert command.environment["LMCACHE_REMOTE_URL"] == url
    assert "s3cret" not in " ".join(command.words)


def test_flag_before_environment_before_profile() -> None:
    words = dry_run("--device", "cpu", DISAGG_TENSOR_PARALLEL_SIZE="4")["store"]["words"]
    assert words[words.index("--tensor-parallel-size") + 1] == "4"
    words = dry_run("--device", "cpu", "--tp_size", "2", DISAGG_TENSOR_PARALLEL_SIZE="4")["store"]["words"]
    assert words[words.index("--tensor-parallel-size") + 1] == "2"
    variables = dry_run("--device", "cpu", OMP_NUM_THREADS="7")["store"]["environment"]
    assert variables["OMP_NUM_THREADS"] == "7"


@pytest.mark.parametrize("variable", ["DISAGG_DEVICE", "DISAGG_BACKEND"])
def test_a_wrong_environment_variable_is_one_line(variable: str) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--dry-run"],
        env=environment(**{variable: "abacus"}),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "abacus" in done.stderr


@pytest.mark.parametrize("script", [SCRIPT, SCRIPT_TP2])
def test_importing_a_script_starts_nothing_and_changes_no_environment(script: Path) -> None:
    code = (
        "import importlib.util, os, sys, threading\n"
        "before = dict(os.environ)\n"
        f"spec = importlib.util.spec_from_file_location('script', {str(script)!r})\n"
        "spec.loader.exec_module(importlib.util.module_from_spec(spec))\n"
        "assert dict(os.environ) == before\n"
        "assert threading.active_count() == 1\n"
        "assert not {'vllm', 'torch', 'lmcache'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("script", [SCRIPT, SCRIPT_TP2])
def test_an_old_python_is_told_in_one_line(script: Path) -> None:
    code = f"import runpy, sys; sys.version_info = (3, 9, 18); runpy.run_path({str(script)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, "[kv-sharing] failed: this needs Python 3.10 or newer\n")


def test_the_help_names_every_spelling() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    for flag in ("--remote-server", "--remote_server", "--tp_size", "--prompt-file", "--json", "--device"):
        assert flag in done.stdout
