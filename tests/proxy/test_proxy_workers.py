"""Starting, draining and ending: one process or several workers, and what they leave behind."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest
from proxy_harness import DEADLINE_S, PROXY, ProxyProcess, Stack, stack, wait_until

COMPLETIONS = "/v1/completions"
BODY = {"prompt": "x"}


def children(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


def ended(pid: int) -> bool:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] == "Z"
    return True


def metric(made: Stack, line: str) -> float:
    text = httpx.get(made.url + "/metrics", timeout=DEADLINE_S).text
    return sum(float(found.rpartition(" ")[2]) for found in text.splitlines() if found.startswith(line + " "))


def refused(proxy: ProxyProcess) -> bool:
    try:
        proxy.connect().close()
    except ConnectionError:
        return True
    return False


def ready_workers(made: Stack, count: int) -> list[int]:
    """The workers, once all of them listen: each has mapped the metrics by then."""
    wait_until(lambda: httpx.get(made.url + "/health").status_code == 200, "up")
    wait_until(lambda: len(children(made.proxy.process.pid)) == count, "all workers are started")
    return children(made.proxy.process.pid)


def test_a_worker_that_is_killed_is_replaced_and_no_count_is_lost() -> None:
    with stack("--workers", "2") as made:
        workers = ready_workers(made, 2)
        total = 'disagg_requests_total{outcome="ok",route="/v1/completions",stage="decode"}'

        def burst(count: int) -> None:
            threads = [
                threading.Thread(target=httpx.post, args=(made.url + COMPLETIONS,), kwargs={"json": BODY})
                for _ in range(count)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

        burst(40)
        wait_until(lambda: metric(made, total) == 40, "all are counted")  # maybe after their answers: by another worker
        os.kill(workers[0], signal.SIGKILL)
        wait_until(lambda: len(set(children(made.proxy.process.pid)) - {workers[0]}) == 2, "a new worker takes over")
        burst(20)
        wait_until(lambda: metric(made, total) == 60, "all are counted")
        assert made.proxy.stop() == 128 + signal.SIGTERM
        assert all(ended(worker) for worker in workers)


def test_while_workers_drain_nobody_else_is_let_in() -> None:
    with stack("--workers", "2") as made:
        ready_workers(made, 2)
        connection = http.client.HTTPConnection("127.0.0.1", made.proxy.port, timeout=DEADLINE_S)
        headers = {"content-type": "application/json", "x-mock": "decode.hang=3"}
        connection.request("POST", COMPLETIONS, json.dumps({**BODY, "stream": True}), headers)
        response = connection.getresponse()
        assert response.read(1)
        made.proxy.process.send_signal(signal.SIGTERM)
        wait_until(lambda: refused(made.proxy), "new clients are refused")
        assert made.proxy.process.poll() is None  # because of the stream that is still open
        made.proxy.process.send_signal(signal.SIGTERM)
        assert made.proxy.process.wait(DEADLINE_S) == 128 + signal.SIGTERM
        connection.close()


def test_a_killed_parent_leaves_nothing(tmp_path: Path) -> None:
    with stack("--workers", "2", env={"TMPDIR": str(tmp_path)}) as made:
        workers = ready_workers(made, 2)
        assert metric(made, "disagg_kv_degraded") == 0
        made.proxy.stop(signal.SIGKILL)
        wait_until(lambda: all(ended(worker) for worker in workers), "the workers end too")
        assert list(tmp_path.iterdir()) == []


# -- TLS files


@pytest.fixture(scope="module")
def tls_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tls")
    for name, more in (("good", ["-nodes"]), ("other", ["-nodes"]), ("locked", ["-passout", "pass:secret"])):
        command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-keyout", f"{name}.key", "-out", f"{name}.pem",
                   "-days", "2", "-subj", "/CN=localhost", *more]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True, cwd=folder)
    (folder / "garbage.pem").write_text("no certificate\n")
    return folder


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize(
    ("certificate", "key", "reason"),
    [
        ("garbage.pem", "good.key", "PEM"),
        ("good.pem", "garbage.pem", "PEM"),
        ("good.pem", "other.key", "mismatch"),
        ("locked.pem", "locked.key", "the key is encrypted"),
    ],
)
def test_a_bad_certificate_is_told_in_one_line(
    tls_files: Path, workers: str, certificate: str, key: str, reason: str
) -> None:
    command = [sys.executable, str(PROXY), "--port", "0", "--workers", workers, "--ssl-certfile", certificate,
               "--ssl-keyfile", key]  # fmt: skip
    result = subprocess.run(
        command, cwd=tls_files, capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL
    )
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1, result.stderr
    assert reason in result.stderr
    assert "--ssl-certfile" in result.stderr


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_start_that_fails_after_the_checks_ends_the_proxy(tls_files: Path, tmp_path: Path, workers: str) -> None:
    """The key is good when it is checked first, and gone when the server is made."""
    for name in ("good.pem", "good.key"):
        shutil.copy(tls_files / name, tmp_path)
    program = f"""
