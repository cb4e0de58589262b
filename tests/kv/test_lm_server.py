"""lm_server: what it does better than LMCache's own server, and that both are the same to clients."""

from __future__ import annotations

import contextlib
import socket
import time

import pytest
from kv_stores import LM_SERVER, Client, Server, chunk, key
from launch_harness import wait_until

from disagg_prefill_lmcache_v1.kv.stores import lm, lm_server

LMCACHES = "lmcache.v1.server"


@pytest.fixture(params=[LM_SERVER, LMCACHES])
def any_server(request):
    server = Server("lm", module=request.param)
    yield server
    server.stop()


@pytest.fixture
def server():
    server = Server("lm", size="1mb")
    yield server
    server.stop()


def send(server, data):
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        try:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
        except OSError:
            return  # the server has seen enough and closed
        connection.settimeout(30)
        with contextlib.suppress(ConnectionResetError):
            while connection.recv(4096):  # until the server has seen the end
                pass


def put_header(name, obj):
    data = lm.bytes_of(obj)
    return lm._header(lm.ClientCommand.PUT, key(name), obj, len(data)), bytes(data)


def test_what_is_put_is_got(any_server, loop):
    client = Client(any_server, loop)
    objs = [chunk(client.staging), chunk(client.staging, tokens=5)]
    client.put([key("a"), key("b")], objs)
    got = client.get([key("a"), key("b"), key("c")])
    assert [o is None or bytes(o.byte_array) for o in got] == [bytes(o.byte_array) for o in objs] + [True]


def exists_after_cut(server, loop):
    client = Client(server, loop)
    header, data = put_header("cut", chunk(client.staging))
    send(server, header + data[: len(data) // 2])
    return client.connector.exists_sync(key("cut"))


def test_a_put_that_is_cut_leaves_nothing(server, loop):
    assert not exists_after_cut(server, loop)


def test_lmcaches_server_keeps_a_key_without_a_chunk(loop):
    """Why lm_server.py is there; when this fails, LMCache has mended it."""
    stock = Server("lm", module=LMCACHES)
    try:
        assert exists_after_cut(stock, loop)
    finally:
        stock.stop()


def test_a_put_that_is_cut_leaves_the_chunk_that_was_there(server, loop):
    client = Client(server, loop)
    obj = chunk(client.staging)
    client.put([key("a")], [obj])
    header, data = put_header("a", obj)
    send(server, header + data[:100])
    assert bytes(client.get([key("a")])[0].byte_array) == data


@pytest.mark.parametrize("cut", [0, 1, 100])
def test_a_hang_up_between_and_in_messages_harms_nobody(server, loop, cut):
    client = Client(server, loop)
    header, _ = put_header("a", chunk(client.staging))
    send(server, header[:cut])
    assert client.connector.count_present([key("a")]) == 0


def test_what_cannot_be_understood_ends_that_connection_alone(server, loop):
    client = Client(server, loop)
    header, _ = put_header("a", chunk(client.staging))
    too_long = bytearray(header)
    too_long[4:8] = (2**31 - 1).to_bytes(4, "little")
    for data in (b"GET / HTTP/1.1\r\n" * 40, bytes(300), bytes(too_long), header[:36] + b"no key" + header[42:]):
        send(server, data)
    assert client.connector.count_present([key("a")]) == 0
    assert server.process.poll() is None


def test_a_full_store_drops_what_was_used_least_recently(server, loop):
    client = Client(server, loop)
    obj = chunk(client.staging)
    size = len(lm.bytes_of(obj))
    fit = (1 << 20) // size
    names = [key(i) for i in range(fit)]
    client.put(names, [obj] * fit)
    assert client.connector.count_present(names) == fit
    client.get(names[:1])
    client.put([key("one more"), key("another")], [obj] * 2)
    assert [client.connector.exists_sync(name) for name in (names[0], names[1], names[2], names[3])] == [
        True, False, False, True,
    ]  # fmt: skip


def test_putting_again_takes_no_more_room():
    backend = lm_server.BoundedBackend(100)

    class Meta:
        key, length, fmt, dtype, shape = "a", 60, None, None, None

    for _ in range(3):
        backend.put(Meta, bytearray(60))
    assert (backend.used, backend.contains("a")) == (60, True)
    backend.remove("a")
    assert (backend.used, backend.contains("a")) == (0, False)


def test_it_gets_its_port_again_at_once(server, loop):
    client = Client(server, loop)
    client.put([key("a")], [chunk(client.staging)])
    server.stop()
    begin = time.monotonic()
    server.start()
    wait_until(lambda: client.connector.count_present([key("a")]) == 0, "the new server answers", 30)
    assert time.monotonic() - begin < 50  # TIME_WAIT lasts 60


@pytest.mark.parametrize("words", [[], ["127.0.0.1"], ["127.0.0.1", "many"], ["127.0.0.1", "70000"]])
def test_wrong_arguments_are_told(words, capsys):
    assert lm_server.main(words) == 2
    assert "lm_server: allowed: HOST PORT" in capsys.readouterr().err


def test_a_wrong_size_and_a_taken_port_are_told(monkeypatch, capsys, server):
    assert lm_server.main(["127.0.0.1", str(server.port)]) == 1
    assert f"cannot listen on 127.0.0.1:{server.port}" in capsys.readouterr().err
    monkeypatch.setenv("KV_LM_SIZE", "much")
    assert lm_server.main(["127.0.0.1", "1234"]) == 2
    assert "KV_LM_SIZE 'much': allowed: a whole number and a unit" in capsys.readouterr().err
