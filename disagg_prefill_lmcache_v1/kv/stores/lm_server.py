"""LMCache's ``lm://`` server, with an end to its memory and without chunks that are not there.

    python -m disagg_prefill_lmcache_v1.kv.stores.lm_server HOST PORT

Messages, threads and storage are LMCache's. What differs (LMCache 0.5.6):

- it keeps at most so many bytes of chunks (``KV_LM_SIZE``, as in 512mb or 2gb; by default four fifths of the memory
  that is free at its start) and then drops those that were used least recently; LMCache's never drops one and is killed
  when memory ends;
- a chunk whose sender hung up in the middle is not stored; LMCache's says that it exists and fails whoever reads it;
- a connection that sends what cannot be understood is closed with one line in the log, not a traceback;
- a chunk is received into memory that is taken once; LMCache's takes what is missing again for every piece;
- a server that is started again at once gets its port.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
from typing import Any

from lmcache.logging import init_logger
from lmcache.v1.protocol import ClientMetaMessage
from lmcache.v1.server.__main__ import LMCacheServer
from lmcache.v1.server.storage_backend.local_backend import LMSLocalBackend

from disagg_prefill_lmcache_v1.memory import available_memory, parse_size

logger = init_logger(__name__)

SIZE_VARIABLE = "KV_LM_SIZE"


class BoundedBackend(LMSLocalBackend):
    """Chunks in memory, at most ``size`` bytes of them."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.used = 0
        self._full = False

    def contains(self, key: Any) -> bool:
        return self.get(key) is not None

    def get(self, key: Any) -> Any:
        with self.lock:
            if key in self.dict:
                self.dict.move_to_end(key)
            return self.dict.get(key)

    def put(self, client_meta: ClientMetaMessage, kv_chunk_bytes: bytearray) -> None:
        self.remove(client_meta.key)
        super().put(client_meta, kv_chunk_bytes)
        with self.lock:
            self.used += len(kv_chunk_bytes)
            while self.used > self.size:
                _, dropped = self.dict.popitem(last=False)
                self.used -= len(dropped.data)
                if not self._full:
                    self._full = True
                    logger.warning("The store is full (%d MiB): chunks are dropped from now on", self.size >> 20)

    def remove(self, key: Any) -> None:
        with self.lock:
            dropped = self.dict.pop(key, None)
            self.used -= len(dropped.data) if dropped is not None else 0


class Server(LMCacheServer):
    """Raises OSError if the address is taken."""

    def __init__(self, host: str, port: int, size: int) -> None:
        self.host, self.port = host, port
        self.data_store = BoundedBackend(size)
        self.server_socket = socket.create_server((host, port), backlog=128)

    def receive_all(self, client_socket: socket.socket, n: int) -> bytearray | None:
        """``n`` bytes; None where the client has ended before the first of them, between two messages.

        Raises:
            ValueError, OSError: there cannot be so many, or the client hung up in the middle.
        """
        if not 0 <= n <= max(self.data_store.size, ClientMetaMessage.packlength()):
            raise ValueError(f"a chunk of {n} bytes")
        data = bytearray(n)
        view, got = memoryview(data), 0
        while got < n:
            count = client_socket.recv_into(view[got:], 0, socket.MSG_WAITALL)
            if count == 0:
                if got == 0 and n == ClientMetaMessage.packlength():
                    return None
                raise ConnectionResetError("the client hung up in the middle of a message")
            got += count
        return data

    def handle_client(self, client_socket: socket.socket) -> None:
        try:
            super().handle_client(client_socket)
        except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
            logger.warning("Connection closed: %s: %s", type(error).__name__, error)


def main(arguments: list[str] | None = None) -> int:
    """Command line entry; returns the exit status."""
    words = sys.argv[1:] if arguments is None else arguments
    if len(words) != 2 or not words[1].isdecimal() or not 0 < int(words[1]) < 65536:
        print("lm_server: allowed: HOST PORT", file=sys.stderr)
        return 2
    text = os.environ.get(SIZE_VARIABLE, "")
    try:
        size = parse_size(text) if text else available_memory() // 5 * 4
    except ValueError as error:
        print(f"lm_server: {SIZE_VARIABLE} {error}", file=sys.stderr)
        return 2
    try:
        server = Server(words[0], int(words[1]), size)
    except OSError as error:
        print(f"lm_server: cannot listen on {words[0]}:{words[1]}: {error.strerror}", file=sys.stderr)
        return 1
    print(f"KV store lm://{words[0]}:{words[1]}: at most {size >> 20} MiB", flush=True)
    server.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
