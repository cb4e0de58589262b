"""Where does the time go when a KV cache is stored and loaded? Every stage by itself, beside what limits it.

    python benchmarks/kv_path.py [--device cpu|cuda] [--shape 8b tiny] [--backend lm redis shm] [--plot FILE]

Without vLLM's engine, on one prompt of --tokens tokens in a paged KV cache of that shape:

- limits: a copy in memory, a loopback socket (one connection), a copy between host and device;
- stages, chunk by chunk: gather (KV cache to a chunk), to host, hand-over (to the thread that sends), put (until the
  store has it), fetch (until it is in staging memory), to device, scatter (chunk to the KV cache);
- the whole way: "store, engine held" until the engine may go on, "store, visible" until the store has everything,
  "load" until the KV cache has it; once with this project's path and once with LMCache's own ("stock").

GB/s of KV bytes and ms for one chunk; medians. On CUDA the stock path is what LMCache takes on that machine: its
kernels, or torch operations where they do not load.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from kv_results import Bench, plot, times

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))
os.environ["LMCACHE_LOG_LEVEL"] = os.environ.get("LMCACHE_LOG_LEVEL", "ERROR")
os.environ["LMCACHE_TRACK_USAGE"] = "false"

from lmcache.utils import CacheEngineKey
from lmcache.v1.cache_engine import LMCacheEngineBuilder
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.metadata import LMCacheMetadata

from disagg_prefill_lmcache_v1.kv import transfer as kv_transfer
from disagg_prefill_lmcache_v1.kv.device_copy import CudaCopy, HostCopy
from disagg_prefill_lmcache_v1.kv.layout import BlockLayout
from disagg_prefill_lmcache_v1.kv.mover import KVMover
from disagg_prefill_lmcache_v1.kv.stores import registry

# layers, KV heads, head size, dtype, block size on CPU
SHAPES: dict[str, tuple[int, int, int, torch.dtype, int]] = {
    "8b": (32, 8, 128, torch.bfloat16, 128),
    "tiny": (8, 4, 64, torch.float32, 128),
}
SERVERS = {
    "lm": [sys.executable, "-m", "lmcache.v1.server", "127.0.0.1", "{port}"],
    "redis": ["redis-server", "--bind", "127.0.0.1", "--port", "{port}", "--save", "", "--appendonly", "no"],
    "shm": [
        *(sys.executable, "-m", "disagg_prefill_lmcache_v1.kv.stores.shm_server"),
        *("{socket}", "--size", "{size}"),
    ],
}
CHUNK = 256  # tokens


# KV caches as vLLM has them


def make_mover(device: str, shape: str, tokens: int) -> tuple[KVMover, torch.Tensor]:
    """Paged KV caches for ``tokens`` tokens full of random numbers, and the slots of those tokens in a mixed order."""
    layers, heads, head_size, dtype, block = SHAPES[shape]
    if device == "cpu":
        from vllm import _custom_ops as ops
        from vllm.platforms import current_platform

        current_platform.import_kernels()
        block_shape = (heads, block, 2 * head_size)

        def write(key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
            keys, values = cache.view(cache.shape[0], heads, 2 * block, -1).chunk(2, dim=2)
            ops.cpu_attn_reshape_and_cache(key, value, keys, values, slots, "vec")
    else:
        block = 16
        block_shape = (block, heads, 2 * head_size)  # FlashAttention's, K and V of a head side by side

        def write(key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
            flat = cache.view(-1, heads, 2 * head_size)
            flat[slots, :, :head_size], flat[slots, :, head_size:] = key, value

    layout = BlockLayout.learn(write, block_shape, heads, block, head_size, dtype, device)
    blocks = -(-tokens // block)
    caches = [torch.randn((blocks, *block_shape), device=device).to(dtype) for _ in range(layers)]
    order = torch.randperm(blocks)
    slots = (order[:, None] * block + torch.arange(block)).flatten()[:tokens]
    return KVMover(caches, layout), slots.to(device)


def make_copy(mover: KVMover) -> Any:
    cuda = mover.device.type == "cuda"
    return CudaCopy(mover, CHUNK) if cuda else HostCopy(mover)


# servers and engines


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def taken(pid: int) -> int:
    """Bytes that the shared memory of the server ``pid`` has got from the kernel."""
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            if "memfd:" in os.readlink(fd):
                return os.stat(fd).st_blocks * 512
    return 0


@contextmanager
def server(kind: str, size: int) -> Iterator[str]:
    """A store of ``kind`` of its own for ``size`` bytes; its URL."""
    port = free_port()
    path = Path(tempfile.gettempdir(), f"kv_path-{os.getpid()}.sock")
    command = [word.format(port=port, size=size, socket=path) for word in SERVERS[kind]]
    if kind == "redis":
        command += [*os.environ.get("REDIS_ARGS", "").split(), "--maxmemory", str(2 * size)]
    env = {**os.environ, "PYTHONPATH": f"{REPO}:{os.environ.get('PYTHONPATH', '')}"}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=env)
        try:
            deadline = time.monotonic() + 120
            while True:
                with socket.socket(socket.AF_UNIX if kind == "shm" else socket.AF_INET) as probe:
                    if probe.connect_ex(str(path) if kind == "shm" else ("127.0.0.1", port)) == 0:
                        break
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise SystemExit(f"kv_path: the {kind} server did not start: {log.read().decode()[-500:]}")
                time.sleep(0.05)
            if kind == "shm":  # it takes its memory in the background
                while taken(process.pid) < size and time.monotonic() < deadline:
                    time.sleep(0.05)
            yield f"shm://{path}" if kind == "shm" else f"{kind}://127.0.0.1:{port}"
        finally:
            process.kill()
            process.wait()
            path.unlink(missing_ok=True)


@contextmanager
def engine_of(url: str, shape: str, copy: Any, size: int) -> Iterator[Any]:
    """An LMCache engine of its own with ``size`` bytes of staging memory."""
    layers, heads, head_size, dtype, _ = SHAPES[shape]
    extra: dict[str, Any] = {"force_store_wait": True}
    plugins: dict[str, Any] = {"remote_url": url}
    if url.startswith("shm://"):
        extra |= {
            "remote_storage_plugin.shm.module_path": "disagg_prefill_lmcache_v1.kv.stores.shm",
            "remote_storage_plugin.shm.class_name": "ShmConnectorAdapter",
            "remote_storage_plugin.shm.url": url,
        }
        plugins = {"remote_storage_plugins": ["shm"]}
    config = LMCacheEngineConfig.from_defaults(
        chunk_size=CHUNK,
        local_cpu=False,
        max_local_cpu_size=size / 2**30,
        remote_serde="naive",
        save_unfull_chunk=True,
        pre_caching_hash_algorithm="sha256_cbor",
        extra_config=extra,
        **plugins,
    )
    metadata = LMCacheMetadata(
        f"kv-path-{uuid.uuid4().hex[:8]}", 1, 1, 0, 0, dtype, (layers, 2, CHUNK, heads, head_size), chunk_size=CHUNK
    )
    name = uuid.uuid4().hex
    engine = LMCacheEngineBuilder.get_or_create(name, config, metadata, copy, lambda *a: None, lambda *a: None)
    engine.post_init()
    engine.gpu_connector = copy(metadata, config) if callable(copy) else copy
    try:
        yield engine
    finally:
        # LMCache's own Redis client waits for itself when it is closed; the process ends without it
        ending = threading.Thread(target=LMCacheEngineBuilder.destroy, args=(name,), daemon=True)
        ending.start()
        ending.join(10)


class StockHostCopy:
    """LMCache's device seam over this project's CPU copy: LMCache has none for CPU."""

    def __init__(self, mover: KVMover) -> None:
        self.mover = mover

    def batched_from_gpu(self, objs: Any, starts: list[int], ends: list[int], **kwargs: Any) -> None:
        for obj, start, end in zip(objs, starts, ends, strict=True):
            self.mover.gather(obj.tensor, kwargs["slot_mapping"][start:end])

    def batched_to_gpu(self, objs: Any, starts: list[int], ends: list[int], **kwargs: Any) -> None:
        for obj, start, end in zip(objs, starts, ends, strict=True):
            self.mover.scatter(obj.tensor, kwargs["slot_mapping"][start:end])


def stock_copy(mover: KVMover) -> Any:
    """LMCache's own copy, made once the engine's metadata is known."""
    if mover.device.type == "cpu":
        return lambda metadata, config: StockHostCopy(mover)

    def create(metadata: Any, config: Any) -> Any:
        from lmcache.utils import EngineType
        from lmcache.v1.gpu_connector import CreateGPUConnector

        return CreateGPUConnector(config, metadata, EngineType.VLLM, layout_hints={"kv_layout": "NHD"})

    return create


# measurements


def measure_limits(bench: Bench, device: str, count: int) -> None:
    size = bench.chunk_bytes
    a = [torch.ones(size, dtype=torch.uint8) for _ in range(4)]
    b = [torch.ones(size, dtype=torch.uint8) for _ in range(4)]
    bench.add("limit", "copy in memory", times(lambda i: b[i % 4].copy_(a[i % 4]), count))
    bench.add("limit", "loopback socket", socket_times(size, count))
    if device == "cuda":
        host = torch.ones(size, dtype=torch.uint8).pin_memory()
        card = torch.ones(size, dtype=torch.uint8, device=device)

        def copy(target: torch.Tensor, source: torch.Tensor) -> Callable[[int], None]:
            def work(i: int) -> None:
                target.copy_(source, non_blocking=True)
                torch.cuda.synchronize()

            return work

        bench.add("limit", "device to host", times(copy(host, card), count))
        bench.add("limit", "host to device", times(copy(card, host), count))


def socket_times(size: int, count: int) -> list[float]:
    """Another process sends, this one reads into the same memory again and again."""
    code = (
        "import socket,sys\ns=socket.create_connection(('127.0.0.1',int(sys.argv[1])))\n"
        "d=memoryview(bytes(int(sys.argv[2])))\nwhile s.recv(1): s.sendall(d)\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        command = [sys.executable, "-c", code, str(listener.getsockname()[1]), str(size)]
        with subprocess.Popen(command) as process:
            listener.settimeout(30)
            link, _ = listener.accept()
            target = memoryview(bytearray(size))

            def work(i: int) -> None:
                link.sendall(b"x")
                got = 0
                while got < size:
                    got += link.recv_into(target[got:])

            seconds = times(work, count)
            link.close()
            process.wait(30)
    return seconds


def measure_copies(bench: Bench, mover: KVMover, slots: torch.Tensor, count: int) -> None:
    chunks = [torch.ones(mover.shape(CHUNK), dtype=mover.dtype) for _ in range(count)]
    parts = [slice(i * CHUNK, (i + 1) * CHUNK) for i in range(count)]
    if mover.device.type != "cuda":
        bench.add("copy", "gather", times(lambda i: mover.gather(chunks[i], slots[parts[i]]), count))
        bench.add("copy", "scatter", times(lambda i: mover.scatter(chunks[i], slots[parts[i]]), count))
        return
    chunks = [chunk.pin_memory() for chunk in chunks[:8]]
    staging = torch.empty(mover.shape(CHUNK), dtype=mover.dtype, device=mover.device)
    rows, views = mover.rows_of(slots), mover.row_views(staging)

    def finished(work: Callable[[int], None]) -> Callable[[int], None]:
        def finish(i: int) -> None:
            work(i)
            torch.cuda.synchronize()

        return finish

    bench.add("copy", "gather", times(finished(lambda i: mover.move_rows(views, rows[:, parts[i]], False)), count))
    bench.add("copy", "to host", times(finished(lambda i: chunks[i % 8].copy_(staging, non_blocking=True)), count))
    bench.add("copy", "to device", times(finished(lambda i: staging.copy_(chunks[i % 8], non_blocking=True)), count))
    bench.add("copy", "scatter", times(finished(lambda i: mover.move_rows(views, rows[:, parts[i]], True)), count))
    bench.note("copy", "gather, only started", times(lambda i: mover.move_rows(views, rows[:, parts[i]], False), count))
    torch.cuda.synchronize()


def hand_over_times(count: int) -> list[float]:
    """From the engine's thread until a thread that sends has begun."""
    seconds = []
    with ThreadPoolExecutor(4) as threads:
        for _ in range(count):
            begin = time.perf_counter()
            seconds.append(threads.submit(time.perf_counter).result() - begin)
    return seconds


