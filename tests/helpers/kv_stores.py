"""Real KV stores in processes of their own, and clients of them, for the tests of kv/."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from launch_harness import REPOSITORY, free_ports, wait_until

pytest.importorskip("lmcache", reason="LMCache is not installed: its servers and formats are what is tested")

from lmcache.utils import CacheEngineKey
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.memory_allocators.ad_hoc_memory_allocator import AdHocMemoryAllocator
from lmcache.v1.memory_management import MemoryFormat
from lmcache.v1.metadata import LMCacheMetadata

from disagg_prefill_lmcache_v1.kv.stores import registry
from disagg_prefill_lmcache_v1.launch.ports import socket_answers
from disagg_prefill_lmcache_v1.same_user import SECRET_VARIABLE, write_secret

LAYERS, HEADS, HEAD_SIZE, CHUNK = 3, 2, 16, 32
SECRETS = tempfile.TemporaryDirectory(prefix="kv-secret-")
os.environ[SECRET_VARIABLE] = str(Path(SECRETS.name, "kv_secret"))
write_secret(Path(os.environ[SECRET_VARIABLE]))
START_S = 240.0  # some import torch and LMCache first
LM_SERVER = "disagg_prefill_lmcache_v1.kv.stores.lm_server"


class Staging:
    """What a client needs of LMCache's LocalCPUBackend; counts chunks that were not given back."""

    def __init__(self, kv_heads=HEADS):
        self.config = LMCacheEngineConfig.from_defaults(chunk_size=CHUNK)
        self.metadata = LMCacheMetadata(
            "model", 1, 1, 0, 0, torch.float32, (LAYERS, 2, CHUNK, kv_heads, HEAD_SIZE), chunk_size=CHUNK
        )
        self._allocator = AdHocMemoryAllocator("cpu")
        self.taken = []

    def allocate(self, shape, dtype, fmt, **kwargs):
        shape, dtype = (x[0] if isinstance(x, list) else x for x in (shape, dtype))
        obj = self._allocator.allocate(shape, dtype, fmt)
        self.taken.append(obj)
        return obj


def key(name):
    return CacheEngineKey("model", 1, 0, abs(hash(name)), torch.float32)


def chunk(staging, tokens=CHUNK):
    obj = staging.allocate(torch.Size((2, LAYERS, tokens, HEADS * HEAD_SIZE)), torch.float32, MemoryFormat.KV_2LTD)
    obj.tensor.copy_(torch.randn(obj.tensor.shape))
    return obj


class Server:
    """A real store on a port of its own, that can be killed and started again."""

    def __init__(self, kind, size="64mb", module=None, path=None):
        self.kind, self.port, self.size, self.module = kind, free_ports(1)[0], size, module
        self.folder = tempfile.TemporaryDirectory(prefix="kv-store-")
        self.socket = str(path or Path(self.folder.name, "kv_store.sock"))
        self.url = f"shm://{self.socket}" if kind == "shm" else f"{kind}://127.0.0.1:{self.port}"
        self.start()

    def start(self):
        if self.kind == "lm":
            command = [sys.executable, "-m", self.module or LM_SERVER, "127.0.0.1", str(self.port)]
        elif self.kind == "shm":
            command = [sys.executable, "-m", "disagg_prefill_lmcache_v1.kv.stores.shm_server"]
            command += [self.socket, "--size", self.size]
        else:
            command = ["redis-server", os.environ[SECRET_VARIABLE]]  # with a password, as the launcher starts it
            command += ["--bind", "127.0.0.1", "--port", str(self.port), "--save", ""]
        self.process = subprocess.Popen(
            command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env={**os.environ, "KV_LM_SIZE": self.size},
        )  # fmt: skip
        try:
            wait_until(self.answers, f"{self.kind} store answers", START_S)
        except AssertionError:
            self.stop()
            raise

    def answers(self):
        assert self.process.poll() is None
        if self.kind == "shm":
            return socket_answers(self.socket)
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def freeze(self):
        """Until SIGCONT. It has happened only when every thread stands still."""
        os.kill(self.process.pid, signal.SIGSTOP)
        tasks = Path(f"/proc/{self.process.pid}/task")

        def stands_still() -> bool:
            with contextlib.suppress(OSError):  # a thread may just have ended
                return all((task / "stat").read_text().rpartition(")")[2].split()[0] == "T" for task in tasks.iterdir())
            return False

        wait_until(stands_still, "all threads stand still")

    def stop(self):
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait()


class Client:
    def __init__(self, server, loop, **kwargs):
        self.staging = Staging(**kwargs)
        self.loop = loop
        self.connector = registry.connect(server.url, loop, self.staging)

    def __call__(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(60)

    def put(self, keys, objs):
        self(self.connector.batched_put(keys, objs))

    def get(self, keys):
        return self(self.connector.batched_get(keys))
