"""A connected socket to a KV store."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import struct

from disagg_prefill_lmcache_v1.kv.stores import base


class Link:
    """A connected socket to a store; used by one thread at a time.

    It blocks in the kernel, with the kernel's own timeout, until all of a chunk has come or gone: with a timeout of
    Python's it would need the interpreter's lock after every piece, and the thread that drives the engine holds it.
    """

    def __init__(self, connected: socket.socket) -> None:
        self.socket = connected
        self._all = 0 if isinstance(connected, ssl.SSLSocket) else socket.MSG_WAITALL  # not for TLS
        self.set_timeout(base.IO_TIMEOUT_S)
        self._buffer = bytearray(64)
        self._start = self._end = 0  # what of the buffer was received and not yet taken

    def set_timeout(self, seconds: float) -> None:
        """How long to wait for the next byte."""
        if isinstance(self.socket, ssl.SSLSocket):
            self.socket.settimeout(seconds)
            return
        self.socket.settimeout(None)
        timeout = struct.pack("@ll", int(seconds), int(seconds % 1 * 1e6))
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeout)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)

    def send(self, data: bytes | memoryview) -> None:
        try:
            self.socket.sendall(data)
        except BlockingIOError:
            raise TimeoutError("timed out") from None

    def _receive(self, view: memoryview, flags: int) -> int:
        try:
            n = self.socket.recv_into(view, 0, flags)
        except BlockingIOError:
            raise TimeoutError("timed out") from None
        if n == 0:
            raise ConnectionResetError("the KV store closed the connection")
        return n

    def read_into(self, view: memoryview) -> None:
        if self._start < self._end:
            n = min(len(view), self._end - self._start)
            view[:n] = self._buffer[self._start : self._start + n]
            self._start += n
            view = view[n:]
        while len(view):
            view = view[self._receive(view, self._all) :]

    def read(self, length: int) -> bytes:
        data = bytearray(length)
        self.read_into(memoryview(data))
        return bytes(data)

    def read_with_descriptor(self, length: int) -> tuple[bytes, int]:
        """The first bytes on a Unix socket, and the open file that came with them."""
        try:
            data, descriptors, _, _ = socket.recv_fds(self.socket, length, 1, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            raise TimeoutError("timed out") from None
        if len(data) < length or not descriptors:
            for descriptor in descriptors:
                os.close(descriptor)
            raise ConnectionResetError("the KV store has ended, or does not let this user in")
        return data, descriptors[0]

    def read_line(self) -> bytes:
        """Up to CR LF, which is left out."""
        while (at := self._buffer.find(b"\r\n", self._start, self._end)) < 0:
            if self._start:
                self._buffer[: self._end - self._start] = self._buffer[self._start : self._end]
                self._start, self._end = 0, self._end - self._start
            if self._end == len(self._buffer):
                self._buffer.extend(bytes(len(self._buffer)))
            self._end += self._receive(memoryview(self._buffer)[self._end :], 0)
        line = bytes(self._buffer[self._start : at])
        self._start = at + 2
        return line

    def skip(self, length: int) -> None:
        scratch = memoryview(bytearray(min(length, 1 << 20)))
        while length > 0:
            part = scratch[: min(length, len(scratch))]
            self.read_into(part)
            length -= len(part)

    def close(self) -> None:
        self.socket.close()

    def abort(self) -> None:
        """Close it, and wake a thread that waits for an answer."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.close()


def connect_tcp(address: tuple[str, int]) -> socket.socket:
    """A TCP connection for requests and answers. Raises OSError."""
    connected = socket.create_connection(address, timeout=base.CONNECT_TIMEOUT_S)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connected


def dial(address: tuple[str, int]) -> Link:
    """A link to ``address`` by TCP. Raises OSError."""
    return Link(connect_tcp(address))
