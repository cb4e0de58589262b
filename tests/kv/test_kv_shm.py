"""kv_shm: the real server in a process of its own, real clients in this process and in others.

What it has in common with the other stores is in test_base.py.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path

import pytest
import torch
from launch_harness import PACKAGE, REPOSITORY, wait_until

pytest.importorskip("lmcache", reason="LMCache is not installed: its formats and its plugin seam are what is tested")

from kv_stores import CHUNK, HEAD_SIZE, HEADS, LAYERS, Client, Server, Staging, chunk, key
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.event_manager import EventManager
from lmcache.v1.health_monitor.checks.remote_backend_check import RemoteBackendHealthCheck
from lmcache.v1.memory_management import MemoryFormat
from lmcache.v1.storage_backend.remote_backend import RemoteBackend
from lmcache.v1.storage_backend.storage_manager import StorageManager

from disagg_prefill_lmcache_v1 import memory, same_user
from disagg_prefill_lmcache_v1.kv.stores import base, registry, shm_index
from disagg_prefill_lmcache_v1.kv.stores import shm as kv_shm
from disagg_prefill_lmcache_v1.kv.stores.shm_index import BUSY, NO_ROOM, PRESENT, Index, Space
from disagg_prefill_lmcache_v1.kv.stores.shm_memory import ALIGNMENT, Segment
from disagg_prefill_lmcache_v1.kv.stores.shm_server import frame_of
from disagg_prefill_lmcache_v1.memory import parse_size

SHAPE = torch.Size((2, LAYERS, CHUNK, HEADS * HEAD_SIZE))
CHUNK_BYTES = SHAPE.numel() * 4
SIZE = 1 << 20  # of the store that is filled up here
ROOM = SIZE // CHUNK_BYTES  # chunks that it holds


# bookkeeping, without any memory


@pytest.mark.parametrize(
    ("text", "size"),
    [("2gb", 2 << 30), ("512MB", 512 << 20), (" 1mb ", 1 << 20), ("2m", 1998848), ("2097153", 2 << 20)],
)
def test_sizes_are_written_as_in_redis(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "gb", "2tb", "-1gb", "1.5gb", "1023kb", "two", "1 gb", "2gbb"])
def test_sizes_that_are_not_understood(text):
    with pytest.raises(ValueError, match="allowed"):
        parse_size(text)


def test_space_never_gives_a_byte_twice_and_joins_what_comes_back():
    rng = random.Random(3)
    space, owner, held = Space(100), [None] * 100, {}
    for i in range(3000):
        if held and (rng.random() < 0.5):
            start = rng.choice(list(held))
            size = held.pop(start)
            assert owner[start : start + size] == [start] * size
            owner[start : start + size] = [None] * size
            first, length = space.give(start, size)
            assert owner[first : first + length] == [None] * length
            assert first == 0 or owner[first - 1] is not None, "joined with the part before"
            assert first + length == 100 or owner[first + length] is not None, "joined with the part after"
        else:
            size = rng.randint(1, 30)
            start = space.take(size)
            free = "".join("." if each is None else "x" for each in owner)
            assert (start if start is not None else -1) == free.find("." * size), f"first fit, step {i}"
            if start is not None:
                owner[start : start + size] = [start] * size
                held[start] = size


def put(index, client, *keys, size=ALIGNMENT):
    assert all(offset >= 0 for offset in index.reserve(client, [(key, size, None) for key in keys]))
    assert index.commit(client, keys) == []


def present(index, keys):
    return "".join(key for key in keys if index._entries.get(key) is not None)


def test_the_least_recently_used_chunk_goes_first():
    index, client = Index(4 * ALIGNMENT), shm_index.Client()
    for key_ in "abcd":
        put(index, client, key_)
    assert index.pin(client, "a") == [(0, ALIGNMENT, None)]
    index.release(client, "a")  # reading is using
    assert index.exists("b") == (1, False)  # so is looking for it
    put(index, client, "e")
    assert present(index, "abcde") == "abde"
    put(index, client, "f")
    assert present(index, "abdef") == "abef"
    assert index.stats()["evictions"] == 2


def test_nothing_is_dropped_for_what_finds_no_room():
    index, client, reader = Index(100 * ALIGNMENT), shm_index.Client(), shm_index.Client()
    names = [f"{i:03}" for i in range(100)]
    for name in names:
        put(index, client, name)
    index.pin(reader, ["050"])
    assert index.reserve(client, [("large", 60 * ALIGNMENT, None)]) == [NO_ROOM]
    assert (index.stats()["entries"], index.stats()["evictions"]) == (100, 0)
    assert index.reserve(client, [("fits", 50 * ALIGNMENT, None)])[0] == 0
    index.release(reader, ["050"])
    assert index.reserve(client, [("rest", 50 * ALIGNMENT, None)])[0] == 50 * ALIGNMENT
    assert index.reserve(client, [("more", ALIGNMENT, None)]) == [NO_ROOM], "all of it is being written"


def test_of_a_prompt_the_last_chunk_goes_first():
    index, client = Index(4 * ALIGNMENT), shm_index.Client()
    put(index, client, *"abcd")
    put(index, client, "x")
    assert present(index, "abcd") == "abc"
    # what the same batch asks for is not dropped for its rest
    assert index.reserve(client, [(key_, ALIGNMENT, None) for key_ in "abcz"]) == [PRESENT] * 3 + [3 * ALIGNMENT]
    assert present(index, "abcxz") == "abcz"


def test_pinned_and_reserved_chunks_stay():
    index, reader, writer = Index(4 * ALIGNMENT), shm_index.Client(), shm_index.Client()
    put(index, writer, "a")
    assert index.pin(reader, "aa") == [(0, ALIGNMENT, None)] * 2
    assert index.reserve(writer, [("r", ALIGNMENT, None)]) == [ALIGNMENT]
    put(index, writer, "b", "c")
    put(index, writer, "d")
    assert present(index, "abcdr") == "abdr", "the pinned and the reserved one are older than c"
    assert index.exists("r") == (0, True)
    assert index.reserve(reader, [("r", ALIGNMENT, None)]) == [BUSY]
    assert index.pin(reader, ["r"]) == [None]
    assert index.reserve(writer, [("too large", 3 * ALIGNMENT, None), ("huge", 5 * ALIGNMENT, None)]) == [NO_ROOM] * 2
    assert present(index, "ar") == "ar"
    index.abort(writer, "r")
    index.release(reader, "a")
    assert index.reserve(writer, [("all", 4 * ALIGNMENT, None)]) == [NO_ROOM], "it was pinned twice"
    index.release(reader, "a")
    assert index.reserve(writer, [("all", 4 * ALIGNMENT, None)]) == [0]


def test_a_client_that_goes_loses_its_pins_and_what_it_was_writing():
    index, gone, stays = Index(4 * ALIGNMENT), shm_index.Client(), shm_index.Client()
    put(index, gone, "a")
    index.reserve(gone, [("w", 2 * ALIGNMENT, None)])
    index.pin(gone, "aa")
    index.pin(stays, "a")
    index.drop(gone)
    assert index.commit(gone, ["w"]) == ["w"]
    assert index.reserve(stays, [("big", 3 * ALIGNMENT, None)])[0] >= 0
    assert present(index, "aw") == "a", "the other reader's pin holds"
    stats = index.stats()
    assert (stats["entries"], stats["reserved"], stats["pinned"], stats["bytes"]) == (1, 1, 1, 4 * ALIGNMENT)


# the server as a program


def serve(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "disagg_prefill_lmcache_v1.kv.stores.shm_server", *arguments],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (("FREE", "--size", "2zb"), 2, "--size '2zb': allowed: a whole number and a unit"),
        (("FREE", "--size", "900000gb"), 1, "MiB of memory are available"),
        (("BUSY", "--size", "1mb"), 1, "cannot listen on BUSY: Address already in use"),
        (("FILE", "--size", "1mb"), 1, "cannot listen on FILE: Address already in use"),
        (("FREE/no/such", "--size", "1mb"), 1, "cannot listen on FREE/no/such: No such file or directory"),
        (("FREE",), 2, "--size"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_settings_are_one_line(arguments, status, text, tmp_path):
    (tmp_path / "FILE").write_text("a person's")

    def filled(word):
        return re.sub("FREE|BUSY|FILE", lambda found: str(tmp_path / found[0]), word)

    with same_user.listen(str(tmp_path / "BUSY")):
        done = serve(*map(filled, arguments))
    assert done.returncode == status
    assert filled(text) in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert (tmp_path / "FILE").read_text() == "a person's"


def test_memory_that_a_control_group_does_not_give_is_not_taken(monkeypatch, tmp_path):
    (tmp_path / "memory.max").write_text("1000000000\n")
    (tmp_path / "memory.current").write_text("700000000\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 100000000\n")
    names = ("memory.max", "memory.current", "inactive_file")
    monkeypatch.setattr(memory, "_cgroups", lambda: iter([(tmp_path / "none", *names), (tmp_path, *names)]))
    assert memory.available_memory() == 400000000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available_memory() > 400000000


# server and clients


@pytest.fixture
def server():
    server = Server("shm", size="1mb")
    yield server
    server.stop()


@pytest.fixture
def client(server, loop):
    client = Client(server, loop)
    yield client
    client(client.connector.close())


def some_keys(count):
    return [key(uuid.uuid4()) for _ in range(count)]


def store(client, keys, value=1.0):
    """Through the blocking path; how many had room."""
    tensors, there = client.connector.stage(keys, [SHAPE] * len(keys), torch.float32)
    assert not any(there)
    for tensor in tensors:
        if tensor is not None:
            tensor.fill_(value)
    client.connector.commit(keys, tensors)
    return sum(tensor is not None for tensor in tensors)


def values(client, keys):
    """First element of each chunk that is there, None for the others; all elements must be equal."""
    found = [None] * len(keys)
    with client.connector.fetch(keys) as chunks:
        for i, tensor in chunks:
            found[i] = tensor.view(-1)[0].item()
            assert torch.equal(tensor, torch.full_like(tensor, found[i]))
    return found


def test_staged_chunks_are_seen_when_they_are_committed(client, server, loop):
    other = Client(server, loop)
    keys = some_keys(3)
    tensors, there = client.connector.stage(keys, [SHAPE, torch.Size((2, LAYERS, 5, 32)), SHAPE], torch.float32)
    assert there == [False] * 3
    ((start, size),) = client.connector.memory()
    for tensor, tokens in zip(tensors, (CHUNK, 5, CHUNK), strict=True):
        assert tensor.shape == (2, LAYERS, tokens, 32)
        assert start <= tensor.data_ptr() <= start + size - tensor.nbytes
        assert tensor.data_ptr() % ALIGNMENT == 0
        tensor.fill_(tokens)
    assert other.connector.count_present(keys) == 0
    again, there = other.connector.stage(keys[:1], [SHAPE], torch.float32)
    assert (again, there) == ([None], [True]), "nobody writes it twice"
    client.connector.commit(keys, tensors)
    assert other.connector.count_present(keys) == 3
    assert values(other, keys) == [CHUNK, 5, CHUNK]
    got = other.get(keys)
    assert [obj.tensor.shape[2] for obj in got] == [CHUNK, 5, CHUNK]
    assert other.connector.stage(keys[:1], [SHAPE], torch.float32) == ([None], [True])
    other(other.connector.close())


def test_abandoned_chunks_give_their_room_back(client):
    keys = some_keys(ROOM + 1)
    tensors, there = client.connector.stage(keys, [SHAPE] * len(keys), torch.float32)
    assert [tensor is None for tensor in tensors] == [False] * ROOM + [True]
    assert there == [False] * (ROOM + 1), "no room is told from being there"
    client.connector.abandon(keys, tensors)
    assert client.connector.stats()["bytes"] == 0
    with pytest.raises(base.StoreUnavailable, match="not reserved"):
        client.connector.commit(keys[:1], tensors[:1])
    assert client.connector.count_present(keys) == 0
    assert store(client, keys) == ROOM


def test_a_full_store_drops_the_oldest_and_tells_where_it_cannot(client):
    old, new = some_keys(ROOM), some_keys(3)
    assert store(client, old, 1.0) == ROOM
    with client.connector.fetch(old[-3:]) as chunks:
        held = dict(chunks)
        assert store(client, new, 2.0) == 3
        assert store(client, some_keys(ROOM), 3.0) == ROOM - 3
        assert all(torch.equal(tensor, torch.full(SHAPE, 1.0)) for tensor in held.values())
        assert len(held) == 3
        objs = [chunk(client.staging) for _ in range(ROOM)]
        with pytest.raises(kv_shm.StoreFull):
            client.put(some_keys(ROOM), objs)
    assert values(client, [*old[-3:], *old[:2]]) == [1.0, 1.0, 1.0, None, None]
    assert client.connector.stats()["pinned"] == 0
    assert client.connector.stats()["bytes"] <= SIZE


def test_lmcaches_put_waits_for_another_writer_of_the_same_chunk(client, server, loop, monkeypatch):
    other = Client(server, loop)
    asked = []
    exists = client.connector._exists
    monkeypatch.setattr(client.connector, "_exists", lambda keys: asked.append(1) or exists(keys))

    def begin(coroutine):
        """A call that waits for another client: until it has asked for the third time whether that one has ended."""
        asked.clear()
        future = asyncio.run_coroutine_threadsafe(coroutine, loop)
        wait_until(lambda: len(asked) > 2, "it waits")
        assert not future.done()
        return future

    def staged():
        name = key(uuid.uuid4())
        return [name], other.connector.stage([name], [SHAPE], torch.float32)[0]

    connector = client.connector
    for call, wanted in ((connector.batched_put, None), (connector.batched_async_contains, 1)):
        name, tensors = staged()
        call = call(name, [chunk(client.staging)]) if wanted is None else call("", name)
        future = begin(call)
        assert client.connector.count_present(name) == 0, "this one does not wait"
        tensors[0].fill_(7)
        other.connector.commit(name, tensors)
        assert future.result(60) == wanted
        assert values(client, name) == [7.0]
    # a writer that gives up leaves it to the one that waits
    name, tensors = staged()
    mine = chunk(client.staging)
    future = begin(connector.batched_put(name, [mine]))
    other.connector.abandon(name, tensors)
    future.result(60)
    assert torch.equal(client.get(name)[0].tensor, mine.tensor)
    other(other.connector.close())


def test_a_chunk_is_removed_unless_somebody_uses_it(client):
    keys = some_keys(3)
    store(client, keys[:2])
    client.connector.stage(keys[2:], [SHAPE], torch.float32)
    with client.connector.fetch(keys[:1]):
        assert [client.connector.remove_sync(name) for name in keys] == [False, True, False]
    assert [client.connector.exists_sync(name) for name in keys[:2]] == [True, False]
    assert client.connector.stats()["bytes"] == 2 * CHUNK_BYTES


def test_foreign_chunks_are_not_fetched(client, server, loop):
    foreign = Client(server, loop, kv_heads=HEADS + 1)
    keys = some_keys(3)
    shape = torch.Size((2, LAYERS, CHUNK, (HEADS + 1) * HEAD_SIZE))
    tensors, _ = foreign.connector.stage(keys[:1], [shape], torch.float32)
    foreign.connector.commit(keys[:1], tensors)
    tensors, _ = client.connector.stage(keys[1:2], [SHAPE], torch.float16)
    client.connector.commit(keys[1:2], tensors)
    store(client, keys[2:], 4.0)
    assert values(client, keys) == [None, None, 4.0]
    assert client.connector.stats()["pinned"] == 0
    foreign(foreign.connector.close())


def test_a_server_that_dies_leaves_what_is_being_read_and_the_next_one_is_mapped(client, server):
    keys = some_keys(2)
    store(client, keys, 5.0)
    remapped = []
    client.connector.on_remap = lambda: remapped.append(client.connector.memory())
    before = client.connector.memory()
    staged = some_keys(1)
    tensors, _ = client.connector.stage(staged, [SHAPE], torch.float32)
    with client.connector.fetch(keys) as chunks:
        arriving = iter(chunks)
        i, first = next(arriving)
        server.stop()
        with pytest.raises(base.StoreUnavailable):
            client.connector.count_present(keys)
        rest = dict(arriving)
        for tensor in (first, *rest.values()):
            assert torch.equal(tensor, torch.full(SHAPE, 5.0))
        assert i not in rest
    with pytest.raises(base.StoreUnavailable):
        client.connector.stage(some_keys(1), [SHAPE], torch.float32)
    assert remapped == []
    server.start()

    def back():
        try:
            return client.connector.count_present(keys) == 0
        except base.StoreUnavailable:
            return False

    wait_until(back, "the restarted store answers")
    assert remapped == [client.connector.memory()]
    assert client.connector.memory() != before
    tensors[0].fill_(6.0)  # a late write reaches nobody
    with pytest.raises(base.StoreUnavailable):
        client.connector.commit(staged, tensors)
    store(client, [*staged, *keys], 8.0)
    assert values(client, [*staged, *keys]) == [8.0] * 3
    client.connector.abandon(staged, tensors)
    assert len(remapped) == 1


def test_what_was_handed_out_on_a_failed_connection_is_nobody_elses(client, server, loop):
    """The server is too slow for one answer: the connection is given up, but not what is being read and written."""
    read, written = some_keys(1), some_keys(1)
    store(client, read, 1.0)
    tensors, _ = client.connector.stage(written, [SHAPE], torch.float32)
    with client.connector.fetch(read) as chunks:
        _, reading = next(iter(chunks))
        client.connector._session._link.set_timeout(0.2)
        os.kill(server.process.pid, signal.SIGSTOP)
        try:
            with pytest.raises(base.StoreUnavailable, match="timed out"):
                client.connector.count_present(read)
        finally:
            os.kill(server.process.pid, signal.SIGCONT)
        other = Client(server, loop)
        others = some_keys(ROOM)
        assert store(other, others, 2.0) == ROOM - 2, "all but these two"
        tensors[0].fill_(3.0)
        assert torch.equal(reading, torch.full(SHAPE, 1.0))
    assert values(other, others).count(2.0) == ROOM - 2
    with pytest.raises(base.StoreUnavailable):
        client.connector.commit(written, tensors)
    wait_until(lambda: other.connector.stats()["reserved"] == 0, "all was given back, so the connection was closed")
    assert other.connector.stats()["pinned"] == 0
    assert other.connector.count_present(written) == 0
    other(other.connector.close())


def test_a_late_answer_is_never_taken_for_another_one(client, server, monkeypatch):
    session = client.connector._session
    name = some_keys(1)
    store(client, name)
    os.kill(server.process.pid, signal.SIGSTOP)
    try:
        session._link.set_timeout(0.1)
        with pytest.raises(TimeoutError):
            session.ask("exists", [name[0].to_string()])
    finally:
        os.kill(server.process.pid, signal.SIGCONT)
    session._link.set_timeout(5)
    with pytest.raises(ConnectionResetError):  # [1, False] was the other one's
        session.ask("pin", ["unknown"])
    assert client.connector.count_present(name) == 1, "on a new connection"


@pytest.mark.parametrize(
    ("greeting", "with_memory", "said"),
    [
        ({"size": 1 << 30}, True, "its memory cannot be mapped"),
        ({"version": 1}, True, "it is no KV store of this version"),
        ({}, False, "has ended, or does not let this user in"),
    ],
)
def test_memory_that_is_not_as_it_was_told_is_not_mapped(loop, tmp_path, greeting, with_memory, said):
    segment = Segment(SIZE)
    with same_user.listen(str(tmp_path / "s")) as listening:

        def answer():
            with listening.accept()[0] as link:
                descriptors = [segment.fd] if with_memory else []
                socket.send_fds(link, [frame_of((True, segment.describe() | greeting))], descriptors)

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(base.StoreUnavailable, match=said):
            registry.connect(f"shm://{tmp_path}/s", loop, Staging())
        thread.join()


@pytest.fixture
def public_folder():
    """That other users may enter."""
    with tempfile.TemporaryDirectory(prefix="kv-public-") as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


NOBODY = 65534


def as_nobody(work):
    """What a function returns, as text, in a process of another user."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            os.write(write_end, str(work()).encode())
        except BaseException as error:
            os.write(write_end, repr(error).encode())
        finally:
            os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as lines:
        said = lines.read()
    os.waitpid(pid, 0)
    return said