def measure_transport(bench: Bench, kind: str, client: Any, mover: KVMover, count: int) -> None:
    keys = [CacheEngineKey("transport", 1, 0, random.getrandbits(60), mover.dtype) for _ in range(count)]
    shape = mover.shape(CHUNK)

    def put(i: int) -> None:
        tensors, _ = client.stage([keys[i]], [shape], mover.dtype)
        if tensors[0] is not None:  # a store may have it from the call that does not count
            client.commit([keys[i]], tensors)

    bench.add(kind, "put, one at a time", times(put, count))
    fresh = [CacheEngineKey("transport", 1, 0, random.getrandbits(60), mover.dtype) for _ in range(count)]
    with ThreadPoolExecutor(client.links) as threads:
        begin = time.perf_counter()
        tensors, _ = client.stage(fresh, [shape] * count, mover.dtype)
        list(threads.map(lambda pair: client.commit([pair[0]], [pair[1]]), zip(fresh, tensors, strict=True)))
        seconds = time.perf_counter() - begin
    bench.add(kind, f"put, {client.links} at a time", [seconds], count * bench.chunk_bytes)

    def fetch(some: list[CacheEngineKey]) -> None:
        fetch = client.fetch(some)
        got = 0
        for index, _ in fetch:
            got += 1
            fetch.done(index)
        fetch.close()
        if got != len(some):
            raise SystemExit(f"kv_path: {kind}: {got} of {len(some)} chunks came back")

    bench.add(kind, "fetch, one at a time", times(lambda i: fetch([keys[i]]), count))
    bench.add(kind, f"fetch, {client.links} at a time", times(lambda i: fetch(keys), 5), count * bench.chunk_bytes)


