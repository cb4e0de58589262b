"""Start, readiness, death and end of the stack, with stand-in servers (tests/helpers/standins)."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from launch_harness import (
    EXAMPLE,
    LAUNCHER,
    PACKAGE,
    STANDINS,
    TIMEOUT_S,
    Launch,
    free_ports_in_a_row,
    option,
    wait_until,
)

from disagg_prefill_lmcache_v1.launch.profiles import load_profile
from disagg_prefill_lmcache_v1.same_user import read_secret

GONE_WITHIN_S = 45.0  # those who wait do so for 60


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    launch = Launch(tmp_path)
    yield launch
    launch.kill_leftovers()


@pytest.fixture
def fake_builds(tmp_path: Path) -> Path:
    """A folder with what an accelerator's container has installed, as far as the preflight looks."""
    folder = tmp_path / "site"
    for name, version in (("vllm", "0.26.0"), ("vllm_gaudi", "0.26.0")):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").touch()
        info = folder / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n")
    return folder


def record_name(launch: Launch, role: str) -> str:
    if role == "load":
        return "load"
    kind = "vllm" if role in ("prefiller", "decoder") else role
    return f"{kind}-{launch.ports[role]}"


def test_the_whole_example_ends_well_twice(launch: Launch) -> None:
    for _ in range(2):
        done = launch.run(EXAMPLE, *launch.arguments("--num-prompts", "3"), PROMETHEUS_MULTIPROC_DIR="/tmp")
        assert done.returncode == 0, done.stderr
        for log in ("kv_server", "prefiller", "decoder", "proxy"):
            assert "stand-in" in (launch.run_dir / f"{log}.log").read_text()
            assert f"{log.replace('_', '-')} is ready" in done.stderr
        order = [done.stderr.index(f"{name} is ready") for name in ("kv-server", "proxy", "decoder")]
        assert order == sorted(order)
    words = launch.record("load")["argv"]
    assert option(words, "--num-prompts") == "3"
    assert option(words, "--proxy-url") == f"http://127.0.0.1:{launch.ports['proxy']}"
    environment = launch.record(record_name(launch, "decoder"))["env"]
    assert environment["SPT_NOENV"] == "1"
    assert "PROMETHEUS_MULTIPROC_DIR" not in environment  # each server has metrics of its own