def try_to_enter(path):
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.settimeout(30)
        stranger.connect(path)
        try:
            stranger.sendall(frame_of(["stats"]))
            return socket.recv_fds(stranger, 1000, 1)[:2]
        except (BrokenPipeError, ConnectionResetError):
            return b"", []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user, to be refused")
def test_another_user_gets_neither_in_nor_any_memory(client, server):
    path = Path(server.socket)
    assert path.stat().st_mode & 0o777 == 0o600
    path.parent.chmod(0o755)
    assert "PermissionError" in as_nobody(lambda: try_to_enter(str(path)))
    path.chmod(0o666)  # even then
    assert as_nobody(lambda: try_to_enter(str(path))) == "(b'', [])"
    assert store(client, some_keys(2)) == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user, to be refused")
def test_no_kv_is_taken_from_another_users_server(loop, public_folder):
    """In a directory that others may write to, somebody may be there first."""
    path = str(public_folder / "s")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        read_end, write_end = os.pipe()
        pid = os.fork()
        if pid == 0:  # whoever listens counts
            os.setuid(NOBODY)
            listening.listen()
            os.write(write_end, b"x")
            time.sleep(60)
            os._exit(0)
        try:
            os.read(read_end, 1)
            with pytest.raises(base.StoreUnavailable, match="another user listens there"):
                registry.connect(f"shm://{path}", loop, Staging())
            done = serve(path, "--size", "1mb")
            assert "cannot listen" in done.stderr
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def test_a_socket_that_a_killed_server_left_gives_way_and_one_that_ends_leaves_none(server):
    server.stop()
    assert os.path.exists(server.socket)
    server.start()
    server.process.terminate()
    assert server.process.wait(60) == 0
    assert not os.path.exists(server.socket)
    server.start()


