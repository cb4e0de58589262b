"""TCP ports and Unix sockets of this machine: which are taken, by whom, and whether a server answers."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import time
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from disagg_prefill_lmcache_v1.launch.messages import Failure, Progress, info
from disagg_prefill_lmcache_v1.same_user import connect, peer

HOST = "127.0.0.1"
LISTEN = "0A"  # the state in /proc/net/tcp
OLD_CONNECTIONS_S = 70.0  # the kernel keeps their remains for 60 s
# Addresses that a server on the loopback address would collide with: it, any, and both as IPv6 writes them.
_LOCAL = re.compile(r"(0100007F|0{8}|0{16}FFFF00000100007F|0{32})")
ANY = ("0.0.0.0", "::")


def _collides(host: str) -> re.Pattern[str]:
    """Of the addresses in the kernel's tables, those that a server on ``host`` would collide with."""
    if host in ANY:
        return re.compile(r"[0-9A-F]+")
    with contextlib.suppress(OSError):  # else a name, or IPv6: the server itself will tell
        packed = socket.inet_aton(host)
        return re.compile(rf"{_LOCAL.pattern}|{packed[::-1].hex().upper()}")
    return _LOCAL


def port_rows(port: int, host: str = HOST) -> list[tuple[str, int]]:
    """State and inode of each TCP socket on this local port that a server on ``host`` would collide with."""
    rows = []
    address = _collides(host)
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in Path("/proc/net", table).read_text(encoding="ascii").splitlines()[1:]:
                words = line.split()
                local, _, number = words[1].partition(":")
                if int(number, 16) == port and address.fullmatch(local):
                    rows.append((words[3], int(words[9])))
    return rows


def is_listening(port: int, host: str = HOST) -> bool:
    """Whether a server has this port."""
    return any(state == LISTEN for state, _ in port_rows(port, host))


def port_is_ours(port: int, pids: Iterable[int], host: str = HOST) -> bool:
    """Whether the listening socket belongs to one of these processes; True where that cannot be seen."""
    sockets = {f"socket:[{inode}]" for state, inode in port_rows(port, host) if state == LISTEN}
    if not sockets:
        return True
    for pid in pids:
        with contextlib.suppress(OSError):
            for entry in os.scandir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    if os.readlink(entry) in sockets:
                        return True
    return False


def free_port(in_a_row: int = 1) -> int:
    """A port that nothing listens on, nor on the next ones."""
    while True:
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            first: int = stack.enter_context(socket.create_server((HOST, 0))).getsockname()[1]
            for port in range(first + 1, first + in_a_row):
                stack.enter_context(socket.create_server((HOST, port)))
            return first


def tcp_answers(port: int, timeout_s: float = 2.0, host: str = HOST) -> bool:
    """One quick try to connect."""
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout_s):
        return True
    return False


def answers(address: int | str, host: str = HOST) -> bool:
    """Whether somebody listens on a port, or on the Unix socket with this path."""
    return socket_answers(address) if isinstance(address, str) else tcp_answers(address, host=host)


def address_text(address: int | str) -> str:
    """For messages."""
    return f"socket {address}" if isinstance(address, str) else f"port {address}"


def socket_answers(path: str, timeout_s: float = 2.0) -> bool:
    """Whether a server of this user has the Unix socket, in one quick try."""
    with contextlib.suppress(OSError):
        connect(path, timeout_s).close()
        return True
    return False


def socket_is_ours(path: str, pids: Iterable[int]) -> bool:
    """Whether one of these processes listens on the Unix socket; True where that cannot be seen."""
    with contextlib.suppress(OSError), connect(path, 2.0) as connected:
        return peer(connected)[0] in pids
    return True


def http_answers(port: int, path: str, timeout_s: float = 2.0, key: str = "", host: str = HOST) -> bool:
    """Whether a GET of this path, with an API ``key``, is answered with 200, in one quick try."""
    fields = f"Host: localhost\r\nAuthorization: Bearer {key}\r\n" if key else "Host: localhost\r\n"
    deadline = time.monotonic() + timeout_s
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout_s) as connection:
        connection.sendall(f"GET {path} HTTP/1.0\r\n{fields}\r\n".encode())
        answer = b""
        while b"\n" not in answer and len(answer) < 1024 and time.monotonic() < deadline:
            received = connection.recv(1024)
            if not received:
                break
            answer += received
        return re.match(rb"HTTP/1\.\d 200\b", answer) is not None
    return False


def settle_kv_port(
    port: int, *, given: bool, others: Collection[int], pause: Callable[[], None], host: str = HOST
) -> int:
    """The port that the KV server takes: this one, or the next without remains of old connections.

    LMCache's server binds without SO_REUSEADDR, so such remains would stop it. A port that a person has ``given`` is
    waited for, with a ``pause`` in each round. ``others`` are the stack's other ports.

    Raises:
        Failure: the given port is in use, or there is none.
    """
    wanted = port
    with Progress() as progress:
        while rows := port_rows(port, host):
            if not given:
                port += 1
                while port in others:
                    port += 1
                if port > 65535:
                    raise Failure("no free port found for the KV server: give one with --kv-port")
                continue
            if any(state == LISTEN for state, _ in rows):
                raise Failure(f"port {port} is used by another program: stop it, or give another --kv-port")
            if progress.elapsed_s > OLD_CONNECTIONS_S:
                raise Failure(
                    f"port {port} still has old connections after {OLD_CONNECTIONS_S:.0f} s: give another --kv-port"
                )
            progress.show(f"waiting until old connections on port {port} (--kv-port) are gone")
            pause()
    if port != wanted:
        info(f"KV server takes port {port}: {wanted} still has old connections")
    return port