@pytest.mark.parametrize(
    ("device", "variable", "cards"),
    [("hpu", "HABANA_VISIBLE_MODULES", ["0,1", "2,3"]), ("cuda", "CUDA_VISIBLE_DEVICES", ["0,1", "2,3"])],
)
def test_accelerator_servers_get_their_environment(
    launch: Launch, fake_builds: Path, device: str, variable: str, cards: list[str]
) -> None:
    count = {"STANDIN_HPU_CARDS": "8"} if device == "hpu" else {"STANDIN_CUDA_CARDS": "8"}
    done = launch.run(
        EXAMPLE, *launch.arguments("--tensor-parallel-size=2", device="auto"), PYTHONPATH=str(fake_builds), **count
    )
    assert done.returncode == 0, done.stderr
    assert f"device {device} (a card was found)" in done.stderr
    for role, visible in zip(("prefiller", "decoder"), cards, strict=True):
        record = launch.record(record_name(launch, role))
        assert record["env"][variable] == visible
        assert record["env"]["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"
        assert record["env"].get("PT_HPU_GPU_MIGRATION") == ("1" if device == "hpu" else None)
        assert record["env"]["LMCACHE_REMOTE_URL"] == f"lm://127.0.0.1:{launch.ports['kv']}"
        assert record["argv"][:2] == ["serve", str(launch.model)]
        assert option(record["argv"], "--tensor-parallel-size") == "2"


def test_servers_on_one_card_start_one_after_the_other(launch: Launch, fake_builds: Path) -> None:
    done = launch.run(EXAMPLE, *launch.arguments(device="cuda"), PYTHONPATH=str(fake_builds), STANDIN_CUDA_CARDS="1")
    assert done.returncode == 0, done.stderr
    first, second = (launch.records / f"{record_name(launch, role)}.json" for role in ("prefiller", "decoder"))
    assert first.stat().st_mtime < second.stat().st_mtime
    assert done.stderr.index("prefiller is ready") < done.stderr.index("proxy is ready")
    assert "one card for both servers: each takes 0.4" in done.stderr


@pytest.mark.parametrize("role", ["kv", "prefiller", "decoder", "proxy"])
@pytest.mark.parametrize("phase", ["start", "load"])
def test_a_killed_child_ends_the_stack(launch: Launch, role: str, phase: str) -> None:
    if phase == "start":
        delays = {"STANDIN_DELAY_KV": "60"} if role == "kv" else {"STANDIN_DELAY_VLLM": "60"}
    else:
        delays = {"STANDIN_LOAD_SECONDS": "60"}
    process = launch.start(EXAMPLE, *launch.arguments(), **delays)
    target = record_name(launch, role)
    needed = [target, "load"] if phase == "load" else [target]
    wait_until(lambda: all(launch.has_record(name) for name in needed), f"{needed} running")
    begin = time.monotonic()
    os.kill(launch.record(target)["pid"], signal.SIGKILL)
    done = launch.finish(process)
    assert time.monotonic() - begin < GONE_WITHIN_S
    assert done.returncode == 1
    name = "kv-server" if role == "kv" else role
    assert f"error: {name} was killed by signal KILL" in done.stderr
    log = {"kv": "kv_server"}.get(role, role)
    assert f"last lines of {launch.run_dir}/{log}.log" in done.stderr
    assert f"stand-in {target} starts" in done.stderr


def test_a_killed_load_ends_the_stack(launch: Launch) -> None:
    process = launch.start(EXAMPLE, *launch.arguments(), STANDIN_LOAD_SECONDS="60")
    wait_until(lambda: launch.has_record("load"), "load running")
    os.kill(launch.record("load")["pid"], signal.SIGKILL)
    done = launch.finish(process)
    assert done.returncode == 1
    assert "the load or the correctness probe failed" in done.stderr


def test_a_server_that_exits_during_start_is_named(launch: Launch) -> None:
    target = record_name(launch, "decoder")
    done = launch.run(EXAMPLE, *launch.arguments(), STANDIN_DIE=f"{target}:7", STANDIN_DELAY_VLLM="0.5")
    assert done.returncode == 1
    assert "error: decoder ended with exit status 7" in done.stderr
    assert f"stand-in {target} cannot go on" in done.stderr
    assert not launch.has_record("load")


def test_a_failed_load_fails_the_example(launch: Launch) -> None:
    launch.run_dir.mkdir()
    old_summary = launch.run_dir / "summary.json"
    old_summary.touch()
    done = launch.run(EXAMPLE, *launch.arguments(), STANDIN_LOAD_STATUS="1")
    assert done.returncode == 1
    assert "the load or the correctness probe failed" in done.stderr
    assert not old_summary.exists()


def test_a_server_whose_engine_failed_at_start_is_noticed_though_it_goes_on(launch: Launch) -> None:
    """As vLLM does for ever when a thread of its engine is left, here with the log of such a start."""
    script = launch.folder / "lingering.py"
    excerpt = Path(__file__).parent / "logs" / "hanging.log"
    script.write_text(f"import time\nprint(open({str(excerpt)!r}).read(), flush=True)\ntime.sleep(300)\n")
    begin = time.monotonic()
    done = launch.run(EXAMPLE, *launch.arguments(), VLLM_PROGRAM=f"{sys.executable} {script}")
    assert time.monotonic() - begin < 55
    assert done.returncode == 1
    assert "error: prefiller cannot start: ImportError: libucp.so.0: cannot open shared object file" in done.stderr
    assert f"cause, from {launch.run_dir}/prefiller.log:\n    ImportError: libucp.so.0" in done.stderr


def test_a_server_that_is_never_ready_is_named(launch: Launch) -> None:
    done = launch.run(EXAMPLE, *launch.arguments("--ready-timeout=1"), STANDIN_DELAY_VLLM="60")
    assert done.returncode == 1
    assert "error: prefiller was not ready after 1 s" in done.stderr


@pytest.mark.parametrize(
    ("name", "status"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)], ids=["int", "term", "hup"]
)
@pytest.mark.parametrize("phase", ["start", "load"])
def test_signals_end_everything(launch: Launch, name: str, status: int, phase: str) -> None:
    slow = {"STANDIN_DELAY_VLLM": "60"} if phase == "start" else {"STANDIN_LOAD_SECONDS": "60"}
    process = launch.start(EXAMPLE, *launch.arguments(), **slow)
    wanted = record_name(launch, "decoder") if phase == "start" else "load"
    wait_until(lambda: launch.has_record(wanted), f"{wanted} running")
    assert len(list(launch.marked())) >= 5
    process.send_signal(getattr(signal, name))
    assert launch.finish(process).returncode == status


