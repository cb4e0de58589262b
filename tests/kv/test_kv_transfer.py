"""kv_transfer: stores and loads through real stores, whatever becomes of the store meanwhile."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import threading
from types import SimpleNamespace

import pytest
import torch
from launch_harness import wait_until

pytest.importorskip("lmcache", reason="LMCache is not installed: its servers and formats are what is tested")

from kv_stores import CHUNK, HEAD_SIZE, HEADS, LAYERS, Server, Staging
from lmcache.utils import CacheEngineKey

from disagg_prefill_lmcache_v1.kv import transfer as kv_transfer
from disagg_prefill_lmcache_v1.kv.device_copy import HostCopy
from disagg_prefill_lmcache_v1.kv.layout import BlockLayout
from disagg_prefill_lmcache_v1.kv.mover import KVMover
from disagg_prefill_lmcache_v1.kv.settings import from_environment
from disagg_prefill_lmcache_v1.kv.stores import base, registry

BLOCK = 8
TOKENS = 3 * CHUNK + 5  # the last chunk is part-filled


class Engine:
    """What kv_transfer needs of LMCache's engine: keys for chunks, health, statistics."""

    def __init__(self):
        self.healthy = True
        self.stats_monitor = self
        self.token_database = self
        self.finished = []

    def is_healthy(self):
        return self.healthy

    def is_frozen(self):
        return False

    def process_tokens(self, tokens, mask=None, request_configs=None):
        skip = 0 if mask is None else int((~mask).sum())
        for start in range(skip, len(tokens), CHUNK):
            end = min(start + CHUNK, len(tokens))
            yield start, end, CacheEngineKey("model", 1, 0, hash(tuple(tokens[:end])) % 2**60, torch.float32)

    class Stats:
        def profile(self):
            return threading.Lock()  # any context manager

        profile_process_tokens = profile_from_gpu = profile_to_gpu = profile

        def time_to_store(self):
            return 0.0

        time_to_retrieve = time_to_store

    def on_store_request(self, tokens):
        return self.Stats()

    on_retrieve_request = on_store_request

    def on_store_finished(self, stats, tokens):
        self.finished.append(("stored", tokens))

    def on_retrieve_finished(self, stats, tokens):
        self.finished.append(("loaded", int(tokens)))


class SmallStaging(Staging):
    """Staging memory for ``room`` chunks at a time."""

    def __init__(self, room):
        super().__init__()
        self.room = room

    def allocate(self, shape, dtype, fmt, busy_loop=True, **kwargs):
        taken = sum(obj.get_ref_count() > 0 for obj in self.taken)
        return super().allocate(shape, dtype, fmt) if taken < self.room else None