import os, sys
sys.path.insert(0, {str(PROXY.parents[1])!r})
from disagg_prefill_lmcache_v1 import disagg_proxy_server as server
real = server.listen
def listen(settings):
    open("good.key", "w").close()
    return real(settings)
server.listen = listen
if server.WORKER_ENV in os.environ:
    server.check_tls = lambda settings: None
server.__file__ = __file__
sys.exit(server.main())
"""
    (tmp_path / "start.py").write_text(program)
    command = [sys.executable, "start.py", "--port", "0", "--workers", workers, "--ssl-certfile", "good.pem",
               "--ssl-keyfile", "good.key"]  # fmt: skip
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == (3 if workers == "1" else 1)
    assert "the proxy cannot start" in result.stderr
    assert "Traceback" not in result.stderr


# -- descriptors


def limit_of(pid: int) -> tuple[int, int]:
    return resource.prlimit(pid, resource.RLIMIT_NOFILE)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_soft_limit_of_descriptors_is_raised(workers: str) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))  # the proxy inherits it
    try:
        made = Stack("--workers", workers)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    try:
        wait_until(lambda: httpx.get(made.url + "/health").status_code == 200, "up")
        for pid in (made.proxy.process.pid, *children(made.proxy.process.pid)):
            assert limit_of(pid)[0] > 256
    finally:
        made.close()


def test_the_proxys_own_shortage_is_not_the_servers_fault() -> None:
    with stack("--idle-connection-s", "0", "--health-interval-s", "3600") as made, contextlib.ExitStack() as held:
        pid = made.proxy.process.pid
        wait_until(lambda: httpx.get(made.url + "/ready").status_code == 200, "ready")
        client = http.client.HTTPConnection("127.0.0.1", made.proxy.port, timeout=DEADLINE_S)
        client.request("GET", "/health")
        client.getresponse().read()
        before, limit = limit_of(pid), made.proxy.descriptors() + 20
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (limit, before[1]))
        for _ in range(40):
            held.enter_context(made.proxy.connect())
        wait_until(lambda: made.proxy.descriptors() == limit, "no descriptor is left")
        for number in range(5):
            headers = {"content-type": "application/json", "x-request-id": f"short-{number}"}
            client.request("POST", COMPLETIONS, json.dumps(BODY), headers)
            response = client.getresponse()
            error = json.loads(response.read())["error"]
            assert (response.status, error["stage"]) == (503, "proxy")
            assert made.proxy.access_line(f"short-{number}")["outcome"] == "exhausted"
        held.close()
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
        client.close()
        answer = wait_until(lambda: httpx.post(made.url + COMPLETIONS, json=BODY), "served again")
        assert (answer.status_code, answer.headers["x-kv-state"]) == (200, "stored")
        assert not any("is down" in line for line in made.proxy.messages), made.proxy.messages