def test_an_interrupt_is_heard_even_when_started_in_the_background(launch: Launch) -> None:
    # Programs that a shell script starts with & ignore the interrupt signal.
    script = str(PACKAGE / EXAMPLE)
    process = subprocess.Popen(
        ["bash", "-c", 'bash "$@" & echo $!; wait $!', "-", script, *launch.arguments()],
        env={**launch.environment, "STANDIN_DELAY_VLLM": "60"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    pid = int(process.stdout.readline())
    wait_until(lambda: launch.has_record(record_name(launch, "decoder")), "decoder running")
    os.kill(pid, signal.SIGINT)
    assert launch.finish(process).returncode == 130


def test_a_hang_up_is_ignored_under_nohup(launch: Launch) -> None:
    process = subprocess.Popen(
        ["bash", "-c", 'trap "" HUP; exec bash "$@"', "-", str(PACKAGE / EXAMPLE), *launch.arguments()],
        env={**launch.environment, "STANDIN_LOAD_SECONDS": "60"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: launch.has_record("load"), "load running")
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)  # the first one that counts decides the exit status
    assert launch.finish(process).returncode == 143


def test_stubborn_processes_are_killed_and_their_shared_memory_is_freed(launch: Launch) -> None:
    process = launch.start(EXAMPLE, *launch.arguments(), STANDIN_STUBBORN="1", STANDIN_LOAD_SECONDS="60")
    wait_until(lambda: launch.has_record("load"), "load running")
    shared = [Path("/dev/shm", launch.record(record_name(launch, role))["shared"]) for role in launch.ports]
    assert all(path.is_file() for path in shared)
    begin = time.monotonic()
    os.kill(launch.record(record_name(launch, "prefiller"))["pid"], signal.SIGKILL)
    assert launch.finish(process).returncode == 1
    assert time.monotonic() - begin < GONE_WITHIN_S
    assert not any(path.exists() for path in shared)


def test_servers_end_with_a_script_that_is_killed(launch: Launch) -> None:
    process = launch.start(EXAMPLE, *launch.arguments(), STANDIN_LOAD_SECONDS="60")
    wait_until(lambda: launch.has_record("load"), "load running")
    pids = [launch.record(record_name(launch, role))["pid"] for role in launch.ports]
    process.kill()
    process.communicate()
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), "servers gone", 30)