def make_mover(blocks=3 * TOKENS // BLOCK):
    def write(key, value, cache, slots):
        flat = cache.view(-1, HEADS, 2 * HEAD_SIZE)
        flat[slots, :, :HEAD_SIZE], flat[slots, :, HEAD_SIZE:] = key, value

    layout = BlockLayout.learn(write, (BLOCK, HEADS, 2 * HEAD_SIZE), HEADS, BLOCK, HEAD_SIZE, torch.float32)
    return KVMover([torch.randn(blocks, BLOCK, HEADS, 2 * HEAD_SIZE) for _ in range(LAYERS)], layout)


def some_slots(mover, tokens=TOKENS):
    blocks = torch.randperm(mover.caches[0].shape[0])[: -(-tokens // BLOCK)]
    return (blocks[:, None] * BLOCK + torch.arange(BLOCK)).flatten()[:tokens]


def kv_of(mover, slots):
    chunk = torch.empty(mover.shape(slots.numel()))
    mover.gather(chunk, slots)
    return chunk


class Side:
    """A server's end: KV cache, client, transfer."""

    def __init__(self, url, loop, staging=None, client=None):
        self.loop = loop
        self.mover = make_mover()
        self.staging = staging or Staging()
        self.client = client or registry.connect(url, loop, self.staging)
        self.engine = Engine()
        self.on_the_way, self.ended = [], []
        copy = HostCopy(self.mover)
        self.transfer = kv_transfer.KVTransfer(
            self.engine, self.mover, copy, self.client, self.on_the_way.extend, self.ended.append
        )

    def store(self, tokens, slots, mask=None):
        self.transfer.store(tokens, mask, slot_mapping=slots, req_id="r")
        wait_until(lambda: sorted(map(str, self.on_the_way)) == sorted(map(str, self.ended)), "every put has ended")

    def load(self, tokens, slots, mask=None, cached=0):
        return self.transfer.retrieve(tokens, mask, slot_mapping=slots, vllm_cached_tokens=cached, req_id="r")

    def kept(self, now=False):
        """Chunks of staging memory that were not given back."""
        if not now:
            self.transfer._releaser.submit(lambda: None).result(60)  # what was on its way back is back
        return sum(obj.get_ref_count() > 0 for obj in self.staging.taken)

    def close(self):
        self.transfer.close()
        asyncio.run_coroutine_threadsafe(self.client.close(), self.loop).result(60)


@pytest.fixture
def sides(server, loop):
    made = [Side(server.url, loop), Side(server.url, loop)]
    yield made
    for side in made:
        side.close()


def prompt(n=TOKENS):
    return torch.randint(1 << 30, (n,)).tolist()


def test_what_is_stored_is_loaded(sides):
    one, other = sides
    tokens, here, there = prompt(), some_slots(one.mover), some_slots(other.mover)
    before = [cache.clone() for cache in other.mover.caches]
    one.store(tokens, here)
    loaded = other.load(tokens, there)
    assert bool(loaded.all())
    assert loaded.numel() == TOKENS
    assert torch.equal(kv_of(other.mover, there), kv_of(one.mover, here))
    untouched = torch.ones(before[0].shape[0] * BLOCK, dtype=torch.bool)
    untouched[there] = False
    for cache, old in zip(other.mover.caches, before, strict=True):
        cells = (-1, HEADS, 2 * HEAD_SIZE)
        assert torch.equal(cache.view(cells)[untouched], old.view(cells)[untouched])
    assert one.engine.finished == [("stored", TOKENS)]
    assert other.engine.finished == [("loaded", TOKENS)]
    assert one.kept() == other.kept() == 0


def test_blocks_that_vllm_had_are_not_written(sides):
    one, other = sides
    tokens, here, there = prompt(), some_slots(one.mover), some_slots(other.mover)
    one.store(tokens, here)
    cached = CHUNK + 3 * BLOCK  # in the middle of the second chunk
    mask = torch.ones(TOKENS, dtype=torch.bool)
    mask[:CHUNK] = False
    before = kv_of(other.mover, there)
    loaded = other.load(tokens, there, mask, cached)
    assert loaded.nonzero().flatten().tolist() == list(range(CHUNK, TOKENS))
    after = kv_of(other.mover, there)
    assert torch.equal(after[:, :, :cached], before[:, :, :cached])
    assert torch.equal(after[:, :, cached:], kv_of(one.mover, here)[:, :, cached:])


def test_only_what_is_missing_is_stored(sides):
    one, other = sides
    tokens, here = prompt(), some_slots(one.mover)
    mask = torch.ones(TOKENS, dtype=torch.bool)
    mask[: 2 * CHUNK] = False
    one.store(tokens, here, mask)
    keys = [key for _, _, key in one.engine.process_tokens(tokens)]
    assert [one.client.count_present([key]) for key in keys] == [0, 0, 1, 1]
    # nothing after a gap counts as loaded
    assert not bool(other.load(tokens, some_slots(other.mover)).any())
    assert other.kept() == 0


@pytest.mark.parametrize("server", ["lm", "redis"], indirect=True)  # shm is its own staging memory
def test_a_request_larger_than_the_staging_memory(server, loop):
    one, other = (Side(server.url, loop, SmallStaging(2)) for _ in range(2))
    try:
        n = 12 * CHUNK
        for side in (one, other):
            side.mover = make_mover(2 * n // BLOCK)
            side.transfer = kv_transfer.KVTransfer(
                side.engine, side.mover, HostCopy(side.mover), side.client,
                side.on_the_way.extend, side.ended.append,
            )  # fmt: skip
        tokens, here, there = prompt(n), some_slots(one.mover, n), some_slots(other.mover, n)
        one.store(tokens, here)
        assert bool(other.load(tokens, there).all())
        assert torch.equal(kv_of(other.mover, there), kv_of(one.mover, here))
        assert one.kept() == other.kept() == 0
    finally:
        one.close()
        other.close()


class Later:
    """A copy whose reads end later, in another order of things, as on a device."""

    def __init__(self, copy):
        self.copy, self.ended = copy, threading.Event()

    def __getattr__(self, name):
        return getattr(self.copy, name)

    def scatter(self, *args):
        self.copy.scatter(*args)
        return SimpleNamespace(synchronize=self.ended.wait)


def test_memory_is_given_back_when_the_device_has_read_it(sides):
    one, other = sides
    tokens, here, there = prompt(), some_slots(one.mover), some_slots(other.mover)
    one.store(tokens, here)
    other.transfer._load_copy = copy = Later(HostCopy(other.mover))
    in_use = other.client.stats if hasattr(other.client, "stats") else lambda: {"pinned": other.kept(now=True)}
    assert bool(other.load(tokens, there).all())  # does not wait for the device
    assert in_use()["pinned"] == 4
    copy.ended.set()
    other.transfer._releaser.shutdown(wait=True)
    assert in_use()["pinned"] == 0


def test_several_at_once_do_not_mix(sides):
    one, other = sides
    requests = [(prompt(), some_slots(one.mover)) for _ in range(8)]
    wanted = [kv_of(one.mover, slots) for _, slots in requests]
    threads = [threading.Thread(target=one.store, args=request) for request in requests]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for (tokens, _), kv in zip(requests, wanted, strict=True):
        there = some_slots(other.mover)
        assert bool(other.load(tokens, there).all())
        assert torch.equal(kv_of(other.mover, there), kv)


class Broken:
    """A fetch that breaks off."""

    def __init__(self, chunks, whole):
        self.chunks, self.done, self.close = chunks, whole.done, whole.close

    def __iter__(self):
        return self.chunks


def test_nothing_writes_to_the_kv_cache_after_a_load_has_failed(sides):
    """Its blocks are computed again, or another request's, from then on."""
    one, other = sides
    tokens, here, there = prompt(), some_slots(one.mover), some_slots(other.mover)
    one.store(tokens, here)
    go, ended, scatter, fetch = threading.Event(), [], other.mover.scatter, other.client.fetch

    def slow(chunk, slots):
        assert go.wait(60)
        scatter(chunk, slots)
        ended.append(slots)

    def breaking(keys):
        whole = fetch(keys)
        return Broken(some(iter(whole)), whole)

    def some(chunks):
        yield next(chunks)
        yield next(chunks)
        raise OSError("the store is gone")

    other.mover.scatter, other.client.fetch = slow, breaking
    threading.Timer(0.3, go.set).start()
    with pytest.raises(OSError, match="the store is gone"):
        other.load(tokens, there)
    assert len(ended) == 2
    assert other.kept() == 0


class Dying:
    """A copy that ends the store after its first chunk."""

    def __init__(self, copy, server):
        self.copy, self.server, self.done = copy, server, False

    def __getattr__(self, name):
        return getattr(self.copy, name)

    def scatter(self, *args):
        written = self.copy.scatter(*args)
        if not self.done:
            self.server.stop()
        self.done = True
        return written


@pytest.mark.parametrize("kind", ["lm", "redis", "shm"])
def test_a_store_that_dies_while_loading(kind, loop):
    """What is said to be loaded is right; the next request finds no store, a later one the restarted store."""
    if kind == "redis" and not shutil.which("redis-server"):
        pytest.skip("redis-server is not installed")
    server = Server(kind)
    one, other = Side(server.url, loop), Side(server.url, loop)
    try:
        n = 12 * CHUNK
        for side in (one, other):
            side.mover = make_mover(2 * n // BLOCK)
        one.transfer._mover, one.transfer._copy = one.mover, HostCopy(one.mover)
        other.transfer._mover, other.transfer._load_copy = other.mover, Dying(HostCopy(other.mover), server)
        tokens, here, there = prompt(n), some_slots(one.mover, n), some_slots(other.mover, n)
        one.store(tokens, here)
        loaded = other.load(tokens, there)
        count = int(loaded.sum())
        assert bool(loaded[:count].all())
        assert torch.equal(kv_of(other.mover, there)[:, :, :count], kv_of(one.mover, here)[:, :, :count])
        assert not bool(other.load(tokens, there).any())
        one.store(prompt(n), here)  # ends without an exception
        assert other.kept() == one.kept() == 0
        server.start()

        def works():
            again = prompt(n)
            one.store(again, here)
            return bool(other.load(again, there).all())

        wait_until(works, "the restarted store is used")
        assert torch.equal(kv_of(other.mover, there), kv_of(one.mover, here))
    finally:
        one.close()
        other.close()
        server.stop()


def test_a_frozen_store_costs_its_deadline_not_an_answer(loop, monkeypatch):
    monkeypatch.setattr(base, "IO_TIMEOUT_S", 2.0)
    server = Server("lm")
    side = Side(server.url, loop)
    try:
        tokens, slots = prompt(), some_slots(side.mover)
        side.store(tokens, slots)
        server.freeze()
        assert not bool(side.load(tokens, slots).any())
        side.store(prompt(), slots)
        os.kill(server.process.pid, signal.SIGCONT)
        wait_until(lambda: bool(side.load(tokens, slots).all()), "the store is used again")
        assert side.kept() == 0
    finally:
        side.close()
        server.stop()


def test_chunks_of_another_length_are_missing(sides):
    one, other = sides
    tokens = prompt(CHUNK)
    (_, _, key), *_ = one.engine.process_tokens(tokens)
    tensors, _ = one.client.stage([key], [one.mover.shape(7)], torch.float32)
    one.client.commit([key], tensors)
    assert not bool(other.load(tokens, some_slots(other.mover, CHUNK)).any())
    assert other.kept() == 0


def test_an_unhealthy_engine_stores_and_loads_nothing():
    engine = Engine()
    engine.healthy = False
    store = SimpleNamespace(links=1, memory=lambda: [])
    mover = make_mover()
    transfer = kv_transfer.KVTransfer(engine, mover, HostCopy(mover), store, None, None)
    transfer.store(prompt(), None, slot_mapping=some_slots(mover))
    assert not bool(transfer.retrieve(prompt(), None, slot_mapping=some_slots(mover)).any())


@pytest.mark.parametrize("text", ["0", "two", "-1", "1000"])
def test_a_number_of_threads_that_is_none_is_refused(monkeypatch, text):
    monkeypatch.setenv("DISAGG_KV_COPY_THREADS", text)
    with pytest.raises(ValueError, match=f"DISAGG_KV_COPY_THREADS '{text}': allowed: a whole number from 1 to 256"):
        from_environment()


def test_a_device_copies_in_the_thread_that_computes():
    """Another thread has another stream, which would not wait for vLLM's."""
    mover, threads = make_mover(), []
    mover.device = torch.device("meta")
    mover.gather = lambda chunk, slots: threads.append(threading.current_thread())
    copy = HostCopy(mover)
    job = copy.begin(torch.zeros(1))
    copy.gather(torch.empty(1), job, 0, 1).synchronize()
    copy.finish(job)
    assert threads == [threading.current_thread()]


def test_rows_move_what_gather_and_scatter_move():
    mover, other = make_mover(), make_mover()
    slots, there = some_slots(mover, CHUNK), some_slots(other, CHUNK)
    chunk = torch.empty(mover.shape(CHUNK))
    mover.move_rows(mover.row_views(chunk), mover.rows_of(slots), to_cache=False)
    assert torch.equal(chunk, kv_of(mover, slots))
    part = chunk[:, :, 5:]
    other.move_rows(other.row_views(part), other.rows_of(there)[:, 5:], to_cache=True)
    assert torch.equal(kv_of(other, there)[:, :, 5:], part)
    assert not torch.equal(kv_of(other, there)[:, :, :5], chunk[:, :, :5])