def measure_whole(bench: Bench, kind: str, name: str, engine: Any, mover: KVMover, slots: torch.Tensor, n: int) -> None:
    """The whole way through ``engine.store`` and ``engine.retrieve``."""
    backend = next(b for b in engine.storage_manager.storage_backends.values() if "Remote" in str(b))
    held, visible, loaded = [], [], []
    whole = slots.numel() * bench.chunk_bytes // CHUNK
    sync = torch.cuda.synchronize if mover.device.type == "cuda" else lambda: None
    for i in range(n + 1):
        tokens = [random.randrange(1, 30000) for _ in range(slots.numel())]
        kwargs = {"kvcaches": mover.caches, "slot_mapping": slots, "req_id": f"r{i}"}
        sync()
        begin = time.perf_counter()
        engine.store(tokens, torch.ones(len(tokens), dtype=torch.bool), **kwargs)
        held.append(time.perf_counter() - begin)
        keys = [key for _, _, key in engine.token_database.process_tokens(tokens=tokens)]
        deadline = time.monotonic() + 120
        # LMCache's own clients share one connection and are asked as LMCache asks them
        while not all(backend.contains(key) for key in reversed(keys)):
            if time.monotonic() > deadline:
                raise SystemExit(f"kv_path: {kind} {name}: the chunks did not arrive")
        visible.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        mask = engine.retrieve(tokens, torch.ones(len(tokens), dtype=torch.bool), **kwargs)
        sync()
        loaded.append(time.perf_counter() - begin)
        if not bool(mask.all()):
            raise SystemExit(f"kv_path: {kind} {name}: {int(mask.sum())} of {len(tokens)} tokens came back")
    bench.add(kind, f"{name}: store, engine held", held[1:], whole)
    bench.add(kind, f"{name}: store, visible", visible[1:], whole)
    bench.add(kind, f"{name}: load", loaded[1:], whole)


