"""kv_nixl: both sides in this process, each with an agent of its own; NIXL and UCX are real.

What it shares with the other stores is tested with them (test_base.py, test_kv_transfer.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
import uuid
from types import SimpleNamespace

import msgspec
import pytest
import torch
from launch_harness import free_ports, wait_until

pytest.importorskip("lmcache", reason="LMCache is not installed")
pytest.importorskip("nixl_cu12", reason="NIXL is not installed")

from kv_stores import Staging, key

from disagg_prefill_lmcache_v1.kv.stores import base, nixl_agent, shm_memory
from disagg_prefill_lmcache_v1.kv.stores import nixl as kv_nixl
from disagg_prefill_lmcache_v1.kv.stores.nixl import NixlReceiver, NixlSender
from disagg_prefill_lmcache_v1.kv.stores.proof import challenge, proof, run_secret
from disagg_prefill_lmcache_v1.kv.stores.shm_server import frame_of
from disagg_prefill_lmcache_v1.same_user import SECRET_VARIABLE, write_secret

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
    asyncio.run_coroutine_threadsafe(receiver.close(), module_loop).result(60)


@pytest.fixture
def sender(receiver, port, module_loop):
    sender = NixlSender("127.0.0.1", port, module_loop, Staging())
    yield sender
    asyncio.run_coroutine_threadsafe(sender.close(), module_loop).result(60)


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


@pytest.mark.parametrize("rank", [0, 1])
def test_a_prefill_server_of_another_size_is_refused(receiver, port, module_loop, rank):
    staging = Staging()
    staging.metadata.world_size, staging.metadata.worker_id = 2, rank
    with pytest.raises(base.StoreUnavailable, match="has tensor parallel size 1, this prefill server 2: start both"):
        NixlSender("127.0.0.1", port, module_loop, staging)


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
    thread.join(60)
    name = key(uuid.uuid4())
    send(made[0], name)
    assert receiver.count_present([name]) == 1
    for side in (*made, receiver):
        asyncio.run_coroutine_threadsafe(side.close(), module_loop).result(60)
        if side is not receiver:
            wait_until(lambda: not receiver._server._senders, "the receiver has noticed that the sender is gone")


def test_another_server_on_the_port_is_told(module_loop, receiver, port):
    with pytest.raises(base.StoreUnavailable, match="cannot listen"):
        NixlReceiver("127.0.0.1", port, module_loop, Staging(), MIB)


@contextlib.contextmanager
def impostor(greeting, answer=None):
    """A server that is no decode server of ours."""

    def serve():
        with contextlib.suppress(OSError):  # until it is closed
            while True:
                link = listening.accept()[0]
                with link, contextlib.suppress(OSError):  # who only looks whether somebody listens is gone
                    link.sendall(frame_of((True, greeting)))
                    if link.recv(4096) and answer is not None:
                        link.sendall(frame_of((True, answer)))

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=serve, daemon=True).start()
        yield listening.getsockname()[1]


OURS = {"version": shm_memory.VERSION, "challenge": b"c" * 32}


@pytest.mark.parametrize(
    ("greeting", "answer", "said"),
    [
        ({"version": 1, "segment": "s"}, None, "no decode server of this version"),
        ("hello", None, "no decode server of this version"),
        (OURS, {"agent": b"a", "address": 0, "proof": b"p" * 32}, "does not prove to know the secret"),
        (OURS, {"agent": b"a", "address": 0, "proof": None}, "does not prove to know the secret"),
    ],
)
def test_nothing_is_sent_to_another_server(module_loop, greeting, answer, said):
    with impostor(greeting, answer) as port, pytest.raises(base.StoreUnavailable, match=said):
        NixlSender("127.0.0.1", port, module_loop, Staging())


def test_a_sender_with_another_secret_is_told_and_not_let_in(module_loop, receiver, port, monkeypatch, tmp_path):
    write_secret(tmp_path / "other")
    monkeypatch.setenv(SECRET_VARIABLE, str(tmp_path / "other"))
    with pytest.raises(base.StoreUnavailable, match=f"has another secret than the decode server: {SECRET_VARIABLE}"):
        NixlSender("127.0.0.1", port, module_loop, Staging())
    assert not receiver._server._senders


@pytest.mark.parametrize(
    "sent",
    [
        frame_of(["hello"]),
        frame_of(["reserve", [["k", 4096, None]]]),
        frame_of(["stats"]) + frame_of(["remove", ["k"]]),
        frame_of(["prove", b"c" * 32, b"p" * 32]),
        frame_of(["prove", "c", None]) * 2,
        frame_of(["prove", b"x" * 2000, b""]),
        b"GET / HTTP/1.1\r\n\r\n",
        b"",
    ],
)
def test_who_proves_nothing_learns_no_address_and_changes_nothing(sender, receiver, port, sent, monkeypatch):
    name = key(uuid.uuid4())
    send(sender, name)
    monkeypatch.setattr(base, "IO_TIMEOUT_S", 0.3)
    before = receiver.stats()
    with socket.create_connection(("127.0.0.1", port), 10) as stranger:
        stranger.sendall(sent)
        told = b""
        with contextlib.suppress(ConnectionResetError):
            while part := stranger.recv(4096):  # until it is hung up
                told += part
    assert b"address" not in told
    assert b"agent" not in told
    assert receiver.stats() == before
    assert receiver.count_present([name]) == 1


def test_a_proof_holds_once(receiver, port):
    """What somebody has overheard does not open another connection."""
    secret, mine = run_secret(), challenge()

    def talk(sent):
        with socket.create_connection(("127.0.0.1", port), 10) as link:
            greeting = msgspec.msgpack.decode(link.recv(4096)[4:])[1]
            sent = sent or frame_of(["prove", mine, proof(secret, "sender", greeting["challenge"], mine)])
            link.sendall(sent)
            done, answer = msgspec.msgpack.decode(link.recv(1 << 20)[4:])
            return done, answer, sent

    done, answer, overheard = talk(None)
    assert done
    assert answer["address"]
    assert talk(overheard)[0] is False


@pytest.mark.parametrize("mode", [0o644, 0o640, None])
def test_a_secret_that_is_none_is_told(module_loop, monkeypatch, tmp_path, mode):
    monkeypatch.setenv(SECRET_VARIABLE, str(tmp_path / "secret"))
    said = "No such file"
    if mode is not None:
        write_secret(tmp_path / "secret")
        assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o600
        (tmp_path / "secret").chmod(mode)
        said = "not readable by others"
    for side in (
        lambda: NixlSender("127.0.0.1", 1, module_loop, Staging()),
        lambda: NixlReceiver("127.0.0.1", 1, module_loop, Staging(), MIB),
    ):
        with pytest.raises(ValueError, match=f"{SECRET_VARIABLE} .*{said}"):
            side()
    monkeypatch.delenv(SECRET_VARIABLE)
    with pytest.raises(ValueError, match="is not set"):
        NixlSender("127.0.0.1", 1, module_loop, Staging())
    monkeypatch.setenv("DISAGG_KV_SECRET", "a word")
    assert run_secret() == b"a word"


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
