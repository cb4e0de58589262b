"""What only processes of the same user may use: Unix sockets and secret files. Standard library only.

python -m disagg_prefill_lmcache_v1.same_user FILE    makes a file with a secret, if there is none
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import stat
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

# Path of a file with this run's secret: Redis's password.
SECRET_VARIABLE = "DISAGG_KV_SECRET_FILE"
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid


@contextlib.contextmanager
def _address(path: str) -> Iterator[str]:
    """The path as a socket's address: the kernel takes 107 bytes, so by way of the directory's descriptor."""
    folder = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{os.path.basename(path)}"
    finally:
        os.close(folder)


def listen(path: str) -> socket.socket:
    """A listening stream socket at ``path`` with mode 0600; one that nobody listens on any more gives way.

    It is for the start of a program: other threads must not make files meanwhile (umask).

    Raises:
        OSError: it cannot be made, or another process listens there.
    """
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        with _address(path) as address:
            if stat.S_ISSOCK(_mode(path)) and not _is_listening(address):
                os.unlink(path)
            listening.bind(address)
        listening.listen(128)
    except BaseException:
        listening.close()
        raise
    finally:
        os.umask(mask)
    return listening


def _mode(path: str) -> int:
    try:
        return os.lstat(path).st_mode
    except FileNotFoundError:
        return 0


def _is_listening(address: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(address)
        except ConnectionRefusedError:
            return False
        except OSError:
            return True  # another user's, or one that is busy
    return True


def connect(path: str, timeout_s: float) -> socket.socket:
    """A connection to a process of the same user.

    Raises:
        OSError: nobody listens there, or somebody else does.
    """
    connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connected.settimeout(timeout_s)
        with _address(path) as address:
            connected.connect(address)
        if peer(connected)[1] != os.geteuid():
            raise PermissionError("another user listens there")
    except BaseException:
        connected.close()
        raise
    return connected


def peer(connected: socket.socket) -> tuple[int, int]:
    """Process and user of the other end, as the kernel knows them: who connected, or who began to listen."""
    pid, uid, _ = _CREDENTIALS.unpack(connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return pid, uid


# Secrets


def write_secret(path: Path, *, anew: bool = True) -> None:
    """A secret at ``path``, mode 0600, as a line of Redis's configuration; ``anew``: in the place of an old one."""
    partial = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(f"requirepass {secrets.token_hex(32)}\n")
        if anew:
            partial.replace(path)
        else:
            with contextlib.suppress(FileExistsError):  # another server of the run was first
                os.link(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_secret(path: str) -> str:
    """The secret in a file: its last word.

    Raises:
        OSError: it cannot be read. ValueError: others can read it too, or it is empty.
    """
    with open(path, encoding="utf-8") as file:
        status = os.fstat(file.fileno())
        words = file.read(4096).split()
    if status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise ValueError(f"{path}: must be this user's, and not readable by others (mode 0600)")
    if not words:
        raise ValueError(f"{path} is empty")
    return words[-1]


if __name__ == "__main__":
    write_secret(Path(sys.argv[1]), anew=False)
