"""A real ``lmcache server`` and LMCache's own adapters on it, without an engine: KV caches are tensors made here."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
import zmq
from launch_harness import REPOSITORY, free_ports, wait_until
from lmcache.integration.vllm.vllm_multi_process_adapter import (
    LMCacheMPSchedulerAdapter,
    LMCacheMPWorkerAdapter,
    LoadStoreOp,
    ParallelStrategy,
)

from disagg_prefill_lmcache_v1.kv.mp_client import GuardedWorker

BLOCK = 16  # tokens
TIMEOUT_S = 3.0
HEARTBEAT_S = 1.0
ONE_RANK = ParallelStrategy(mla_only=False, vllm_world_size=1, vllm_worker_id=0, tp_size=1, pp_size=1, n_servers=1)
EXTRA = {"lmcache.mp.mq_timeout": TIMEOUT_S, "lmcache.mp.heartbeat_interval": HEARTBEAT_S}


class MPServer:
    """The process; ``size``: its memory for KV."""

    def __init__(self, log: Path, size: str = "50mb", *words: str) -> None:
        (self.port,) = free_ports(1)
        self._log, self._words = log, ("--size", size, *words)
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "disagg_prefill_lmcache_v1.kv.mp_server", "127.0.0.1", str(self.port)]
        command += ["--chunk-size", str(BLOCK), *self._words]
        environment = {**os.environ, "LMCACHE_TRACK_USAGE": "false", "PYTHONPATH": str(REPOSITORY)}
        with self._log.open("ab") as out:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment, start_new_session=True
            )

    def freeze(self) -> None:
        os.killpg(self.process.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.killpg(self.process.pid, signal.SIGCONT)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def terminate(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=60)

    def memory(self) -> list[Path]:
        """The shared memory with the KV."""
        return list(Path("/dev/shm").glob(f"*disagg-mp-{self.port}-*"))

    @property
    def url(self) -> str:
        return f"tcp://127.0.0.1:{self.port}"


class Engine:
    """One engine's worker and scheduler side."""

    def __init__(self, server: MPServer, first_timeout_s: float = 240.0) -> None:
        extra = {**EXTRA, "lmcache.mp.mq_timeout": first_timeout_s}  # the server may still be starting
        self.worker = LMCacheMPWorkerAdapter(
            server.url, zmq.Context.instance(), "m", BLOCK, ONE_RANK, extra_config=extra
        )
        self.scheduler = LMCacheMPSchedulerAdapter(
            [server.url], zmq.Context.instance(), "m", BLOCK, ONE_RANK, extra_config=extra
        )
        self.worker._mq_timeout = self.scheduler._mq_timeout = TIMEOUT_S
        self.guard = GuardedWorker(self.worker, TIMEOUT_S)
        generator = torch.Generator().manual_seed(1)
        self.caches = {f"layer{i}": torch.randn(64, 2, BLOCK, 64, generator=generator) for i in range(2)}
        self.worker.register_kv_caches(self.caches, layout_hints={"kv_layout": "HND"})
        self._count = 0

    def store(self, tokens: list[int], blocks: list[int]) -> bool:
        """Hand KV of ``blocks`` over; whether LMCache says that it was stored."""
        name = self._name()
        self.worker.submit_store_request(name, self._op(tokens, blocks), None)
        future = self.worker.store_futures.pop(name, None)
        return bool(future and future.result(timeout=0))

    def load(self, tokens: list[int], blocks: list[int], name: str) -> bool:
        """Load what the lookup ``name`` found."""
        self.worker.submit_retrieve_request(name, self._op(tokens, blocks), None)
        self.worker.get_finished(set())
        failed = self.worker.get_block_ids_with_load_errors()
        assert failed in (set(), set(blocks))
        return not failed

    def find(self, tokens: list[int], seconds: float = 60.0) -> tuple[str, int]:
        """Name and result (tokens) of a lookup as a decode server makes it."""
        name, found = self._name(), None
        self.scheduler.maybe_submit_lookup_request(name, tokens)
        end = time.monotonic() + seconds
        while (found := self.scheduler.check_lookup_result(name)) is None:
            assert time.monotonic() < end, "no answer to a lookup"
            time.sleep(0.005)
        return name, found

    def is_found(self, tokens: list[int]) -> bool:
        """Whether a lookup finds all; its locks are given back."""
        name, found = self.find(tokens)
        if found:
            self.scheduler.free_lookup_locks(tokens, 0, found, name)
        self.scheduler.cleanup_lookup_result(name)
        self.scheduler.end_session(name)
        return found == len(tokens)

    def _name(self) -> str:
        self._count += 1
        return f"r{id(self)}-{self._count}"

    @staticmethod
    def _op(tokens: list[int], blocks: list[int]) -> LoadStoreOp:
        return LoadStoreOp(token_ids=tokens, block_ids=[blocks], start=0, end=len(tokens))

    def close(self) -> None:
        self.guard.leave()
        self.worker.shutdown()
        self.scheduler.shutdown()


def healthy_again(engine: Engine, seconds: float = 60.0) -> None:
    wait_until(lambda: engine.worker.is_healthy, "the heartbeat finds the server again", seconds)
    wait_until(lambda: engine.scheduler.is_healthy, "the scheduler's heartbeat finds the server again", seconds)
