"""The commands that the scripts build: read from --dry-run, which starts nothing."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from launch_harness import EXAMPLE, LAUNCHER, PACKAGE, REPOSITORY, Launch, option, parse_dry_run

from disagg_prefill_lmcache_v1.launch.backends import BACKENDS
from disagg_prefill_lmcache_v1.launch.settings import Settings
from disagg_prefill_lmcache_v1.settings import flag_of


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    launch = Launch(tmp_path)
    # No overrides: the profiles decide.
    for name in ("VLLM_PROGRAM", "KV_SERVER_PROGRAM", "PROXY_PROGRAM", "LOAD_PROGRAM"):
        del launch.environment[name]
    return launch


def dry_run(launch: Launch, *arguments: str, script: str = EXAMPLE, **environment: str):
    done = launch.run(script, "--dry-run", *arguments, **environment)
    assert done.returncode == 0, done.stderr
    assert not launch.run_dir.exists()
    return parse_dry_run(done.stdout)


def bare_tools(folder: Path) -> Path:
    """A folder for the PATH with what the scripts themselves use, and no Python."""
    tools = folder / "bin"
    tools.mkdir()
    for tool in ("bash", "dirname", "basename", "readlink", "env"):
        (tools / tool).symlink_to(str(shutil.which(tool)))
    return tools


def test_only_who_serves_gets_the_status_page_unless_it_is_set(launch: Launch) -> None:
    for flags, environment, shown in (
        ((), {}, False),
        (("--serve",), {}, True),
        (("--serve",), {"DISAGG_PROXY_STATUS_PAGE": "0"}, False),
    ):
        words = dry_run(launch, "--device", "cpu", *flags, **environment)["proxy"][1]
        assert ("--status-page" in words) is shown


def test_cpu_runs_the_built_model_through_the_module(launch: Launch) -> None:
    commands = dry_run(launch, "--device", "cpu")
    python = launch.environment["DISAGG_PYTHON"]
    assert list(commands) == ["model", "kv-server", "prefiller", "decoder", "proxy", "load"]
    model = str(REPOSITORY / ".models" / "tiny-llama")
    assert commands["model"][1][-2:] == ["--output", model]
    assert commands["kv-server"][1] == [
        python,
        "-m",
        "disagg_prefill_lmcache_v1.kv.stores.lm_server",
        "127.0.0.1",
        "8300",
    ]
    environment, words = commands["prefiller"]
    assert words[:5] == [python, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    assert option(words, "--served-model-name") == "tiny-llama"
    assert option(words, "--dtype") == "float32"
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert environment["OMP_NUM_THREADS"] == "1"
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert environment["PYTHONHASHSEED"] == "0"
    assert environment["LMCACHE_TRACK_USAGE"] == "false"
    assert environment["DISAGG_DEVICE"] == "cpu"
    assert environment["LMCACHE_CONFIG_FILE"] == str(PACKAGE / "configs" / "lmcache-config-lm.yaml")
    assert environment["LMCACHE_REMOTE_URL"] == "lm://127.0.0.1:8300"
    assert environment["PYTHONPATH"].split(":")[0] == str(REPOSITORY)
    load = commands["load"][1]
    assert option(load, "--model") == "tiny-llama"
    assert option(load, "--prefiller-url") == "http://127.0.0.1:8100"


def test_roles_differ_in_what_they_must(launch: Launch) -> None:
    commands = dry_run(launch, "--device", "cpu")
    differences = {}
    for role, port, kv_role in (("prefiller", "8100", "kv_producer"), ("decoder", "8200", "kv_consumer")):
        environment, words = commands[role]
        assert option(words, "--port") == port
        transfer = json.loads(option(words, "--kv-transfer-config"))
        assert transfer == {
            "kv_connector": "LMCacheDisaggConnectorV1",
            "kv_connector_module_path": "disagg_prefill_lmcache_v1.kv.connector",
            "kv_role": kv_role,
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"discard_partial_chunks": False, "lmcache_rpc_port": f"{role}-{port}"},
        }
        differences[role] = ({k for k in environment if k != "LMCACHE_REMOTE_URL"}, words)
    assert differences["prefiller"][0] == differences["decoder"][0]
    for role, first in (("prefiller", "kv.visibility.HoldUntilVisible"), ("decoder", "kv.reuse.TellReuse")):
        words = commands[role][1]
        given = [words[i + 1] for i, word in enumerate(words) if word == "--middleware"]
        assert given == [f"disagg_prefill_lmcache_v1.{name}" for name in (first, "kv.tell_layout.TellLayout")]
    assert commands["prefiller"][0]["DISAGG_KV_VISIBILITY"].startswith("@disagg-kv-8100-")
    assert commands["decoder"][0]["DISAGG_KV_VISIBILITY"].startswith("@disagg-kv-8200-")


def test_hpu_has_the_reference_defaults(launch: Launch) -> None:
    commands = dry_run(launch, "--device", "hpu")
    assert "model" not in commands
    for role, cards in (("prefiller", "0"), ("decoder", "1")):
        environment, words = commands[role]
        assert words[:3] == ["vllm", "serve", "meta-llama/Llama-3.1-8B-Instruct"]
        assert environment["HABANA_VISIBLE_MODULES"] == cards
        expected = {
            "PT_HPU_GPU_MIGRATION": "1",
            "VLLM_SKIP_WARMUP": "true",
            "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
            "PYTHONHASHSEED": "0",
            "DISAGG_KV_WAIT_TIMEOUT": "60",
        }
        assert expected.items() <= environment.items()
        assert "PT_HPU_ENABLE_LAZY_COLLECTIVES" not in environment, "of the lazy mode, which is gone"
        assert "HF_HUB_OFFLINE" not in environment
        assert option(words, "--max-num-batched-tokens") == "8192"
        assert option(words, "--gpu-memory-utilization") == "0.8"
        assert "--enforce-eager" in words
        assert int(option(words, "--max-model-len")) >= 8200
        # The plugin recognises LMCache by this text.
        assert "LMCache" in json.loads(option(words, "--kv-transfer-config"))["kv_connector"]
    load = commands["load"][1]
    wanted = {"--num-prompts": "100", "--input-len": "8000", "--output-len": "200", "--request-rate": "3.6"}
    assert {flag: option(load, flag) for flag in wanted} == wanted


@pytest.mark.parametrize(
    ("device", "arguments", "eager", "skips_warm_up"),
    [
        ("cpu", (), True, None),
        ("cpu", ("--graphs", "on"), False, None),
        ("cuda", (), False, None),
        ("cuda", ("--graphs", "off"), True, None),
        ("hpu", (), True, "true"),
        ("hpu", ("--graphs", "on"), False, "false"),
    ],
)
def test_graphs(launch: Launch, device: str, arguments: tuple[str, ...], eager: bool, skips_warm_up: str | None):
    done = launch.run(EXAMPLE, "--dry-run", *launch.arguments(*arguments, device=device))
    assert done.returncode == 0, done.stderr
    commands = parse_dry_run(done.stdout)
    for role in ("prefiller", "decoder"):
        environment, words = commands[role]
        assert ("--enforce-eager" in words) is eager
        assert environment.get("VLLM_SKIP_WARMUP") == skips_warm_up


@pytest.mark.parametrize(
    ("ranks", "prefiller", "decoder"), [(1, "0", "1"), (2, "0,1", "2,3"), (4, "0,1,2,3", "4,5,6,7")]
)
@pytest.mark.parametrize("device", ["hpu", "cuda"])
def test_card_sets_follow_from_the_ranks(launch: Launch, device: str, ranks: int, prefiller: str, decoder: str) -> None:
    variable = {"hpu": "HABANA_VISIBLE_MODULES", "cuda": "CUDA_VISIBLE_DEVICES"}[device]
    commands = dry_run(launch, "--device", device, "--tensor-parallel-size", str(ranks))
    assert commands["prefiller"][0][variable] == prefiller
    assert commands["decoder"][0][variable] == decoder
    assert option(commands["decoder"][1], "--tensor-parallel-size") == str(ranks)


def test_cards_are_taken_from_the_visible_ones(launch: Launch) -> None:
    commands = dry_run(launch, "--device", "hpu", "--tensor-parallel-size=2", HABANA_VISIBLE_MODULES="4,5,6,7")
    assert commands["prefiller"][0]["HABANA_VISIBLE_MODULES"] == "4,5"
    assert commands["decoder"][0]["HABANA_VISIBLE_MODULES"] == "6,7"


@pytest.mark.parametrize(("cards", "decoder", "memory"), [("1", "0", "0.4"), ("2", "1", "0.8")])
def test_one_cuda_card_is_shared(launch: Launch, cards: str, decoder: str, memory: str) -> None:
    commands = dry_run(launch, "--device", "cuda", STANDIN_CUDA_CARDS=cards)
    for role, expected in (("prefiller", "0"), ("decoder", decoder)):
        assert commands[role][0]["CUDA_VISIBLE_DEVICES"] == expected
        assert commands[role][0]["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"
        assert option(commands[role][1], "--gpu-memory-utilization") == memory


@pytest.mark.parametrize(
    ("hpu", "cuda", "device"), [("2", "0", "hpu"), ("2", "2", "hpu"), ("0", "1", "cuda"), ("0", "0", "cpu")]
)
def test_device_is_found_by_its_cards(launch: Launch, hpu: str, cuda: str, device: str) -> None:
    commands = dry_run(launch, STANDIN_HPU_CARDS=hpu, STANDIN_CUDA_CARDS=cuda)
    assert commands["decoder"][0]["DISAGG_DEVICE"] == device
    assert option(commands["load"][1], "--device") == device


def test_no_unix_socket_for_a_redis_elsewhere_or_under_a_long_path(launch: Launch, tmp_path: Path) -> None:
    elsewhere = dry_run(launch, "--device", "cpu", "--backend", "redis", "--redis-url", "redis://db:1")
    assert "DISAGG_REDIS_SOCKET" not in elsewhere["decoder"][0]
    deep = dry_run(launch, "--device", "cpu", "--backend", "redis", "--run-dir", str(tmp_path / ("x" * 100)))
    assert "DISAGG_REDIS_SOCKET" not in deep["decoder"][0]
    assert "--unixsocket" not in deep["kv-server"][1]


def test_redis_is_started_without_persistence(launch: Launch) -> None:
    commands = dry_run(launch, "--device", "cpu", "--backend", "redis")
    words = commands["kv-server"][1]
    secret = commands["prefiller"][0]["DISAGG_KV_SECRET_FILE"]
    assert words[:8] == ["redis-server", secret, "--bind", "127.0.0.1", "--port", "8379", "--save", ""]
    assert commands["decoder"][0]["DISAGG_KV_SECRET_FILE"] == secret
    assert not Path(secret).exists()
    assert option(words, "--appendonly") == "no"
    assert option(words, "--maxmemory") == "2gb"
    assert option(words, "--maxmemory-policy") == "allkeys-lru"
    environment = commands["prefiller"][0]
    assert option(words, "--unixsocket") == environment["DISAGG_REDIS_SOCKET"]
    assert environment["LMCACHE_REMOTE_URL"] == "redis://127.0.0.1:8379"
    assert environment["LMCACHE_CONFIG_FILE"].endswith("lmcache-config-redis.yaml")


@pytest.mark.parametrize(("device", "size"), [("cpu", "2gb"), ("hpu", "16gb"), ("cuda", "16gb")])
def test_shared_memory_is_sized_by_the_device(launch: Launch, device: str, size: str) -> None:
    python = launch.environment["DISAGG_PYTHON"]
    server = [python, "-m", "disagg_prefill_lmcache_v1.kv.stores.shm_server", f"{launch.run_dir}/kv_store.sock"]
    flags = ("--device", device, "--backend", "shm", "--run-dir", str(launch.run_dir))
    commands = dry_run(launch, *flags, LMCACHE_REMOTE_URL="lm://somewhere:1")
    assert commands["kv-server"][1] == [*server, "--size", size]
    for role in ("prefiller", "decoder"):
        environment = commands[role][0]
        assert environment["DISAGG_SHM_URL"] == f"shm://{launch.run_dir}/kv_store.sock"
        assert environment["LMCACHE_CONFIG_FILE"].endswith("lmcache-config-shm.yaml")
        assert "LMCACHE_REMOTE_URL" not in environment, "LMCache would use it as a second store"
    assert option(commands["load"][1], "--backend") == "shm"
    commands = dry_run(launch, *flags, KV_SHM_SIZE="512MB")
    assert commands["kv-server"][1] == [*server, "--size", "512MB"]


@pytest.mark.parametrize(
    ("flags", "environment", "name"),
    [(["--kv-port=77"], {}, "--kv-port"), ([], {"DISAGG_KV_PORT": "77"}, "DISAGG_KV_PORT")],
)
def test_shared_memory_has_no_port(launch: Launch, flags: list[str], environment: dict[str, str], name: str) -> None:
    done = launch.run(EXAMPLE, "--dry-run", "--device=cpu", "--backend=shm", *flags, **environment)
    assert done.returncode == 2
    assert f"{name}: --backend shm has no port" in done.stderr
    ports = ("--proxy-port=8400", "--prefiller-port=8401", "--decoder-port=8402")
    dry_run(launch, "--device=cpu", "--backend=shm", *ports)


@pytest.mark.parametrize("device", ["cpu", "hpu", "cuda"])
def test_nixl_has_two_sides_and_no_server(launch: Launch, device: str) -> None:
    flags = ("--device", device, "--backend", "nixl")
    commands = dry_run(launch, *flags, LMCACHE_REMOTE_URL="lm://somewhere:1")
    assert "kv-server" not in commands
    for role, kv_role, port in (("prefiller", "kv_producer", "8500"), ("decoder", "kv_consumer", "8501")):
        environment = commands[role][0]
        assert environment["VLLM_NIXL_SIDE_CHANNEL_HOST"] == "127.0.0.1"
        assert environment["VLLM_NIXL_SIDE_CHANNEL_PORT"] == port
        assert environment["DISAGG_NIXL_CONFIG_FILE"] == str(PACKAGE / "configs" / f"lmcache-{role}-config.yaml")
        assert environment["UCX_NET_DEVICES"] == "lo"
        assert not {"LMCACHE_REMOTE_URL", "LMCACHE_CONFIG_FILE"} & set(environment), "LMCache is not there"
        config = json.loads(option(commands[role][1], "--kv-transfer-config"))
        assert config == {
            "kv_connector": "NixlConnector", "kv_connector_module_path": "disagg_prefill_lmcache_v1.kv.nixl",
            "kv_role": kv_role, "kv_load_failure_policy": "recompute", "kv_connector_extra_config": {},
        }  # fmt: skip
    assert option(commands["load"][1], "--backend") == "nixl"
    assert option(commands["proxy"][1], "--kv-hand-over") == "params"
    commands = dry_run(launch, *flags, "--kv-port=77", UCX_NET_DEVICES="mlx5_0:1")
    assert commands["decoder"][0]["VLLM_NIXL_SIDE_CHANNEL_PORT"] == "78"
    assert commands["prefiller"][0]["UCX_NET_DEVICES"] == "mlx5_0:1"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--kv-port=8199"], "--decoder-port 8200 is one of the 2 ports from --kv-port 8199 on"),
        (["--kv-port=65535"], "--kv-port 65535: 2 ports in a row are needed"),
    ],
)
def test_every_server_needs_a_port(launch: Launch, flags: list[str], said: str) -> None:
    done = launch.run(EXAMPLE, "--dry-run", "--device=cpu", "--backend=nixl", *flags)
    assert done.returncode == 2
    assert said in done.stderr


@pytest.mark.parametrize(("device", "size", "block"), [("cpu", "2gb", 32), ("hpu", "16gb", 128), ("cuda", "16gb", 64)])
def test_mp_has_one_block_size_for_server_and_engines(launch: Launch, device: str, size: str, block: int) -> None:
    python = launch.environment["DISAGG_PYTHON"]
    server = [python, "-m", "disagg_prefill_lmcache_v1.kv.mp_server", "127.0.0.1"]
    commands = dry_run(launch, "--device", device, "--backend=mp", LMCACHE_CONFIG_FILE="/old.yaml")
    assert commands["kv-server"][1] == [*server, "8600", "--size", size, "--chunk-size", str(block)]
    for role, kv_role in (("prefiller", "kv_producer"), ("decoder", "kv_consumer")):
        environment, command = commands[role]
        assert "LMCACHE_CONFIG_FILE" not in environment, "it is the in-process LMCache's"
        assert option(command, "--block-size") == str(block)
        transfer = json.loads(option(command, "--kv-transfer-config"))
        assert transfer == {
            "kv_connector": "LMCacheDisaggMPConnector",
            "kv_connector_module_path": "disagg_prefill_lmcache_v1.kv.mp",
            "kv_role": kv_role,
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {
                "lmcache.mp.host": "tcp://127.0.0.1",
                "lmcache.mp.port": 8600,
                "lmcache.mp.mq_timeout": 10.0,
            },
        }
    assert option(commands["load"][1], "--reuse-block") == str(block)
    settings = {"KV_MP_SIZE": "64MB", "KV_MP_BLOCK_SIZE": "16", "KV_MP_TIMEOUT": "4", "KV_MP_REDIS": "db:6379"}
    adapter = '{"type": "resp", "port": 6379}'
    commands = dry_run(
        launch, "--device", device, "--backend=mp", "--kv-port=77", KV_MP_ARGS=f"--l2-adapter '{adapter}'", **settings
    )
    more = ["77", "--size", "64MB", "--chunk-size", "16", "--redis", "db:6379", "--l2-adapter", adapter]
    assert commands["kv-server"][1] == [*server, *more]
    transfer = json.loads(option(commands["decoder"][1], "--kv-transfer-config"))["kv_connector_extra_config"]
    assert (transfer["lmcache.mp.port"], transfer["lmcache.mp.mq_timeout"]) == (77, 4)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("KV_MP_BLOCK_SIZE", "0", "a whole number from 1 to 4096"),
        ("KV_MP_TIMEOUT", "-1", "a number above 0, at most 3600"),
        ("KV_MP_TIMEOUT", "soon", "a number above 0, at most 3600"),
        ("KV_MP_REDIS", "redis://db:1", "HOST:PORT"),
    ],
)
def test_what_mp_does_not_take_is_named(launch: Launch, name: str, value: str, allowed: str) -> None:
    done = launch.run(EXAMPLE, "--dry-run", "--device=cpu", "--backend=mp", **{name: value})
    assert done.returncode == 2
    assert f"allowed: {allowed}" in done.stderr
    assert name in done.stderr


@pytest.mark.parametrize("backend", ["shm", "mp"])
@pytest.mark.parametrize("size", ["2tb", "two", "1.5gb", "2gb x"])
def test_a_size_that_is_not_understood_is_named(launch: Launch, size: str, backend: str) -> None:
    name = f"KV_{backend.upper()}_SIZE"
    done = launch.run(EXAMPLE, "--dry-run", "--device=cpu", f"--backend={backend}", **{name: size})
    assert done.returncode == 2
    assert f"{name} '{size}': allowed: a whole number and a unit, as in 512mb or 2gb" in done.stderr


@pytest.mark.parametrize("url", ["redis://:s3cret@db:1/0", "rediss://me:s3cret@db:1", "redis://db:1/0?password=s3cret"])
def test_a_password_is_never_printed(launch: Launch, url: str) -> None:
    done = launch.run(EXAMPLE, "--dry-run", "--device=cpu", "--backend=redis", f"--redis-url={url}")
    assert done.returncode == 0
    assert "s3cret" not in done.stdout + done.stderr
    assert "db:1" in done.stdout
    assert "kv-server" not in parse_dry_run(done.stdout)


def test_precedence_is_flag_environment_edited_profile(launch: Launch, tmp_path: Path) -> None:
    assert option(dry_run(launch, "--device=cpu")["load"][1], "--num-prompts") == "24"
    assert option(dry_run(launch, "--device=cpu", DISAGG_NUM_PROMPTS="5")["load"][1], "--num-prompts") == "5"
    flags = ("--device=cpu", "--num-prompts", "6")
    assert option(dry_run(launch, *flags, DISAGG_NUM_PROMPTS="5")["load"][1], "--num-prompts") == "6"
    commands = dry_run(launch, "--device=cpu", OMP_NUM_THREADS="3", LMCACHE_CONFIG_FILE="/my.yaml")
    assert commands["decoder"][0]["OMP_NUM_THREADS"] == "3"
    assert commands["decoder"][0]["LMCACHE_CONFIG_FILE"] == "/my.yaml"

    edited = tmp_path / PACKAGE.name
    shutil.copytree(PACKAGE, edited, ignore=shutil.ignore_patterns("__pycache__", "*.log"))
    script = edited / EXAMPLE
    text = script.read_text()
    assert '"${DISAGG_BACKEND:=}"' in text
    script.write_text(text.replace('"${DISAGG_BACKEND:=}"', '"${DISAGG_BACKEND:=redis}"'))
    for environment, backend in (({}, "redis"), ({"DISAGG_BACKEND": "lm"}, "lm")):
        done = subprocess.run(
            ["bash", str(script), "--dry-run", "--device=cpu"],
            env={**launch.environment, **environment},
            capture_output=True,
            text=True,
            check=True,
        )
        assert option(parse_dry_run(done.stdout)["load"][1], "--backend") == backend


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("module", ["-m", "vllm.entrypoints.openai.api_server", "--model", "org/name"]),
        ("vllm", ["vllm", "serve", "org/name"]),
        ("my-vllm run", ["my-vllm", "run", "org/name"]),
    ],
)
def test_vllm_program_can_be_replaced(launch: Launch, value: str, words: list[str]) -> None:
    command = dry_run(launch, "--device=cpu", "--model=org/name", VLLM_PROGRAM=value)["decoder"][1]
    assert command[command.index("org/name") - len(words) + 1 :][: len(words)] == words


def test_extra_arguments_reach_both_servers_last(launch: Launch) -> None:
    commands = dry_run(launch, "--device=cpu", "--", "--seed", "1", "--override", '{"a": "b c"}')
    for role in ("prefiller", "decoder"):
        assert commands[role][1][-4:] == ["--seed", "1", "--override", '{"a": "b c"}']
    assert "--seed" not in commands["proxy"][1]


def test_connector_module_can_be_replaced(launch: Launch) -> None:
    command = dry_run(launch, "--device=cpu", KV_CONNECTOR_MODULE="tests.faulty")["decoder"][1]
    assert json.loads(option(command, "--kv-transfer-config"))["kv_connector_module_path"] == "tests.faulty"


def test_serve_has_no_load(launch: Launch) -> None:
    assert "load" not in dry_run(launch, "--device=cpu", "--serve")
    assert "load" not in dry_run(launch, "--device=cpu", DISAGG_SERVE="1")


@pytest.mark.parametrize("mode", ["auto", "always", "never"])
def test_both_servers_and_the_load_know_whether_to_load_kv(launch: Launch, mode: str) -> None:
    flags = [] if mode == "auto" else [f"--kv-load={mode}"]
    commands = dry_run(launch, "--device=cpu", *flags, DISAGG_KV_LOAD="never" if mode == "always" else "")
    assert [commands[role][0]["DISAGG_KV_LOAD"] for role in ("prefiller", "decoder")] == [mode, mode]
    assert option(commands["load"][1], "--kv-load") == mode
    assert "--calibrate" not in commands["load"][1]
    served = dry_run(launch, "--device=cpu", "--serve", *flags)
    assert ("calibration" in served) is (mode == "auto")
    if mode == "auto":
        assert option(served["calibration"][1], "--calibrate") == "only"
        assert option(served["calibration"][1], "--decoder-url") == "http://127.0.0.1:8200"


@pytest.mark.parametrize("script", [EXAMPLE, LAUNCHER])
def test_tp2_scripts_only_set_the_size(launch: Launch, script: str) -> None:
    roles = [] if script == EXAMPLE else ["decoder"]
    twin = script.replace(".sh", "_tp2.sh")
    for flags, size in (([], "2"), (["--tensor-parallel-size", "4"], "4")):
        command = dry_run(launch, *roles, "--device=hpu", *flags, script=twin)["decoder"]
        assert option(command[1], "--tensor-parallel-size") == size
    assert len((PACKAGE / twin).read_text().splitlines()) < 12


@pytest.mark.parametrize("role", ["prefiller", "decoder", "proxy", "kv-server"])
def test_launcher_starts_what_the_example_starts(launch: Launch, role: str) -> None:
    example = dry_run(launch, "--device=cpu", f"--model={launch.model}")[role]
    model = [str(launch.model)] if role in ("prefiller", "decoder") else []
    alone = dry_run(launch, role, *model, "--device=cpu", script=LAUNCHER)[role]
    for environment, _ in (example, alone):
        environment.pop("DISAGG_KV_VISIBILITY", None)  # names the process
    assert alone == example


def test_dry_run_needs_nothing_installed(launch: Launch, tmp_path: Path) -> None:
    del launch.environment["DISAGG_PYTHON"]
    tools = bare_tools(tmp_path)
    (tools / "python3").symlink_to(f"{sys.base_prefix}/bin/python3")  # without the packages of this environment
    commands = dry_run(launch, "--device=cpu", PATH=str(tools))
    assert commands["kv-server"][1][0] == str(REPOSITORY / ".venv" / "bin" / "python")


def test_help_lists_every_setting(launch: Launch) -> None:
    done = launch.run(EXAMPLE, "--help")
    assert done.returncode == 0
    flags = {flag_of(field.name) for field in dataclasses.fields(Settings) if field.metadata["flag"]}
    assert {"--device", "--redis-url", "--serve", "--min-reuse-ratio"} <= flags
    assert all(f"  {flag} " in done.stdout for flag in flags)
    assert all(str(backend.default_port) in done.stdout for backend in BACKENDS.values())


# --- how the scripts may be called


def test_no_python_is_told_in_one_line(launch: Launch, tmp_path: Path) -> None:
    done = launch.run(EXAMPLE, "--help", PATH=str(bare_tools(tmp_path)), DISAGG_PYTHON="")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == [
        "[disagg] error: no Python 3.10 or newer found: install python3, or name one with DISAGG_PYTHON"
    ]


@pytest.mark.parametrize("script", [EXAMPLE, EXAMPLE.replace(".sh", "_tp2.sh")])
@pytest.mark.parametrize("way", ["symlink", "sh", "posix", "turkish", "executed"])
def test_ways_to_call_a_script(launch: Launch, tmp_path: Path, way: str, script: str) -> None:
    path, environment = PACKAGE / script, dict(launch.environment)
    command = ["bash", str(path)]
    if way == "symlink":
        link = tmp_path / "elsewhere" / "link.sh"
        link.parent.mkdir()
        link.symlink_to(path)
        command = ["bash", str(link)]
    elif way == "sh":
        command = ["sh", str(path)]
    elif way == "posix":
        environment["POSIXLY_CORRECT"] = "1"
    elif way == "turkish":  # where the capital of i is not I
        subprocess.run(
            ["localedef", "-i", "tr_TR", "-f", "UTF-8", str(tmp_path / "tr_TR.UTF-8")], check=True, capture_output=True
        )
        environment |= {"LOCPATH": str(tmp_path), "LC_ALL": "tr_TR.UTF-8"}
    else:
        copy = tmp_path / PACKAGE.name
        shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__", "*.log"))
        (copy / script).chmod(0o755)
        command = [str(copy / script)]
    done = subprocess.run(
        [*command, "--dry-run", "--device=cpu", "--backend=redis", "--input-len=33"],
        env=environment, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert option(parse_dry_run(done.stdout)["load"][1], "--input-len") == "33"


def test_json_is_printed_as_a_person_reads_it(launch: Launch) -> None:
    done = launch.run(EXAMPLE, "--dry-run", "--device=cpu")
    assert '--kv-transfer-config \'{"kv_connector":"LMCacheDisaggConnectorV1",' in done.stdout
    assert "\\" not in done.stdout


def test_without_a_load_its_lengths_do_not_matter(launch: Launch) -> None:
    flags = ("--device=cpu", "--num-prompts=0", "--max-model-len=256")
    assert option(dry_run(launch, *flags)["load"][1], "--num-prompts") == "0"


def test_hpu_modules_go_by_their_own_numbers(launch: Launch) -> None:
    commands = dry_run(launch, "--device=hpu", STANDIN_HPU_CARDS="4", STANDIN_HPU_MODULES="6 4 7 5")
    assert [commands[role][0]["HABANA_VISIBLE_MODULES"] for role in ("prefiller", "decoder")] == ["4", "5"]