def test_a_socket_may_lie_deeper_than_the_kernel_takes_in_a_path(loop, tmp_path):
    folder = tmp_path.joinpath(*["d" * 50] * 4)
    folder.mkdir(parents=True)
    server = Server("shm", size="1mb", path=folder / "kv store.sock")
    client = Client(server, loop)
    try:
        assert store(client, some_keys(1)) == 1
    finally:
        client(client.connector.close())
        server.stop()


@pytest.mark.parametrize(
    "sent", [b"GET / HTTP/1.1\r\n\r\n", b"\x03\0\0\0abc", b"\x02\0\0\0\x91\x05", b"\x01\0\0\0\xc0", b""]
)
def test_strangers_do_not_disturb(client, server, sent):
    with same_user.connect(server.socket, 5) as stranger:
        assert b"segment" in stranger.recv(1000)
        stranger.sendall(sent)
        if sent and not sent.startswith(b"GET"):
            assert b"not understood" in stranger.recv(1000)
    assert store(client, some_keys(2)) == 2


# other processes

WRITER = """
import mmap, os, random, socket, struct, sys, time
import msgspec

def ask(*request):
    data = msgspec.msgpack.encode(request)
    link.sendall(struct.pack("<I", len(data)) + data)
    answer = b""
    while len(answer) < 4 or len(answer) < 4 + struct.unpack("<I", answer[:4])[0]:
        answer += link.recv(1 << 20)
    done, result = msgspec.msgpack.decode(answer[4:])
    assert done, result
    return result

link = socket.socket(socket.AF_UNIX)
link.connect(sys.argv[1])
greeting, (fd,), _, _ = socket.recv_fds(link, 1000, 1)
memory = mmap.mmap(fd, msgspec.msgpack.decode(greeting[4:])[1]["size"])
names, size, shape = sys.argv[4].split(","), int(sys.argv[5]), [int(n) for n in sys.argv[6].split(",")]
wanted = [[name, size, [shape, "float32", int(sys.argv[7])]] for name in names]
if sys.argv[2] == "hold":
    pins = ask("pin", names[:1])
    offsets = ask("reserve", wanted)
    memory[offsets[1] : offsets[1] + 8] = b"unfinish"
    print("held", pins[0] is not None, sum(offset >= 0 for offset in offsets), flush=True)
    time.sleep(60)
rng, written, read, deadline = random.Random(1), 0, 0, time.monotonic() + float(sys.argv[3])
while time.monotonic() < (deadline if min(written, read) > 20 else deadline + 60):
    some = rng.sample(range(len(names)), 8)
    for i, offset in zip(some, ask("reserve", [wanted[i] for i in some])):
        if offset >= 0:
            memory[offset : offset + size] = struct.pack("<f", i) * (size // 4)
            written += 1
            ask(rng.choice(["commit", "commit", "abort"]), [names[i]])
    some = rng.sample(range(len(names)), 8)
    found = ask("pin", [names[i] for i in some])
    for i, chunk in zip(some, found):
        if chunk is not None:
            assert memory[chunk[0] : chunk[0] + chunk[1]] == struct.pack("<f", i) * (size // 4), names[i]
            read += 1
    ask("release", [names[i] for i, chunk in zip(some, found) if chunk is not None])
print("done", written, read, flush=True)
"""