def test_zombies_that_nobody_collects_are_not_waited_for(launch: Launch) -> None:
    # The first process of a container often collects no orphans: here the script's parent adopts and forgets them.
    copy = launch.folder / PACKAGE.name
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("*.log", "__pycache__"))
    profile = copy / "profiles" / "common.env"
    grace = f"STOP_GRACE={load_profile('cpu').settings['STOP_GRACE']}\n"
    assert grace in profile.read_text()
    profile.write_text(profile.read_text().replace(grace, "STOP_GRACE=55\n"))
    become_subreaper = "ctypes.CDLL(None).prctl(36, 1)"
    adopt = f"import ctypes, subprocess, sys; {become_subreaper}; sys.exit(subprocess.run(sys.argv[1:]).returncode)"
    process = subprocess.Popen(
        [sys.executable, "-c", adopt, "bash", str(copy / EXAMPLE), *launch.arguments()],
        env={**launch.environment, "STANDIN_LOAD_SECONDS": "60"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: launch.has_record("load"), "load running")
    begin = time.monotonic()
    os.kill(launch.record(record_name(launch, "decoder"))["pid"], signal.SIGKILL)
    assert launch.finish(process).returncode == 1
    assert time.monotonic() - begin < 50


def test_serve_prints_a_request_and_stays(launch: Launch) -> None:
    process = launch.start(EXAMPLE, *launch.arguments("--serve"))
    assert process.stdout
    line = process.stdout.readline()
    assert re.match(rf"curl http://127\.0\.0\.1:{launch.ports['proxy']}/v1/completions ", line)
    assert process.poll() is None
    assert option(launch.record("load")["argv"], "--calibrate") == "only"
    assert "stand-in load runs" in (launch.run_dir / "calibration.log").read_text()
    process.send_signal(signal.SIGTERM)
    assert launch.finish(process).returncode == 143


def test_a_closed_output_ends_everything(launch: Launch) -> None:
    process = launch.start(EXAMPLE, *launch.arguments("--serve"), STANDIN_DELAY_VLLM="1")
    assert process.stderr
    process.stderr.close()
    assert process.wait(TIMEOUT_S) == 141
    assert launch.running() == []


def test_an_answer_from_another_program_is_not_readiness(launch: Launch) -> None:
    process = launch.start(EXAMPLE, *launch.arguments(), STANDIN_DELAY_KV="60")
    wait_until(lambda: launch.has_record(record_name(launch, "kv")), "KV server running")
    with socket.create_server(("127.0.0.1", launch.ports["kv"])):
        done = launch.finish(process)
    assert done.returncode == 1
    assert f"port {launch.ports['kv']} is answered by another program" in done.stderr


def test_lmcache_without_its_store_fails_the_example(launch: Launch) -> None:
    program = f"{launch.environment['STANDIN_PYTHON']} {launch.folder}/degraded.py"
    Path(launch.folder, "degraded.py").write_text(
        "import os, sys\n"
        "print('LMCache WARNING: System will operate in degraded mode (recompute).', flush=True)\n"
        f"os.execv(sys.executable, [sys.executable, {str(STANDINS / 'standin_server.py')!r},"
        " 'vllm', *sys.argv[1:]])\n"
    )
    done = launch.run(EXAMPLE, *launch.arguments(), VLLM_PROGRAM=program)
    assert done.returncode == 1
    assert "LMCache in the prefiller works without its KV store" in done.stderr


@pytest.mark.parametrize("flags", [(), ("--redis-url",)])
def test_redis_backend(launch: Launch, flags: tuple[str, ...]) -> None:
    url = f"redis://:s3cret@127.0.0.1:{launch.ports['kv']}/0"
    if flags:
        server = subprocess.Popen(
            [launch.environment["STANDIN_PYTHON"], str(STANDINS / "standin_server.py"),
             "redis", str(launch.ports["kv"])],
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            wait_until(lambda: socket.socket().connect_ex(("127.0.0.1", launch.ports["kv"])) == 0, "Redis up")
            done = launch.run(EXAMPLE, *launch.arguments("--backend=redis"), DISAGG_REDIS_URL=url)
        finally:
            server.kill()
            server.wait()
    else:
        url = f"redis://127.0.0.1:{launch.ports['kv']}"
        done = launch.run(EXAMPLE, *launch.arguments("--backend=redis"))
    assert done.returncode == 0, done.stderr
    assert "s3cret" not in done.stdout + done.stderr
    record = launch.record(record_name(launch, "prefiller"))
    assert record["env"]["LMCACHE_REMOTE_URL"] == url
    assert launch.has_record(f"redis-{launch.ports['kv']}") == (not flags)
    assert not (launch.run_dir / "kv_secret").exists()


@pytest.mark.skipif(shutil.which("redis-server") is None, reason="redis-server is not installed")
def test_the_password_of_the_redis_that_is_started_is_in_no_argument_list_and_no_log(launch: Launch) -> None:
    """With the real server: who does not have it is refused, and it goes with the run."""
    real = shutil.which("redis-server")  # the stand-ins' folder comes first in the path that the launcher gets
    process = launch.start(EXAMPLE, *launch.arguments("--backend=redis", "--serve"), REDIS_SERVER_PROGRAM=str(real))
    secret_file, seen, secret = launch.run_dir / "kv_secret", set[bytes](), "?"
    try:

        def serves() -> bool:
            seen.update(launch.command_lines())
            assert process.poll() is None
            return all(launch.has_record(record_name(launch, role)) for role in ("prefiller", "decoder", "proxy"))

        wait_until(serves, "the stack runs")
        assert secret_file.stat().st_mode & 0o777 == 0o600
        secret = read_secret(str(secret_file))
        assert launch.record(record_name(launch, "decoder"))["env"]["DISAGG_KV_SECRET_FILE"] == str(secret_file)
        with socket.create_connection(("127.0.0.1", launch.ports["kv"]), 10) as stranger:
            stranger.sendall(b"PING\r\n")
            assert stranger.recv(100).startswith(b"-NOAUTH")
            stranger.sendall(f"AUTH {secret}\r\n".encode())
            assert stranger.recv(100).startswith(b"+OK")
        seen.update(launch.command_lines())
    finally:
        process.send_signal(signal.SIGINT)
        done = launch.finish(process)
    assert any(b"redis-server" in line and str(launch.ports["kv"]).encode() in line for line in seen)
    assert not [line for line in seen if secret.encode() in line]
    for record in launch.records.glob("*.json"):
        assert secret not in record.read_text(), "arguments and environment"
    assert secret not in done.stdout + done.stderr
    for path in launch.run_dir.rglob("*"):
        assert path.is_dir() or secret not in path.read_text(errors="replace"), path
    assert not secret_file.exists()


@pytest.mark.parametrize(("size", "status"), [("8mb", 0), ("900000gb", 1)])
def test_shm_backend(launch: Launch, size: str, status: int) -> None:
    """With the real server: it ends with the stack, and its reason not to start is shown."""
    done = launch.run(EXAMPLE, *launch.arguments("--backend=shm"), KV_SHM_SIZE=size, LMCACHE_REMOTE_URL="lm://other:1")
    assert done.returncode == status, done.stderr
    if status:
        assert "shm_server: --size 900000gb: " in done.stderr
        assert "MiB of memory are available" in done.stderr
        return
    for role in ("prefiller", "decoder"):
        environment = launch.record(record_name(launch, role))["env"]
        assert environment["DISAGG_SHM_URL"] == f"shm://{launch.run_dir}/kv_store.sock"
        assert "LMCACHE_REMOTE_URL" not in environment
    assert f"kv-server is ready on socket {launch.run_dir}/kv_store.sock" in done.stderr
    assert not (launch.run_dir / "kv_store.sock").exists()


@pytest.mark.parametrize(("size", "status"), [("64mb", 0), ("900000gb", 1)])
def test_mp_backend(launch: Launch, size: str, status: int) -> None:
    """With LMCache's real server: it ends with the stack and leaves no memory, its reason not to start is shown."""
    pytest.importorskip("lmcache", reason="LMCache is not installed: its server is what is started")
    launch.timeout_s = 240  # it imports torch first
    done = launch.run(EXAMPLE, *launch.arguments("--backend=mp"), KV_MP_SIZE=size)
    assert done.returncode == status, done.stderr
    if status:
        assert "mp_server: error: --size 900000gb: /dev/shm has " in done.stderr
    else:
        assert "lmcache.mp.port" in str(launch.record(record_name(launch, "decoder"))["argv"])
    assert list(Path("/dev/shm").glob(f"*disagg-mp-{launch.ports['kv']}-*")) == []


def test_nixl_backend(launch: Launch) -> None:
    """No KV server; a port of a vLLM server that is in use is told before anything starts."""
    launch.ports["kv"] = free_ports_in_a_row(2)
    done = launch.run(EXAMPLE, *launch.arguments("--backend=nixl"), LMCACHE_REMOTE_URL="lm://other:1")
    assert done.returncode == 0, done.stderr
    assert "kv-server" not in done.stderr
    for index, role in enumerate(("prefiller", "decoder")):
        environment = launch.record(record_name(launch, role))["env"]
        assert environment["VLLM_NIXL_SIDE_CHANNEL_PORT"] == str(launch.ports["kv"] + index)
        assert "LMCACHE_REMOTE_URL" not in environment
    port = free_ports_in_a_row(2) + 1
    with socket.create_server(("127.0.0.1", port)):
        done = launch.run(EXAMPLE, *launch.arguments("--backend=nixl", f"--kv-port={port - 1}"))
    assert done.returncode == 1
    assert f"port {port} is used by another program: stop it, or give another --kv-port" in done.stderr


def test_there_is_no_kv_server_to_start_for_nixl(launch: Launch) -> None:
    done = launch.run(LAUNCHER, "kv-server", *launch.arguments("--backend=nixl"))
    assert done.returncode == 1
    assert "with --backend nixl there is no KV server to start: decoders fetch from prefillers" in done.stderr


@pytest.mark.parametrize("role", ["prefiller", "decoder", "proxy", "kv-server"])
def test_the_launcher_runs_one_server_in_the_foreground(launch: Launch, role: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as store:
        if role in ("prefiller", "decoder"):
            launch.ports["kv"] = store.getsockname()[1]
        process = launch.start(LAUNCHER, role, *launch.arguments())
        name = record_name(launch, role.split("-")[0])
        wait_until(lambda: launch.has_record(name) or process.poll() is not None, f"{role} running")
        assert process.poll() is None, process.communicate()[1]
        assert launch.record(name)["pid"] == process.pid
        process.terminate()
        process.wait(TIMEOUT_S)
        launch.kill_leftovers()
        process.communicate(timeout=TIMEOUT_S)


def test_a_password_does_not_reach_the_log(launch: Launch) -> None:
    Path(launch.folder, "shout.py").write_text("import os\nprint(os.environ['LMCACHE_REMOTE_URL'])\n")
    program = f"{launch.environment['STANDIN_PYTHON']} {launch.folder}/shout.py"
    done = launch.run(
        LAUNCHER, "decoder", *launch.arguments("--backend=redis"),
        VLLM_PROGRAM=program, DISAGG_REDIS_URL="redis://me:s3cret@127.0.0.1:1/0", DISAGG_PREPARED="1",
    )  # fmt: skip
    assert done.stdout == "redis://me:***@127.0.0.1:1/0\n"


def test_a_second_run_in_the_same_directory_is_refused(launch: Launch, tmp_path: Path) -> None:
    process = launch.start(EXAMPLE, *launch.arguments(), STANDIN_LOAD_SECONDS="60")
    wait_until(lambda: launch.has_record("load"), "load running")
    before = {path: path.stat().st_mtime_ns for path in launch.run_dir.iterdir()}
    (tmp_path / "second").mkdir()
    second = Launch(tmp_path / "second")
    second.run_dir = launch.run_dir
    done = second.run(EXAMPLE, *second.arguments())
    assert done.returncode == 1
    assert f"error: another run writes its logs to {launch.run_dir}: " in done.stderr
    assert "--run-dir" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in launch.run_dir.iterdir()} == before
    process.terminate()
    assert launch.finish(process).returncode == 143
    # Afterwards it is free again.
    assert second.run(EXAMPLE, *second.arguments()).returncode == 0


class CommandLines(threading.Thread):
    """All command lines that processes of this machine had while it ran."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.seen: set[bytes] = set()
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.is_set():
            for entry in Path("/proc").glob("[0-9]*/cmdline"):
                with contextlib.suppress(OSError):
                    self.seen.add(entry.read_bytes())

    def __enter__(self) -> CommandLines:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.join()


def test_secrets_are_in_no_argument_list(launch: Launch) -> None:
    port, password, key = launch.ports["kv"], f"p{launch.mark}", f"k{launch.mark}"
    server = subprocess.Popen(
        [launch.environment["STANDIN_PYTHON"], str(STANDINS / "standin_server.py"), "redis", str(port)],
        stdout=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0, "Redis up")
        with CommandLines() as lines:
            process = launch.start(
                EXAMPLE, *launch.arguments("--backend=redis", "--serve"), DISAGG_PROXY_API_KEY=key,
                DISAGG_REDIS_URL=f"redis://me:{password}@127.0.0.1:{port}/0",
            )  # fmt: skip
            assert process.stdout
            request = process.stdout.readline()
            process.terminate()
            done = launch.finish(process)
    finally:
        server.kill()
        server.wait()
    assert done.returncode == 143, done.stderr
    assert any(b"standin_server.py" in line for line in lines.seen)
    assert [line for line in lines.seen if password.encode() in line or key.encode() in line] == []
    # The request to try sends the key, by its variable's name.
    assert '-H "Authorization: Bearer $DISAGG_PROXY_API_KEY"' in request
    for name in ("load", f"proxy-{launch.ports['proxy']}"):
        assert launch.record(name)["env"]["DISAGG_PROXY_API_KEY"] == key
    assert password not in "".join(path.read_text() for path in launch.run_dir.glob("*.log"))


def test_a_newer_vllm_is_told_and_tried(launch: Launch, fake_builds: Path) -> None:
    old, new = fake_builds / "vllm-0.26.0.dist-info", fake_builds / "vllm-9.1.0.dist-info"
    old.rename(new)
    (new / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 9.1.0\n")
    done = launch.run(EXAMPLE, *launch.arguments(device="cuda"), PYTHONPATH=str(fake_builds), STANDIN_CUDA_CARDS="2")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("[disagg] warning: vllm 9.1.0 is newer than what was tested") == 1
