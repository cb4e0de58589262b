"""Ports: who has them, who answers, and which one the KV server takes."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
from launch_harness import free_ports

from disagg_prefill_lmcache_v1.launch import ports
from disagg_prefill_lmcache_v1.launch.messages import Failure
from disagg_prefill_lmcache_v1.launch.ports import http_answers, is_listening, port_is_ours, settle_kv_port, tcp_answers
from disagg_prefill_lmcache_v1.launch.processes import Machine


@pytest.fixture
def port() -> int:
    return free_ports(1)[0]


@contextlib.contextmanager
def old_connection(port: int) -> Iterator[socket.socket]:
    """A connection whose listener is gone: a server without SO_REUSEADDR cannot bind while it lasts."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen()
        client = socket.create_connection(("127.0.0.1", port))
        server, _ = listener.accept()
    with client, server:
        yield client
        # The client closes first, so that nothing lingers on the server's port.
        client.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::", "::1"])
def test_who_listens(host: str, port: int) -> None:
    collides = host != "::1"
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    assert not is_listening(port)
    assert port_is_ours(port, [])  # nobody can be blamed
    with socket.create_server((host, port), family=family):
        assert is_listening(port) == collides
        assert port_is_ours(port, [1, os.getpid()])
        assert port_is_ours(port, [10**8]) == (not collides)


def test_no_two_processes_share_the_blame(port: int) -> None:
    command = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    with socket.create_server(("127.0.0.1", port)), subprocess.Popen(command, stdin=subprocess.PIPE) as other:
        assert not port_is_ours(port, [other.pid])
        other.communicate()


@pytest.mark.parametrize(
    ("reply", "good"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n", True),
        (b"HTTP/1.0 404 Not Found\r\n\r\n", False),
        (b"HTTP/1.1 2000\r\n\r\n", False),
        (b"+PONG\r\n", False),
        (b"", False),
        (None, False),  # silence
    ],
)
def test_an_answer_is_a_200(reply: bytes | None, good: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1024)
                if reply is None:
                    connection.recv(1024)  # until the client gives up
                else:
                    connection.sendall(reply)

        thread = threading.Thread(target=serve)
        thread.start()
        begin = time.monotonic()
        assert http_answers(port, "/health", 0.3) == good
        assert time.monotonic() - begin < 30
        thread.join()
    assert not http_answers(port, "/health", 0.3)
    assert not tcp_answers(port, 0.3)


@pytest.mark.parametrize(("path", "sent"), [("/ready", True), ("/health", False)])
def test_the_key_of_the_proxy_goes_to_the_proxy_alone(path: str, sent: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISAGG_PROXY_API_KEY", "sesame")
    with socket.create_server(("127.0.0.1", 0)) as server:
        asked = []

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                asked.append(connection.recv(1024))
                connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")

        thread = threading.Thread(target=serve)
        thread.start()
        assert Machine().answers(server.getsockname()[1], path)
        thread.join()
    assert (b"\r\nAuthorization: Bearer sesame\r\n" in asked[0]) is sent


def settle(port: int, *, given: bool = False, others: tuple[int, ...] = ()) -> int:
    return settle_kv_port(port, given=given, others=others, pause=lambda: time.sleep(0.02))


def test_a_port_with_old_connections_is_left_for_the_next(port: int, capsys: pytest.CaptureFixture[str]) -> None:
    with old_connection(port):
        settled = settle(port, others=(port + 1, port + 2))
    assert settled > port + 2
    assert capsys.readouterr().err == f"[disagg] KV server takes port {settled}: {port} still has old connections\n"


def test_a_port_in_time_wait_counts_as_old_connections(port: int) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", port))
        listener.listen()
        client = socket.create_connection(("127.0.0.1", port))
        server, _ = listener.accept()
        server.close()  # the side that closes first keeps the port in TIME_WAIT
        client.close()
    with socket.socket() as probe, pytest.raises(OSError, match="in use"):
        probe.bind(("127.0.0.1", port))
    assert settle(port) > port


def test_a_port_that_was_asked_for_is_waited_for(port: int) -> None:
    with contextlib.ExitStack() as stack:
        stack.enter_context(old_connection(port))
        pauses = 0

        def pause() -> None:
            nonlocal pauses
            pauses += 1
            if pauses == 3:
                stack.close()

        assert settle_kv_port(port, given=True, others=(), pause=pause) == port
        assert pauses >= 3


def test_it_is_not_waited_for_without_end(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "OLD_CONNECTIONS_S", 0.1)
    with old_connection(port), pytest.raises(Failure, match="still has old connections after") as caught:
        settle(port, given=True)
    assert "--kv-port" in str(caught.value)


def test_a_port_that_was_asked_for_and_is_in_use_is_refused(port: int) -> None:
    with socket.create_server(("127.0.0.1", port)), pytest.raises(Failure, match=f"port {port} is used by another"):
        settle(port, given=True)


def test_a_free_port_is_kept(port: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert (settle(port), settle(port, given=True)) == (port, port)
    assert capsys.readouterr().err == ""


def test_ports_run_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "port_rows", lambda port, host: [("06", 1)])
    with pytest.raises(Failure, match="no free port found"):
        settle(65530)