def writer(server, mode, seconds, keys):
    """A process that speaks the protocol by itself, without any of our code."""
    words = [server.socket, mode, str(seconds), ",".join(each.to_string() for each in keys), str(CHUNK_BYTES)]
    words += [",".join(map(str, SHAPE)), str(MemoryFormat.KV_2LTD.value)]
    return subprocess.Popen([sys.executable, "-c", WRITER, *words], stdout=subprocess.PIPE, text=True)


def test_a_client_killed_while_writing_gives_its_room_back(client, server):
    keys = some_keys(5)
    store(client, keys[:1], 1.0)
    with writer(server, "hold", 0, keys) as process:
        try:
            assert process.stdout.readline().split() == ["held", "True", "4"]
            stats = client.connector.stats()
            assert (stats["reserved"], stats["pinned"]) == (4, 1)
            assert client.connector.stage(keys[1:2], [SHAPE], torch.float32) == ([None], [True])
        finally:
            process.kill()
    wait_until(lambda: client.connector.stats()["reserved"] == 0, "what it had reserved is free")
    assert client.connector.stats()["pinned"] == 0
    assert client.connector.count_present(keys) == 1, "nothing half-written is seen"
    assert store(client, keys[1:], 2.0) == 4
    assert values(client, keys) == [1.0] + [2.0] * 4


