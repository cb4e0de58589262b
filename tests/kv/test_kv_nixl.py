"""kv_nixl: both sides in this process, each with an agent of its own; NIXL and UCX are real.

What it shares with the other stores is tested with them (test_base.py, test_kv_transfer.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
import uuid
from types import SimpleNamespace

import pytest
import torch
from launch_harness import free_ports, wait_until

pytest.importorskip("lmcache", reason="LMCache is not installed")
pytest.importorskip("nixl_cu12", reason="NIXL is not installed")

from kv_stores import Staging, key

from disagg_prefill_lmcache_v1.kv.stores import base, nixl_agent
from disagg_prefill_lmcache_v1.kv.stores import nixl as kv_nixl
from disagg_prefill_lmcache_v1.kv.stores.nixl import NixlReceiver, NixlSender

MIB = 1 << 20
SHAPE = torch.Size((2, 3, 32, 32))  # a whole chunk of Staging's model: 24 KiB, six pages


@pytest.fixture(scope="module")
def port():
    return free_ports(1)[0]


@pytest.fixture(scope="module")
def module_loop():
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)


@pytest.fixture(scope="module")
def receiver(port, module_loop):
    receiver = NixlReceiver("127.0.0.1", port, module_loop, Staging(), MIB)
    yield receiver
    asyncio.run_coroutine_threadsafe(receiver.close(), module_loop).result(10)


@pytest.fixture
def sender(receiver, port, module_loop):
    sender = NixlSender("127.0.0.1", port, module_loop, Staging())
    yield sender
    asyncio.run_coroutine_threadsafe(sender.close(), module_loop).result(10)


def send(sender, name):
    tensors, _ = sender.stage([name], [SHAPE], torch.float32)
    tensors[0].copy_(torch.randn(SHAPE))
    sender.commit([name], tensors)
    return tensors[0].clone()


@contextlib.contextmanager
def moving_raises(sender, monkeypatch, error):
    def raises(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(sender._agent, "move", raises)
        yield


def test_the_decoder_reads_in_place_what_the_prefiller_has_sent(sender, receiver):
    name = key(uuid.uuid4())
    assert receiver.count_present([name]) == 0
    sent = send(sender, name)
    ((address, size),) = receiver.memory()
    with receiver.fetch([name]) as chunks:
        ((index, tensor),) = chunks
        assert index == 0
        assert torch.equal(tensor, sent)
        assert address <= tensor.data_ptr() < address + size


def test_what_was_sent_can_be_read_back(sender):
    name = key(uuid.uuid4())
    sent = send(sender, name)
    with sender.fetch([name]) as chunks:
        assert [torch.equal(tensor, sent) for _, tensor in chunks] == [True]


def test_a_full_decoder_drops_the_oldest_and_tells_where_it_cannot(sender, receiver):
    names = [key(uuid.uuid4()) for _ in range(2 * MIB // (24 << 10))]
    for name in names:
        send(sender, name)
    assert receiver.count_present(names[-1:]) == 1
    assert receiver.count_present(names[:1]) == 0
    left = [name for name in names if receiver.count_present([name])]
    with receiver.fetch(left) as chunks:
        assert len(list(chunks)) == len(left)
        with pytest.raises(base.StoreRefused, match="KV_NIXL_SIZE"):
            send(sender, key(uuid.uuid4()))
    send(sender, key(uuid.uuid4()))


def test_a_write_that_is_late_keeps_its_place(sender, receiver, monkeypatch):
    """It may still go on: nobody else may be given these bytes, and nobody may find the chunk."""
    late = key(uuid.uuid4())
    before = receiver.stats()["reserved"]
    refused = pytest.raises(base.StoreUnavailable, match="timed out")
    with moving_raises(sender, monkeypatch, TimeoutError("timed out")), refused:
        send(sender, late)
    wait_until(lambda: time.monotonic() - sender._failed_at > base.RETRY_AFTER_S, "the sender tries again")
    send(sender, key(uuid.uuid4()))
    assert receiver.stats()["reserved"] == before + 1
    assert receiver.count_present([late]) == 0
    kv_nixl._PeerLink._kept.pop().socket.close()  # as when the process ends
    wait_until(lambda: receiver.stats()["reserved"] == before, "the place is free again")


def test_a_write_that_fails_gives_its_place_back(sender, receiver, monkeypatch):
    before = receiver.stats()["reserved"]
    refused = pytest.raises(base.StoreUnavailable, match="NIXL: no")
    with moving_raises(sender, monkeypatch, ConnectionError("NIXL: no")), refused:
        send(sender, key(uuid.uuid4()))
    wait_until(lambda: receiver.stats()["reserved"] == before, "the place is free again")


def test_a_read_that_is_late_keeps_its_memory(sender, monkeypatch):
    name = key(uuid.uuid4())
    send(sender, name)
    taken = len(sender.local_cpu_backend.taken)
    with moving_raises(sender, monkeypatch, TimeoutError("timed out")), sender.fetch([name]) as chunks:
        assert list(chunks) == []
    (obj,) = sender.local_cpu_backend.taken[taken:]
    assert obj.get_ref_count() == 1


def test_the_receiver_looks_at_the_network_only_while_somebody_sends(sender, receiver, monkeypatch):
    looks = []
    progress = receiver._agent.progress
    monkeypatch.setattr(receiver._agent, "progress", lambda: (looks.append(1), progress()))
    send(sender, key(uuid.uuid4()))
    wait_until(lambda: looks and receiver._server.is_quiet() and not receiver._server.sending.is_set(), "it is quiet")
    with receiver.fetch([key(uuid.uuid4())]):
        receiver.count_present([key(uuid.uuid4())])
    assert receiver._server.is_quiet()


def test_a_sender_waits_for_its_receiver(module_loop):
    port = free_ports(1)[0]
    with pytest.raises(base.StoreUnavailable, match=f"nixl://127.0.0.1:{port}: the decode server does not listen"):
        NixlSender("127.0.0.1", port, module_loop, Staging(), start_s=0.2)
    made = []
    thread = threading.Thread(target=lambda: made.append(NixlSender("127.0.0.1", port, module_loop, Staging())))
    thread.start()
    receiver = NixlReceiver("127.0.0.1", port, module_loop, Staging(), MIB)
    thread.join(20)
    name = key(uuid.uuid4())
    send(made[0], name)
    assert receiver.count_present([name]) == 1
    for side in (*made, receiver):
        asyncio.run_coroutine_threadsafe(side.close(), module_loop).result(10)
        if side is not receiver:
            wait_until(lambda: not receiver._server._senders, "the receiver has noticed that the sender is gone")


def test_another_server_on_the_port_is_told(module_loop, receiver, port):
    with pytest.raises(base.StoreUnavailable, match="cannot listen"):
        NixlReceiver("127.0.0.1", port, module_loop, Staging(), MIB)


def test_a_shared_memory_store_is_no_decode_server(module_loop):
    from kv_stores import Server

    server = Server("shm")
    try:
        with pytest.raises(base.StoreUnavailable, match="no decode server of this version"):
            NixlSender("127.0.0.1", server.port, module_loop, Staging())
    finally:
        server.stop()


def test_without_nixl_the_error_says_what_to_do(monkeypatch):
    monkeypatch.setattr(nixl_agent, "MODULES", ("no_such_nixl._api",))
    with pytest.raises(base.StoreUnavailable, match="pip install nixl"):
        nixl_agent.Agent()


@pytest.mark.parametrize(
    ("settings", "environment", "said"),
    [
        ({}, {}, "DISAGG_NIXL_URL or .*url is ''"),
        ({"url": "lm://127.0.0.1:1"}, {}, "allowed: nixl://HOST:PORT"),
        ({"url": "nixl://127.0.0.1"}, {}, "allowed: nixl://HOST:PORT"),
        ({"url": "nixl://127.0.0.1:1"}, {}, "role is '': allowed: sender, receiver"),
        ({"url": "nixl://127.0.0.1:1", "role": "both"}, {}, "role is 'both'"),
        ({"url": "nixl://127.0.0.1:1", "role": "receiver"}, {}, "KV_NIXL_SIZE or .*size '': allowed"),
        ({"url": "nixl://127.0.0.1:1", "role": "receiver", "size": "1gb"}, {"KV_NIXL_SIZE": "9zb"}, "'9zb': allowed"),
        ({"url": "nixl://127.0.0.1:1", "role": "receiver", "size": "900000gb"}, {}, "choose less than that"),
    ],
)
def test_bad_settings_are_told(module_loop, monkeypatch, settings, environment, said):
    for name in (kv_nixl.URL_VARIABLE, kv_nixl.SIZE_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    values = {f"remote_storage_plugin.nixl.{name}": value for name, value in settings.items()}
    config = SimpleNamespace(get_extra_config_value=lambda name, default: values.get(name, default))
    backend = SimpleNamespace(config=config, metadata=SimpleNamespace(worker_id=0))
    with pytest.raises((ValueError, base.StoreUnavailable), match=said):
        kv_nixl.connect("plugin://nixl", module_loop, backend)


@pytest.mark.parametrize("role", ["sender", "receiver"])
def test_each_rank_has_a_port_of_its_own(module_loop, monkeypatch, role):
    made = []
    monkeypatch.setattr(kv_nixl, "NixlSender", lambda *arguments: made.append(arguments))
    monkeypatch.setattr(kv_nixl, "NixlReceiver", lambda *arguments: made.append(arguments))
    monkeypatch.setenv(kv_nixl.URL_VARIABLE, "nixl://127.0.0.1:700")
    monkeypatch.setenv(kv_nixl.SIZE_VARIABLE, "1mb")
    config = SimpleNamespace(get_extra_config_value=lambda name, default: role if name == kv_nixl.ROLE_KEY else default)
    backend = SimpleNamespace(config=config, metadata=SimpleNamespace(worker_id=3))
    kv_nixl.connect("plugin://nixl", module_loop, backend)
    assert made[0][:2] == ("127.0.0.1", 703)
