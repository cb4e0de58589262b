"""Stores: our clients against real stores started here: LMCache's server, Redis, shared memory."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import threading
import time
import uuid
from types import SimpleNamespace

import pytest
import redis
import torch
import yaml
from launch_harness import PACKAGE, free_ports, wait_until

pytest.importorskip("lmcache", reason="LMCache is not installed: its servers and formats are what is tested")

from kv_stores import CHUNK, HEAD_SIZE, HEADS, LAYERS, Client, Staging, chunk, key
from lmcache.v1.memory_management import MemoryFormat
from lmcache.v1.storage_backend.connector.lm_connector import LMCServerConnector
from lmcache.v1.storage_backend.connector.redis_connector import RedisConnector

from disagg_prefill_lmcache_v1.kv.stores import base, registry
from disagg_prefill_lmcache_v1.launch.ports import is_listening
from disagg_prefill_lmcache_v1.same_user import SECRET_VARIABLE, read_secret


@pytest.fixture
def client(server, loop):
    client = Client(server, loop)
    yield client
    client(client.connector.close())


def test_round_trip_of_whole_and_part_filled_chunks(client):
    keys = [key(uuid.uuid4()) for _ in range(9)]
    objs = [chunk(client.staging, tokens=CHUNK if i < 8 else 5) for i in range(9)]
    client.put(keys, objs)
    assert client.connector.batched_contains(keys) == 9
    got = client.get(keys)
    assert [o.tensor.shape[2] for o in got] == [CHUNK] * 8 + [5]
    assert all(torch.equal(a.tensor, b.tensor) for a, b in zip(objs, got, strict=True))


def test_counts_present_chunks_from_the_first(client):
    keys = [key(uuid.uuid4()) for _ in range(4)]
    client.put([keys[0], keys[1], keys[3]], [chunk(client.staging) for _ in range(3)])
    assert client.connector.batched_contains(keys) == 2
    assert client(client.connector.batched_async_contains("", keys)) == 2
    assert client.connector.exists_sync(keys[3])
    assert not client.connector.exists_sync(keys[2])
    got = client.get(keys)
    assert [o is not None for o in got] == [True, True, False, True]


@pytest.mark.parametrize("server", ["lm", "redis"], indirect=True)  # a stock LMCache has no client for shm but ours
def test_stock_lmcache_reads_what_we_write_and_we_read_what_it_writes(client, server):
    if server.kind == "lm":
        stock = LMCServerConnector("127.0.0.1", server.port, client.loop, client.staging)
    else:
        url = f"redis://:{read_secret(os.environ[SECRET_VARIABLE])}@127.0.0.1:{server.port}"
        stock = RedisConnector(url, client.loop, client.staging)
    ours, theirs = chunk(client.staging), chunk(client.staging, tokens=7)
    names = [key(uuid.uuid4()), key(uuid.uuid4())]
    client.put([names[0]], [ours])
    client(stock.put(names[1], theirs))
    assert torch.equal(client(stock.get(names[0])).tensor, ours.tensor)
    wait_until(lambda: client.connector.exists_sync(names[1]), "the stock client's put arrived")
    assert torch.equal(client.get([names[1]])[0].tensor, theirs.tensor)


def test_foreign_chunks_are_not_taken_and_the_connection_goes_on(client, server, loop):
    foreign = Client(server, loop, kv_heads=HEADS + 1)
    name, good = key(uuid.uuid4()), key(uuid.uuid4())
    shape = torch.Size((2, LAYERS, 4, (HEADS + 1) * HEAD_SIZE))
    obj = foreign.staging.allocate(shape, torch.float32, MemoryFormat.KV_2LTD)
    foreign.put([name], [obj])
    mine = chunk(client.staging)
    client.put([good], [mine])
    got = client.get([name, good])
    assert got[0] is None
    assert torch.equal(got[1].tensor, mine.tensor)
    foreign(foreign.connector.close())


def test_many_concurrent_readers_and_writers_do_not_mix(client):
    async def one(i):
        names = [key(uuid.uuid4()) for _ in range(3)]
        objs = [chunk(client.staging, tokens=1 + (i + j) % CHUNK) for j in range(3)]
        await client.connector.batched_put(names, objs)
        assert await client.connector.batched_async_contains("", names) == 3
        got = await client.connector.batched_get(names)
        assert all(torch.equal(a.tensor, b.tensor) for a, b in zip(objs, got, strict=True))

    async def all_of_them():
        await asyncio.gather(*(one(i) for i in range(40)))

    client(all_of_them())


def test_dead_store_fails_fast_and_a_restarted_one_is_used(client, server):
    name = key(uuid.uuid4())
    client.put([name], [chunk(client.staging)])
    server.stop()
    try:
        begin = time.monotonic()
        with pytest.raises(Exception, match=r"KV store|Error|connect"):
            client.put([name], [chunk(client.staging)])
        with pytest.raises(Exception, match=r"KV store|Error|connect"):
            client.get([name])
        with pytest.raises(Exception, match=r"KV store|Error|connect"):
            client(client.connector.ping())
        assert time.monotonic() - begin < base.IO_TIMEOUT_S
    finally:
        server.start()

    def back():
        try:
            return client(client.connector.ping()) == 0
        except Exception:
            return False

    wait_until(back, "the restarted store answers")
    assert client.get([name]) == [None]
    client.put([name], [chunk(client.staging)])
    assert client.connector.exists_sync(name)


def test_frozen_store_is_given_up(client, server, monkeypatch):
    monkeypatch.setattr(base, "IO_TIMEOUT_S", 1.0)
    client(client.connector.close())
    client.connector = registry.connect(server.url, client.loop, client.staging)
    server.freeze()
    try:
        with pytest.raises((base.StoreUnavailable, redis.TimeoutError), match=r"timed out|Timeout"):
            client(client.connector.ping())
    finally:
        os.kill(server.process.pid, signal.SIGCONT)


def test_busy_store_is_not_taken_for_dead(client):
    """LMCache pings behind whatever else is on its way: all threads of its calls may be busy for long."""
    over = threading.Event()
    try:
        for _ in range(64):
            client.connector._threads.submit(over.wait)
        assert client(client.connector.ping()) == 0
    finally:
        over.set()


def test_lmcache_gives_a_ping_longer_than_the_client_waits():
    settings = [yaml.safe_load(file.read_text()).get("extra_config") for file in PACKAGE.glob("configs/*.yaml")]
    pings = [extra["ping_timeout"] for extra in settings if extra]
    assert len(pings) == 3  # all but mp's and nixl's
    assert min(pings) > base.CONNECT_TIMEOUT_S + base.IO_TIMEOUT_S


def test_unreachable_store_is_refused_at_once_without_its_password(loop):
    port = free_ports(1)[0]
    with pytest.raises(base.StoreUnavailable, match=f"lm://127.0.0.1:{port}"):
        registry.connect(f"lm://127.0.0.1:{port}", loop, Staging())
    with pytest.raises(base.StoreUnavailable, match=r"shm:///no/such/socket: .*No such file"):
        registry.connect("shm:///no/such/socket", loop, Staging())
    with pytest.raises(base.StoreUnavailable) as error:
        registry.connect(f"redis://:geheim@127.0.0.1:{port}", loop, Staging())
    assert "geheim" not in str(error.value)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed: it makes the certificate")
def test_redis_by_tls_as_a_user_who_may_do_little(loop, tmp_path):
    certificate, private = tmp_path / "certificate.pem", tmp_path / "private.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", private, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    (port,) = free_ports(1)
    settings = tmp_path / "redis.conf"
    settings.write_text(
        f"bind 127.0.0.1\nport 0\ntls-port {port}\ntls-cert-file {certificate}\ntls-key-file {private}\n"
        f'tls-ca-cert-file {certificate}\ntls-auth-clients no\nsave ""\ndir {tmp_path}\nuser default off\n'
        "user kv on >s3cret ~* -@all +ping +set +get +getrange +exists\n"
    )
    url = f"rediss://kv:s3cret@127.0.0.1:{port}/0?ssl_ca_certs={certificate}"
    with subprocess.Popen(["redis-server", settings], stdout=subprocess.DEVNULL) as server:
        try:
            wait_until(lambda: is_listening(port), "Redis listens")
            client = Client(SimpleNamespace(url=url), loop)
            objs = [chunk(client.staging), chunk(client.staging, 5)]
            client.put([key("tls a"), key("tls b")], objs)
            assert client.connector.count_present([key("tls a"), key("tls b"), key("tls c")]) == 2
            found = client.get([key("tls a"), key("tls b")])
            assert all(torch.equal(one.tensor, other.tensor) for one, other in zip(found, objs, strict=True))
        finally:
            server.kill()


def test_other_stores_are_left_to_lmcache(loop):
    assert registry.connect("fs:///tmp/kv", loop, Staging()) is None