def test_readers_and_writers_of_several_processes_under_eviction(client, server, loop):
    """More chunks than there is room for, each filled with its own number; nobody may ever see another one's."""
    keys = some_keys(3 * ROOM)
    seconds, wrong, counts = 1.5, [], []

    def churn(seed):
        rng, written, read, deadline = random.Random(seed), 0, 0, time.monotonic() + seconds
        try:
            while time.monotonic() < (deadline if min(written, read) > 20 else deadline + 60):
                some = rng.sample(range(len(keys)), 8)
                names = [keys[i] for i in some]
                tensors, _ = client.connector.stage(names, [SHAPE] * 8, torch.float32)
                for i, tensor in zip(some, tensors, strict=True):
                    if tensor is not None:
                        tensor.fill_(i)
                        written += 1
                (client.connector.commit if rng.random() < 0.7 else client.connector.abandon)(names, tensors)
                some = rng.sample(range(len(keys)), 8)
                with client.connector.fetch([keys[i] for i in some]) as chunks:
                    for at, tensor in chunks:
                        assert torch.equal(tensor, torch.full(SHAPE, float(some[at]))), some[at]
                        read += 1
            counts.append((written, read))
        except Exception as error:
            wrong.append(repr(error))

    threads = [threading.Thread(target=churn, args=(seed,)) for seed in (1, 2)]
    with writer(server, "churn", seconds, keys) as process:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(90)
        told = process.stdout.read().split()
    assert wrong == []
    assert told[:1] == ["done"]
    assert all(written > 20 and read > 20 for written, read in [*counts, tuple(map(int, told[1:]))])
    stats = client.connector.stats()
    assert (stats["reserved"], stats["pinned"]) == (0, 0)
    assert stats["evictions"] > 20
    assert stats["bytes"] <= SIZE


