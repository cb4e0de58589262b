"""The contenders of benchmarks/proxy_overhead.py: how each is installed, started, measured and ended."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
PROXY = REPOSITORY / "disagg_prefill_lmcache_v1" / "disagg_proxy_server.py"
BENCH_VENV = REPOSITORY / ".venv-bench"
PEERS = {"vllm-router": "vllm-router==0.1.17", "sglang-router": "sglang-router==0.3.2"}
NGINX = "nginx"  # the floor: a plain reverse proxy, one hop, to the decode server alone
PLOTTER = "matplotlib==3.11.2"


def tree(pid: int) -> list[int]:
    """A process and its descendants."""
    found = [pid]
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children") as file:
                for child in file.read().split():
                    found += tree(int(child))
    return found


def cpu_seconds(pid: int) -> float:
    """User and system time of a process tree, all threads, to the nanosecond."""
    total = 0
    for each in tree(pid):
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{each}/task"):
                with contextlib.suppress(OSError), open(f"/proc/{each}/task/{task}/schedstat") as file:
                    total += int(file.read().split()[0])
    return total / 1e9


def resident_bytes(pid: int) -> int:
    """Resident memory of a process tree."""
    total = 0
    for each in tree(pid):
        with contextlib.suppress(OSError), open(f"/proc/{each}/statm") as file:
            total += int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return total


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def pin(cpus: set[int]) -> None:
    """Keep this process on these CPUs; with --realtime, also ahead of whatever else the machine does."""
    os.sched_setaffinity(0, cpus)
    if Contender.realtime:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))


class Contender:
    """A proxy under test as a process pinned to some CPUs."""

    realtime = False

    def __init__(self, name: str, command: list[str], port: int, cpus: set[int], log: Path) -> None:
        self.name = name
        self.port = port
        with open(log, "wb") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=file, start_new_session=True, preexec_fn=lambda: pin(cpus)
            )

    @property
    def pid(self) -> int:
        """Root of the process tree."""
        return self.process.pid

    def stop(self) -> None:
        """End the process tree."""
        with contextlib.suppress(OSError):
            os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(OSError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def command_of(name: str, port: int, prefill: int, decode: int) -> list[str]:
    """How a contender is started."""
    servers = (f"http://127.0.0.1:{prefill}", f"http://127.0.0.1:{decode}")
    if name.startswith("ours"):
        workers = name.partition("x")[2] or "1"
        return [sys.executable, str(PROXY), "--port", str(port), "--prefiller", servers[0], "--decoder", servers[1],
                "--workers", workers]  # fmt: skip
    if name == NGINX:
        return nginx_command(port, decode)
    program = str(BENCH_VENV / "bin" / name)
    common = ["--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(free_port())]
    common += ["--prefill", servers[0], "--decode", servers[1], "--policy", "round_robin"]
    if name == "vllm-router":
        return [program, "--vllm-pd-disaggregation", "--kv-connector", "nixl", *common]
    return [program, "launch", "--pd-disaggregation", *common]


def peers_ready(names: list[str]) -> list[str]:
    """Install the peers if needed; those that can be started."""
    if NGINX in names and nginx_program() is None:
        print("nginx is not installed (apt-get install nginx) and is left out", flush=True)
        names = [name for name in names if name != NGINX]
    if not names:
        return []
    missing = [name for name in names if name != NGINX and not (BENCH_VENV / "bin" / name).exists()]
    if not list(BENCH_VENV.glob("lib/python*/site-packages/matplotlib")):
        missing.append("matplotlib")
    if missing:
        print(f"installing {', '.join(missing)} into {BENCH_VENV} ...", flush=True)
        if not (BENCH_VENV / "bin" / "python").exists():
            venv.create(BENCH_VENV, with_pip=True)
        command = [str(BENCH_VENV / "bin" / "python"), "-m", "pip", "install", "--quiet"]
        for name in missing:
            subprocess.run([*command, PEERS.get(name, PLOTTER)], check=False)
    found = [name for name in names if name == NGINX or (BENCH_VENV / "bin" / name).exists()]
    for name in set(names) - set(found):
        print(f"{name} could not be installed and is left out", flush=True)
    return found


def nginx_program() -> str | None:
    """Debian's nginx: installed, or unpacked (dpkg-deb -x) into .venv-bench."""
    places = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", str(BENCH_VENV / "usr" / "sbin")))
    return shutil.which(NGINX, path=places)


def nginx_command(port: int, decode: int) -> list[str]:
    """One worker before the decode server, connections kept on both sides, an access log, nothing buffered."""
    folder = Path(tempfile.mkdtemp(prefix="nginx-"))
    temporary = "".join(
        f"{name}_temp_path {folder}/{name};\n" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (folder / "nginx.conf").write_text(
        f"daemon off; worker_processes 1; user root; pid {folder}/pid; error_log stderr;\n"
        "worker_rlimit_nofile 65536; events { worker_connections 16384; }\n"
        f"http {{ {temporary} access_log {folder}/access.log; keepalive_requests 100000000; client_max_body_size 1g;\n"
        f"upstream decode {{ server 127.0.0.1:{decode}; keepalive 1024; keepalive_requests 100000000; }}\n"
        f"server {{ listen 127.0.0.1:{port} backlog=4096;\n"
        'location / { proxy_pass http://decode; proxy_http_version 1.1; proxy_set_header Connection "";\n'
        "proxy_buffering off; proxy_request_buffering off; proxy_read_timeout 600s; } } }\n"
    )
    return [str(nginx_program()), "-p", str(folder), "-c", str(folder / "nginx.conf")]