def run(args: argparse.Namespace, shape: str) -> dict[str, Any]:
    layers, heads, head_size, dtype, _ = SHAPES[shape]
    bench = Bench(2 * layers * CHUNK * heads * head_size * dtype.itemsize)
    count = max(2, args.tokens // CHUNK)
    total = count * bench.chunk_bytes
    print(f"{shape} on {args.device}: {count} chunks of {bench.chunk_bytes / 2**20:.0f} MiB", flush=True)
    mover, slots = make_mover(args.device, shape, count * CHUNK)
    measure_limits(bench, args.device, count)
    measure_copies(bench, mover, slots, count)
    bench.note("copy", "hand-over", hand_over_times(count))
    staging = 2 * total + (256 << 20)
    for kind in args.backend:
        room = total * (4 if kind == "shm" else 16)  # shm drops old chunks; touching its memory takes a while
        if args.stock and kind != "shm":
            try:
                with server(kind, room) as url, engine_of(url, shape, stock_copy(mover), staging) as engine:
                    measure_whole(bench, kind, "stock", engine, mover, slots, args.rounds)
            except (RuntimeError, ValueError, AttributeError, KeyError) as error:
                print(f"  {kind:8s} stock: does not work here: {type(error).__name__}: {str(error)[:200]}", flush=True)
        with server(kind, room) as url, engine_of(url, shape, None, staging) as engine:
            backend = next(b for b in engine.storage_manager.storage_backends.values() if "Remote" in str(b))
            client = registry.connect(url, backend.loop, backend.local_cpu_backend)
            backend.connection = client
            for thread in threading.enumerate():
                if thread.name == "kv-store-map":  # the client maps it in the background
                    thread.join()
            transfer = kv_transfer.KVTransfer(
                engine, mover, make_copy(mover), client, lambda keys: None, lambda key: None
            )
            measure_transport(bench, kind, client, mover, count)
            engine.store, engine.retrieve = transfer.store, transfer.retrieve
            measure_whole(bench, kind, "own", engine, mover, slots, args.rounds)
            asyncio.run_coroutine_threadsafe(client.close(), backend.loop).result(10)
    return {
        "shape": shape,
        "device": args.device,
        "chunk_bytes": bench.chunk_bytes,
        "chunks": count,
        "rows": bench.rows,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cpu", "cuda"], default=default)
    parser.add_argument(
        "--shape", nargs="+", choices=list(SHAPES), default=["8b"] if default == "cuda" else list(SHAPES)
    )
    parser.add_argument("--backend", nargs="+", choices=list(SERVERS), default=list(SERVERS))
    parser.add_argument("--tokens", type=int, default=8192 if default == "cuda" else 2048, help="of the prompt")
    parser.add_argument("--rounds", type=int, default=5, help="of the whole way")
    parser.add_argument("--no-stock", dest="stock", action="store_false", help="leave LMCache's own path out")
    parser.add_argument("--json", type=Path, help="write the numbers there")
    parser.add_argument("--plot", type=Path, help="write an SVG there")
    args = parser.parse_args()
    if args.tokens < CHUNK:
        parser.error(f"--tokens {args.tokens}: at least {CHUNK}, one chunk, is allowed")
    if "redis" in args.backend and not shutil.which("redis-server"):
        print("kv_path: redis-server is missing: install it, or leave redis out of --backend", file=sys.stderr)
        return 1
    results = [run(args, shape) for shape in args.shape]
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")
    if args.plot:
        args.plot.write_text(plot(results))
    for thread in threading.enumerate():
        if thread is not threading.main_thread() and not thread.daemon:
            sys.stdout.flush()
            os._exit(0)  # threads of LMCache's engines that do not end
    return 0


if __name__ == "__main__":
    sys.exit(main())