# LMCache's plugin seam


def test_a_stock_lmcache_uses_it_as_a_plugin(server, monkeypatch, autorelease):
    patches = pytest.importorskip("disagg_prefill_lmcache_v1.kv.patches", exc_type=ImportError)
    monkeypatch.setenv(kv_shm.URL_VARIABLE, server.url)
    config = LMCacheEngineConfig.from_file(str(PACKAGE / "configs/lmcache-config-shm.yaml"))
    config.chunk_size, config.max_local_cpu_size = CHUNK, 0.01
    managers = [autorelease(StorageManager(config, Staging().metadata, EventManager())) for _ in range(2)]
    for manager in managers:
        backends = [each for each in manager.storage_backends.values() if isinstance(each, RemoteBackend)]
        assert len(backends) == 1
        assert isinstance(backends[0].connection.getWrappedConnector(), kv_shm.ShmStoreConnector)
        connection = backends[0].connection
        patches.use_own_client(backends[0])
        assert backends[0].connection is connection, "a check of its health may be on its way"
    keys = some_keys(3)
    objs = [managers[0].allocate(SHAPE, torch.float32, MemoryFormat.KV_2LTD) for _ in keys]
    wanted = []
    for i, obj in enumerate(objs):
        obj.tensor.fill_(i)
        wanted.append(obj.tensor.clone())
    managers[0].batched_put(keys, objs)
    wait_until(lambda: managers[1].batched_contains(keys)[0] == 3, "stored")
    got = managers[1].batched_get(keys, "RemoteBackend-shm")
    assert all(torch.equal(obj.tensor, tensor) for obj, tensor in zip(got, wanted, strict=True))


