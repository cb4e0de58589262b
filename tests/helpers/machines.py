"""Machines for tests: network namespaces of this one, joined by links that can delay, lose and be cut.

Each namespace has one network device, a TUN device whose other end is held by one process, the wire: it reads the IP
packets that a machine sends and hands each to the machine that it is for, later, or not at all. ``tc netem`` on veth
devices would do the same, but few kernels of virtual machines have it.

Needs root, iproute2 and /dev/net/tun (:func:`why_not`). What is made here ends with the process or the ``with`` block.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import fcntl
import mmap
import os
import random
import select
import shutil
import signal
import struct
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

NETWORK = "10.77.0"
MTU = 8000  # bytes: as on the network of a cluster, and few packets for the wire
_CLONE_NEWNET = 0x40000000
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_LIBC = ctypes.CDLL(None, use_errno=True)
_STATE = struct.Struct("<dd64B")  # delay in seconds, share that is lost, whether each machine's link is cut


def why_not() -> str:
    """Why this machine can have none, "" if it can."""
    if os.geteuid():
        return "network namespaces need root"
    if not shutil.which("ip"):
        return "network namespaces need the command ip of iproute2"
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR))
    except OSError as error:
        return f"/dev/net/tun cannot be opened: {error.strerror}"
    name = f"disagg-try-{os.getpid()}"
    done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    return f"no network namespace can be made: {done.stderr.strip()}" if done.returncode else ""


def enter(namespace: str) -> None:
    """The calling thread uses the network of this namespace from here on."""
    with open(f"/run/netns/{namespace}") as file:
        if _LIBC.setns(file.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {namespace}")


class Network:
    """Machines by name; a context manager.

    The state of the links lies in memory that the wire shares, so that a change holds from the next packet on.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self._prefix = f"disagg-{os.getpid()}-"
        self._state = mmap.mmap(-1, _STATE.size)
        self.set_links()

    def namespace(self, name: str) -> str:
        return self._prefix + name

    def address(self, name: str) -> str:
        return f"{NETWORK}.{self.names.index(name) + 1}"

    def command(self, name: str, *words: str) -> list[str]:
        """A command that runs on this machine."""
        return ["ip", "netns", "exec", self.namespace(name), *words]

    def set_links(self, delay_s: float = 0.0, loss: float = 0.0, cut: Sequence[str] = ()) -> None:
        """How the links are from now on: delay one way, share of packets that are lost, machines without a link."""
        cuts = [int(name in cut) for name in self.names]
        self._state[:] = _STATE.pack(delay_s, loss, *cuts, *[0] * (64 - len(cuts)))

    def __enter__(self) -> Network:
        try:
            for name in self.names:
                _ip("netns", "add", self.namespace(name))
                _ip("-n", self.namespace(name), "link", "set", "lo", "up")
            read_end, write_end = os.pipe()
            self._wire = os.fork()
            if self._wire == 0:
                self._run_wire(write_end)
            os.close(write_end)
            with os.fdopen(read_end, "rb") as ready:
                if ready.read(1) != b"1":
                    raise RuntimeError("the wire between the machines did not start")
            for name in self.names:
                words = ["-n", self.namespace(name)]
                _ip(*words, "addr", "add", f"{self.address(name)}/24", "dev", "tun0")
                _ip(*words, "link", "set", "tun0", "mtu", str(MTU), "txqueuelen", "10000", "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(AttributeError, OSError):
            os.kill(self._wire, signal.SIGKILL)
            os.waitpid(self._wire, 0)
        for name in self.names:
            subprocess.run(["ip", "netns", "del", self.namespace(name)], capture_output=True, check=False)

    # the wire

    def _run_wire(self, ready: int) -> None:
        try:
            _LIBC.prctl(1, signal.SIGKILL, 0, 0, 0)  # it ends with the test
            devices = [_tun_of(self.namespace(name)) for name in self.names]
            os.write(ready, b"1")
            os.close(ready)
            self._carry(devices)
        finally:
            os._exit(1)

    def _carry(self, devices: list[int]) -> None:
        poll = select.poll()
        for device in devices:
            poll.register(device, select.POLLIN)
        of = {device: number for number, device in enumerate(devices)}
        late: collections.deque[tuple[float, int, bytes]] = collections.deque()
        rng = random.Random(0)
        while True:
            wait_ms = max(0.0, late[0][0] - time.monotonic()) * 1000 if late else 1000
            for device, _ in poll.poll(wait_ms + 0.5 if wait_ms else 0):
                delay_s, loss, *cut = _STATE.unpack(self._state[:])
                for packet in _packets(device):
                    to = packet[19] - 1 if packet[0] >> 4 == 4 and len(packet) >= 20 else -1
                    if not 0 <= to < len(devices) or cut[of[device]] or cut[to] or rng.random() < loss:
                        continue
                    if delay_s:
                        late.append((time.monotonic() + delay_s, devices[to], packet))
                    else:
                        _deliver(devices[to], packet)
            while late and late[0][0] <= time.monotonic():
                _, device, packet = late.popleft()
                _deliver(device, packet)


def _packets(device: int) -> Iterator[bytes]:
    for _ in range(64):
        try:
            yield os.read(device, 65536)
        except OSError:
            return


def _deliver(device: int, packet: bytes) -> None:
    with contextlib.suppress(OSError):  # the machine is full, or gone: the packet is lost
        os.write(device, packet)


def _tun_of(namespace: str) -> int:
    """The wire's end of the device tun0 that it makes in a namespace."""
    enter(namespace)
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH14s", b"tun0", _IFF_TUN | _IFF_NO_PI, b""))
    return device


def _ip(*words: str) -> None:
    subprocess.run([str(Path(shutil.which("ip") or "ip")), *words], check=True, capture_output=True, text=True)