def test_lmcaches_check_of_a_recovered_store_passes_every_time(server, monkeypatch, autorelease):
    """It puts other bytes under the same key each time, and goes on without the store until it reads them back."""
    monkeypatch.setenv(kv_shm.URL_VARIABLE, server.url)
    config = LMCacheEngineConfig.from_file(str(PACKAGE / "configs/lmcache-config-shm.yaml"))
    config.chunk_size, config.max_local_cpu_size = CHUNK, 0.01
    manager = autorelease(StorageManager(config, Staging().metadata, EventManager()))
    check = RemoteBackendHealthCheck(manager.storage_backends["RemoteBackend-shm"])
    for i in range(3):
        dirt = manager.allocate(SHAPE, torch.float32, MemoryFormat.KV_2LTD)
        dirt.tensor.fill_(i)
        dirt.ref_count_down()
        assert check._put_and_get_check()
        assert check.check()


@pytest.fixture
def autorelease():
    held = []

    def hold(manager):
        held.append(manager)
        return manager

    yield hold
    for manager in held:
        manager.close()


def test_an_address_that_is_missing_or_wrong_is_told(loop, monkeypatch):
    monkeypatch.delenv(kv_shm.URL_VARIABLE, raising=False)
    with pytest.raises(ValueError, match=r"remote_storage_plugin\.shm\.url is '': allowed: shm:///PATH"):
        registry.connect("plugin://shm", loop, Staging())
    for url in ("shm://127.0.0.1:8400", "shm://", "shm:///run/", "lm://127.0.0.1:1"):
        monkeypatch.setenv(kv_shm.URL_VARIABLE, url)
        with pytest.raises(ValueError, match="allowed: shm:///PATH"):
            registry.connect("plugin://shm", loop, Staging())
