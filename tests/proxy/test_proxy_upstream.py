"""The proxy's HTTP client: its contract, case by case, and fuzzed against h11 as the reference. No network."""

from __future__ import annotations

import asyncio
import gc
import itertools
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import h11
import proxy_harness
import pytest
import uvloop
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from disagg_prefill_lmcache_v1.proxy.settings import parse_url
from disagg_prefill_lmcache_v1.proxy.upstream import Client, Connection, Limits, Response, UpstreamError
from disagg_prefill_lmcache_v1.proxy.upstream import resolver as upstream_resolver

REQUEST = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
EARLY = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n"


class FakeTransport:
    """Transport that only notes what is done to it."""

    def __init__(self) -> None:
        self.written = b""
        self.closed = self.paused = False

    def write(self, data: bytes) -> None:
        self.written += data

    def writelines(self, parts: list[bytes]) -> None:
        self.written += b"".join(parts)

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = True

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False


class Collector:
    """Relay that keeps what it gets, with the framing of raw chunks undone."""

    def __init__(self, take_raw: bool) -> None:
        self.body = b""
        self.raw_reads = 0
        self.ended = False
        self.error: UpstreamError | None = None
        self.take_raw = take_raw

    def raw(self, data: bytes) -> bool:
        if not self.take_raw:
            return False
        self.raw_reads += 1
        while data:
            size, _, data = data.partition(b"\r\n")
            length = int(size, 16)
            assert data[length : length + 2] == b"\r\n"
            self.body += data[:length]
            data = data[length + 2 :]
        return True

    def payload(self, data: bytes) -> None:
        self.body += data

    def end(self) -> None:
        self.ended = True

    def lost(self, error: UpstreamError) -> None:
        self.error = error


def client_of(port: int = 1, **options: Any) -> Client:
    values = {"connect_timeout_s": 30.0, "idle_connection_s": 60.0, "max_head_bytes": 4096, **options}
    return Client(parse_url(f"http://127.0.0.1:{port}", "test"), **values)


def exchange(
    reads: list[bytes],
    end: str = "open",
    *,
    no_body: bool = False,
    buffer_limit: int = 1 << 20,
    relay: Collector | None = None,
) -> tuple[Response | UpstreamError, Connection]:
    """One exchange whose answer comes in these reads; ``end`` is open, eof or reset."""

    async def run() -> tuple[Response | UpstreamError, Connection]:
        client = client_of()
        connection = Connection(client, 4096)
        transport = FakeTransport()
        connection.connection_made(transport)
        waiter = connection.exchange(REQUEST, no_body=no_body, buffer_limit=buffer_limit, limits=Limits(), begun=0.0)
        attached = False
        for data in reads:
            if data and not transport.closed:
                connection.data_received(data)
            if relay is not None and not attached and waiter.done() and not waiter.exception():
                if not waiter.result().complete:
                    connection.stream_to(relay, raw=True)
                attached = True
        if end != "open" and not transport.closed:
            connection.connection_lost(None if end == "eof" else ConnectionResetError("reset"))
        if not waiter.done():
            waiter.cancel()
            return UpstreamError("pending", "no answer yet"), connection
        return waiter.exception() or waiter.result(), connection

    return asyncio.run(run())


def chunked(*parts: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


# -- contract, case by case


@pytest.mark.parametrize(
    ("answer", "end", "body"),
    [
        (OK + b"Content-Length: 5\r\n\r\nhello", "open", b"hello"),
        (OK + b"content-length: 0\r\n\r\n", "open", b""),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(b"he", b"llo"), "open", b"hello"),
        (CHUNKED + b"3;ext=1\r\nhel\r\n2 \r\nlo\r\n0\r\nTrailer: x\r\n\r\n", "open", b"hello"),
        (OK + b"connection: close\r\n\r\nhello", "eof", b"hello"),
        (b"HTTP/1.0 200 OK\r\n\r\nhello", "eof", b"hello"),
        (EARLY + OK + b"content-length: 2\r\n\r\nhi", "open", b"hi"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", "open", b""),
        (b"HTTP/1.1 304 Not Modified\r\ncontent-length: 7\r\n\r\n", "open", b""),
    ],
)  # fmt: skip
@pytest.mark.parametrize("step", [1, 2, 7, 10_000])
def test_answers(answer: bytes, end: str, body: bytes, step: int) -> None:
    reads = [answer[i : i + step] for i in range(0, len(answer), step)]
    response, _ = exchange(reads, end)
    assert isinstance(response, Response), response
    assert response.complete
    assert response.body == body


@pytest.mark.parametrize(
    ("answer", "end", "kind"),
    [
        (b"", "eof", "lost"),
        (b"", "reset", "lost"),
        (OK + b"content-length: 5\r\n\r\nhel", "eof", "lost"),
        (OK + b"transfer-encoding: chunked\r\n\r\n5\r\nhello\r\n", "eof", "lost"),
        (OK + b"transfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n", "eof", "lost"),
        (OK + b"connection: close\r\n\r\nhello", "reset", "lost"),
        (OK + b"x: y", "eof", "lost"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "open", "protocol"),
        (b"HTTP/2 200\r\n\r\n", "open", "protocol"),
        (b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n", "open", "protocol"),
        (b"HTTP/1.1 abc\r\n\r\n", "open", "protocol"),
        (OK + b"content-length: -1\r\n\r\n", "open", "protocol"),
        (OK + b"content-length: 1_0\r\n\r\n", "open", "protocol"),
        (OK + b"content-length: 5\r\ncontent-length: 6\r\n\r\nhello!", "open", "protocol"),
        (OK + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", "open", "protocol"),
        (OK + b"transfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n", "open", "protocol"),
        (OK + b"transfer-encoding: chunked\r\n\r\nzz\r\n", "open", "protocol"),
        (OK + b"transfer-encoding: chunked\r\n\r\n1_0\r\n", "open", "protocol"),
        (OK + b"transfer-encoding: chunked\r\n\r\n+5\r\nhello\r\n", "open", "protocol"),
        (OK + b"transfer-encoding: chunked\r\n\r\n5\r\nhelloXX", "open", "protocol"),
        (OK + b"transfer-encoding: chunked\r\n\r\n" + b"1" * 5000, "open", "protocol"),
        (OK + b"transfer-encoding: chunked\r\n\r\nffffffffffffffffffff\r\n", "open", "protocol"),
        (OK + b"transfer-encoding: chunked\r\n\r\n0\r\n" + b"a: b\r\n" * 5000, "open", "protocol"),
        (OK + b"x: " + b"y" * 5000, "open", "protocol"),
        (OK + b"x: " + b"y" * 5000 + b"\r\n\r\n", "open", "protocol"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("step", [1, 3, 10_000])
def test_failures(answer: bytes, end: str, kind: str, step: int) -> None:
    reads = [answer[i : i + step] for i in range(0, len(answer), step)]
    response, _ = exchange(reads, end)
    assert isinstance(response, UpstreamError), response
    assert response.kind == kind


def test_head_has_no_body() -> None:
    response, connection = exchange([OK + b"content-length: 42\r\n\r\n"], no_body=True)
    assert isinstance(response, Response)
    assert (response.body, response.length) == (b"", 42)
    assert connection.is_idle()


@pytest.mark.parametrize(
    ("answer", "kept"),
    [
        (OK + b"content-length: 2\r\n\r\nhi", True),
        (OK + b"content-length: 2\r\n\r\nhi" + OK, False),
        (OK + b"transfer-encoding: chunked\r\n\r\n" + chunked(b"x") + b"garbage", False),
        (OK + b"content-length: 2\r\nconnection: close\r\n\r\nhi", False),
        (b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nhi", False),
    ],
)
def test_reuse_only_of_a_clean_connection(answer: bytes, kept: bool) -> None:
    response, connection = exchange([answer])
    assert isinstance(response, Response)
    assert connection.is_idle() is kept
    assert connection.transport.closed is not kept
    assert connection._owner.idle_connections == int(kept)


def test_garbage_on_an_idle_connection_closes_it() -> None:
    async def run() -> None:
        client = client_of()
        connection = Connection(client, 4096)
        connection.connection_made(FakeTransport())
        connection.exchange(REQUEST, no_body=False, buffer_limit=100, limits=Limits(), begun=0.0)
        connection.data_received(OK + b"content-length: 0\r\n\r\n")
        assert client.idle_connections == 1
        connection.data_received(b"HTTP/1.1 200 surprise\r\n\r\n")
        assert client.idle_connections == 0
        assert connection.transport.closed

    asyncio.run(run())


def test_events_are_handed_over_as_they_come_and_raw() -> None:
    relay = Collector(take_raw=True)
    head = OK + b"content-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    one = b"9\r\ndata: 1\n\n\r\n"
    response, connection = exchange([head, one, one + one, one + b"0\r\n\r\n"], relay=relay)
    assert isinstance(response, Response)
    assert relay.ended
    assert relay.body == b"data: 1\n\n" * 4
    assert relay.raw_reads == 2
    assert connection.is_idle()


def test_a_cut_stream_is_told_as_lost() -> None:
    relay = Collector(take_raw=True)
    head = OK + b"content-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    exchange([head, b"9\r\ndata: 1\n\n\r\n"], "eof", relay=relay)
    assert relay.error is not None
    assert not relay.ended


def test_long_answers_are_streamed() -> None:
    relay = Collector(take_raw=True)
    response, _ = exchange([OK + b"content-length: 100\r\n\r\n", b"x" * 60, b"x" * 40], buffer_limit=50, relay=relay)
    assert isinstance(response, Response)
    assert relay.body == b"x" * 100
    assert relay.ended


def test_pause_and_silence() -> None:
    async def run() -> None:
        client = client_of()
        connection = Connection(client, 4096)
        connection.connection_made(FakeTransport())
        waiter = connection.exchange(
            REQUEST, no_body=False, buffer_limit=9, limits=Limits(begin_s=5, silence_s=2), begun=0.0
        )
        client.sweep(3.0)
        assert not waiter.done()
        connection.data_received(OK + b"content-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        relay = Collector(take_raw=True)
        connection.stream_to(relay, raw=True)
        client.sweep(1.5)
        connection.data_received(b"9\r\ndata: 1\n\n\r\n")
        client.sweep(1.5)
        assert relay.error is None
        client.sweep(1.0)
        assert relay.error.kind == "timeout"
        assert connection.transport.closed
        assert not client.active

    asyncio.run(run())


def test_no_answer_times_out() -> None:
    async def run() -> None:
        client = client_of()
        connection = Connection(client, 4096)
        connection.connection_made(FakeTransport())
        waiter = connection.exchange(REQUEST, no_body=False, buffer_limit=9, limits=Limits(begin_s=5), begun=0.0)
        client.sweep(5.0)
        with pytest.raises(UpstreamError) as caught:
            await waiter
        assert caught.value.kind == "timeout"

    asyncio.run(run())


def test_limits_count_from_the_request_and_not_while_the_proxy_itself_stood_still(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def run() -> None:
        client = client_of()
        now = client.loop.time()
        monkeypatch.setattr(client.loop, "time", lambda: now)
        now += 100.0
        client.sweep(100.0)
        now += 0.5
        connection = Connection(client, 4096)
        connection.connection_made(FakeTransport())
        connection.set_idle(now)
        client._idle[connection] = None
        task = asyncio.ensure_future(client.request(REQUEST, limits=Limits(begin_s=5.0)))
        await asyncio.sleep(0)
        assert connection in client.active
        now += 60.0  # of which the proxy was stopped for all but one
        client.sweep(1.0)
        now += 4.4
        client.sweep(4.4)
        await asyncio.sleep(0)
        assert not task.done()
        now += 0.2
        client.sweep(0.2)
        with pytest.raises(UpstreamError, match="no answer within 5 s"):
            await task

    asyncio.run(run())


def test_limits_of_an_answer_hold_however_slowly_it_comes() -> None:
    async def run(limits: Limits, reads: list[bytes]) -> UpstreamError | Response | None:
        client = client_of()
        connection = Connection(client, 4096)
        connection.connection_made(FakeTransport())
        waiter = connection.exchange(REQUEST, no_body=False, buffer_limit=99, limits=limits, begun=0.0)
        for data in reads:
            client.sweep(0.5)  # each read comes in time for a limit of silence
            if not connection.transport.closed:
                connection.data_received(data)
        return (waiter.exception() or waiter.result()) if waiter.done() else waiter.cancel() and None

    head = OK + b"content-length: 5\r\n\r\n"
    slow_head = [head[i : i + 1] for i in range(len(head))] + [b"hello"]
    slow_body = [head, *(b"%c" % c for c in b"hello")]
    for limits, reads, what in (
        (Limits(begin_s=2), slow_head, "no answer within 2 s"),
        (Limits(whole_s=2), slow_head, "no whole answer within 2 s"),
        (Limits(whole_s=2), slow_body, "no whole answer within 2 s"),
    ):
        found = asyncio.run(run(limits, reads))
        assert isinstance(found, UpstreamError), (limits, found)
        assert (found.kind, str(found)) == ("timeout", what)
    for limits in (Limits(begin_s=2), Limits(whole_s=4), Limits(silence_s=1)):
        assert isinstance(asyncio.run(run(limits, slow_body)), Response)


# -- on real sockets


def with_server(handler: Callable[..., Any], use: Callable[[Client], Any], **options: Any) -> Any:
    async def run() -> Any:
        server = await asyncio.start_server(handler, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        client = client_of(port, **options)
        try:
            return await asyncio.wait_for(use(client), 60)
        finally:
            client.close()
            server.close()

    return asyncio.run(run())


LINGER_0 = b"\1\0\0\0\0\0\0\0"  # close() then resets the connection


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
@pytest.mark.parametrize("size", [0, 5_000_000])
@pytest.mark.parametrize(
    ("server_does", "taken"),
    [("close", False), ("reset", True), ("read, close", True), ("read, reset", True), ("read some, close", True)],
)
def test_a_request_on_a_reused_connection_that_ends_tells_whether_it_was_taken(
    new_loop: Callable[[], asyncio.AbstractEventLoop], size: int, server_does: str, taken: bool
) -> None:
    """Only a connection that was closed before is known to have taken nothing; nothing is sent a second time."""
    listener = socket.create_server(("127.0.0.1", 0))
    closed_first = threading.Event()
    got: list[bytes] = []

    def serve() -> None:
        sock, _ = listener.accept()
        sock.recv(65536)
        sock.sendall(OK + b"content-length: 0\r\n\r\n")
        if server_does.startswith("read"):
            got.append(sock.recv(10 if "some" in server_does else 65536))
        else:
            closed_first.wait(60)
        if server_does.endswith("reset"):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_0)
        sock.close()

    async def use() -> None:
        client = client_of(port=listener.getsockname()[1])
        await client.request(REQUEST)
        closed_first.set()
        if not server_does.startswith("read"):
            thread.join(60)  # on purpose without giving the event loop a chance to see the end
        with pytest.raises(UpstreamError) as caught:
            await client.request((REQUEST, b"x" * size))
        assert (caught.value.kind, caught.value.taken) == ("lost", taken)
        assert len(got) == int(server_does.startswith("read"))

    thread = threading.Thread(target=serve)
    thread.start()
    loop = new_loop()
    loop.run_until_complete(asyncio.wait_for(use(), 60))
    loop.close()
    thread.join(60)
    listener.setblocking(False)
    with pytest.raises(BlockingIOError):  # no second connection was made
        listener.accept()
    listener.close()


def test_a_closed_client_ends_idle_connections_now_and_busy_ones_after_their_answer() -> None:
    ends: list[bytes] = []

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(OK + b"content-length: 2\r\n\r\nhi")
        request = await reader.read(1000)
        if request:
            while not ends:  # until the other connection has ended
                await asyncio.sleep(0.001)
            writer.write(OK + b"content-length: 2\r\n\r\nho")
            request = await reader.read()
        ends.append(request)
        writer.close()

    async def use(client: Client) -> None:
        await asyncio.gather(client.request(REQUEST), client.request(REQUEST))
        assert client.idle_connections == 2
        busy = asyncio.create_task(client.request(REQUEST))
        while not client.active:
            await asyncio.sleep(0)
        client.close()
        assert client.idle_connections == 0
        assert (await busy).body == b"ho"
        while ends != [b"", b""]:
            await asyncio.sleep(0.001)

    with_server(handler, use)


def test_a_new_connection_that_closes_is_an_error() -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.close()

    async def use(client: Client) -> None:
        with pytest.raises(UpstreamError) as caught:
            await client.request(REQUEST)
        assert caught.value.kind == "lost"

    with_server(handler, use)


def test_a_connection_that_ends_before_it_is_used_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async def use(client: Client) -> None:
        connect = client._connect

        async def connect_and_lose(limit_s: float) -> Connection:
            connection = await connect(limit_s)
            connection.transport.abort()
            await asyncio.sleep(0.01)
            return connection

        monkeypatch.setattr(client, "_connect", connect_and_lose)
        with pytest.raises(UpstreamError) as caught:
            await asyncio.wait_for(client.request(REQUEST), 30)
        assert (caught.value.kind, caught.value.taken) == ("lost", False)
        assert not client.active

    with_server(handler, use)


def test_cancelled_after_its_answer_a_request_leaves_the_connection_to_the_next_one() -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for number in (1, 2):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(OK + b"content-length: 1\r\n\r\n%d" % number)
        await reader.read()
        writer.close()

    async def use(client: Client) -> None:
        release, following = client.release, []

        def release_to_the_next(connection: Connection, keep_alive: bool) -> None:
            release(connection, keep_alive)
            if not following:
                following.append(asyncio.create_task(client.request(REQUEST)))
                first.cancel()

        client.release = release_to_the_next  # type: ignore[method-assign]
        first = asyncio.create_task(client.request(REQUEST))
        with pytest.raises(asyncio.CancelledError):
            await first
        assert (await asyncio.wait_for(following[0], 30)).body == b"2"

    with_server(handler, use)


def test_a_cancellation_that_comes_with_the_connection_counts() -> None:
    heard = []

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(await reader.read())
        writer.close()

    async def use(client: Client) -> None:
        create = client.loop.create_connection

        async def create_and_cancel(*args: Any, **kwargs: Any) -> Any:
            made = await create(*args, **kwargs)
            task.cancel()  # the waiting request has not run yet
            return made

        client.loop.create_connection = create_and_cancel  # type: ignore[method-assign]
        task = asyncio.create_task(client.request(REQUEST))
        with pytest.raises(asyncio.CancelledError):
            await task
        while not heard:
            await asyncio.sleep(0.001)
        assert heard == [b""]

    with_server(handler, use)


def test_a_server_that_takes_no_connection_is_given_up_soon() -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async def use(client: Client) -> None:
        tasks = asyncio.all_tasks()
        client.loop.create_connection = lambda *args, **kwargs: asyncio.sleep(60)  # type: ignore[method-assign]
        with pytest.raises(UpstreamError, match=r"no connection within 0\.05 s") as caught:
            await asyncio.wait_for(client.request(REQUEST), 30)
        assert (caught.value.kind, caught.value.taken) == ("unreachable", False)
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == tasks

    with_server(handler, use, connect_timeout_s=0.05)


def test_cancelling_closes_the_connection_at_once() -> None:
    closed = asyncio.Event()

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        try:
            if not await reader.read():
                closed.set()
        except ConnectionError:
            closed.set()
        writer.close()

    async def use(client: Client) -> None:
        task = asyncio.create_task(client.request(REQUEST))
        while not client.active:
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait_for(closed.wait(), 30)
        assert not client.active

    with_server(handler, use)


def test_refused() -> None:
    async def run() -> None:
        with pytest.raises(UpstreamError) as caught:
            await client_of(proxy_harness.dead_port()).request(REQUEST)
        assert (caught.value.kind, caught.value.taken) == ("refused", False)

    asyncio.run(run())


def test_the_proxys_own_shortage_is_not_the_servers_refusal() -> None:
    """In a process of its own: with no descriptor left, pytest fails too."""
    program = """
import asyncio, os, resource, test_proxy_upstream as t
async def handler(reader, writer): writer.close()
async def use(client):
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) - 1,) * 2)
    try:
        await client.request(t.REQUEST)
    except t.UpstreamError as error:
        print(error.kind, error.taken)
t.with_server(handler, use)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60,
                            env={"PYTHONPATH": ":".join(sys.path)}, check=False)  # fmt: skip
    assert result.stdout == "exhausted False\n", result.stderr


# -- names of servers


def look_up(monkeypatch: pytest.MonkeyPatch, answers: list[list[str] | Exception], use: Callable[..., Any]) -> None:
    """Run ``use(client, loop)`` for a server whose name resolves to these addresses, look-up after look-up."""

    async def run() -> None:
        loop = asyncio.get_running_loop()
        server = await asyncio.start_server(answer_once, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]

        async def getaddrinfo(host: str, port: int, **_: Any) -> list[Any]:
            assert host == "pool.test"
            found = answers.pop(0) if len(answers) > 1 else answers[0]
            if isinstance(found, Exception):
                raise found
            return [(0, 0, 0, "", (address, port)) for address in found]

        monkeypatch.setattr(loop, "getaddrinfo", getaddrinfo, raising=False)
        client = Client(parse_url(f"http://pool.test:{port}", "test"), connect_timeout_s=1.0, idle_connection_s=60.0,
                        max_head_bytes=4096)  # fmt: skip
        await asyncio.wait_for(use(client, loop), 20)
        client.close()
        server.close()

    asyncio.run(run())


async def answer_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(OK + b"connection: close\r\ncontent-length: 0\r\n\r\n")
    writer.close()


def test_all_addresses_of_a_name_are_tried_and_a_bad_one_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    async def use(client: Client, loop: asyncio.AbstractEventLoop) -> None:
        tried = []
        create = loop.create_connection

        async def note(factory: Any, host: str, port: int, **options: Any) -> Any:
            tried.append(host)
            return await create(factory, host, port, **options)

        monkeypatch.setattr(loop, "create_connection", note, raising=False)
        for _ in range(4):
            assert (await client.request(REQUEST)).status == 200
        assert tried.count("127.0.0.1") == 4
        assert tried.count("127.0.0.2") == 1  # nothing listens there

    look_up(monkeypatch, [["127.0.0.1", "127.0.0.2"]], use)


def test_a_name_is_looked_up_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def use(client: Client, loop: asyncio.AbstractEventLoop) -> None:
        monkeypatch.setattr(upstream_resolver, "_KEPT_S", 0.0)
        with pytest.raises(UpstreamError, match="has no address") as caught:
            await client.request(REQUEST)
        assert (caught.value.kind, caught.value.taken) == ("refused", False)
        with pytest.raises(UpstreamError, match="refused"):
            await client.request(REQUEST)
        deadline = loop.time() + 10
        while True:  # the answer that is known does until the new one has come
            try:
                assert (await client.request(REQUEST)).status == 200
                break
            except UpstreamError:
                assert loop.time() < deadline

    look_up(monkeypatch, [socket.gaierror(-2, "unknown"), ["127.0.0.2"], ["127.0.0.1"]], use)


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_look_up_that_nobody_waits_for_fails_in_silence(new_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    complaints: list[Any] = []

    async def use() -> None:
        loop = asyncio.get_running_loop()
        client = Client(parse_url("http://no-such-host.invalid:1", "test"), connect_timeout_s=0.0001,
                        idle_connection_s=1.0, max_head_bytes=4096)  # fmt: skip
        for _ in range(20):
            with pytest.raises(UpstreamError):
                await client.request(REQUEST)
        for _ in range(8):  # the system works on them one after the other: ours are done as well then
            with pytest.raises(OSError, match="not known"):
                await loop.getaddrinfo("no-such-host.invalid", 1)
        gc.collect()
        await asyncio.sleep(0)

    loop = new_loop()
    loop.set_exception_handler(lambda _, context: complaints.append(context))
    loop.run_until_complete(use())
    loop.close()
    assert not complaints


# -- fuzzed against h11

# Always the same cases, and as many on a busy machine, where they are made slowly.
FUZZ = settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def reference(answer: bytes) -> tuple[int, bytes] | None:
    """What h11 makes of an answer followed by the end of the connection; None if it is bad or unfinished."""
    connection = h11.Connection(h11.CLIENT)
    connection.send(h11.Request(method="GET", target="/", headers=[("host", "x")]))
    connection.send(h11.EndOfMessage())
    status, body = 0, b""
    try:
        connection.receive_data(answer)
        connection.receive_data(b"")
        while True:
            event = connection.next_event()
            if isinstance(event, h11.Response):
                status = event.status_code
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                return status, body
            elif event in (h11.NEED_DATA, h11.PAUSED) or isinstance(event, h11.ConnectionClosed):
                return None
    except h11.RemoteProtocolError:
        return None


TOKEN = st.text("abcdefghijklmnopqrstuvwxyz-", min_size=1, max_size=12).map(lambda t: "x-" + t)
VALUE = st.text("abcXYZ 0123456789,;=/\"'", max_size=30).map(str.strip)


@st.composite
def answers(draw: Any) -> bytes:
    status = draw(st.sampled_from([200, 201, 400, 404, 500, 204, 304, 302]))
    body = draw(st.binary(max_size=400))
    headers = [f"{name}: {value}\r\n".encode() for name, value in draw(st.lists(st.tuples(TOKEN, VALUE), max_size=5))]
    framing = draw(st.sampled_from(["length", "chunked", "close"]))
    if status in (204, 304):
        framing, body = "length", b""
    if framing == "length":
        headers.append(b"Content-Length: %d\r\n" % len(body))
        payload = body
    elif framing == "chunked":
        headers.append(b"Transfer-Encoding: chunked\r\n")
        payload, rest = b"", body
        while rest:
            size = draw(st.integers(1, len(rest)))
            extension = draw(st.sampled_from([b"", b";a=b", b";x"]))
            payload += b"%x%b\r\n%b\r\n" % (size, extension, rest[:size])
            rest = rest[size:]
        payload += b"0\r\n" + draw(st.sampled_from([b"", b"x-trailer: 1\r\n"])) + b"\r\n"
    else:
        headers.append(b"Connection: close\r\n")
        payload = body
    if draw(st.booleans()):
        headers.append(b"Content-Type: text/event-stream\r\n")
    informational = draw(st.sampled_from([b"", b"HTTP/1.1 100 Continue\r\n\r\n"]))
    return (
        informational
        + b"HTTP/1.1 %d Reason\r\n" % status
        + b"".join(draw(st.permutations(headers)))
        + b"\r\n"
        + payload
    )


def split(draw_cuts: list[int], data: bytes) -> list[bytes]:
    cuts = sorted({cut % (len(data) + 1) for cut in draw_cuts})
    edges = [0, *cuts, len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges)]


def ours(reads: list[bytes], raw: bool) -> tuple[int, bytes] | None:
    relay = Collector(take_raw=raw)
    response, _ = exchange(reads, "eof", buffer_limit=100, relay=relay)
    if isinstance(response, UpstreamError):
        return None
    if response.complete and not relay.ended:
        return response.status, response.body
    return (response.status, relay.body) if relay.ended else None


@FUZZ
@given(answers(), st.lists(st.integers(0, 2000), max_size=12), st.booleans())
def test_good_answers_equal_the_reference(answer: bytes, cuts: list[int], raw: bool) -> None:
    wanted = reference(answer)
    assert wanted is not None
    assert ours(split(cuts, answer), raw) == wanted


@FUZZ
@given(
    answers(),
    st.lists(st.integers(0, 2000), max_size=6),
    st.lists(st.tuples(st.integers(0, 2000), st.sampled_from(["drop", "set", "insert", "cut"]), st.integers(0, 255)),
             min_size=1, max_size=4),
    st.booleans(),
)  # fmt: skip
def test_damaged_answers_never_differ_from_the_reference(
    answer: bytes, cuts: list[int], damage: list[tuple[int, str, int]], raw: bool
) -> None:
    data = bytearray(answer)
    for position, what, value in damage:
        at = position % (len(data) + 1)
        if what == "drop":
            del data[at : at + 1]
        elif what == "set" and at < len(data):
            data[at] = value
        elif what == "insert":
            data.insert(at, value)
        elif what == "cut":
            del data[at:]
    found, wanted = ours(split(cuts, bytes(data)), raw), reference(bytes(data))
    if found is not None and wanted is not None:
        assert found == wanted


@FUZZ
@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=5))
def test_noise_ends_in_an_error(noise: bytes, cuts: list[int]) -> None:
    response, connection = exchange(split(cuts, noise), "eof")
    assert isinstance(response, UpstreamError)
    assert response.kind in ("lost", "protocol")
    assert not connection._owner.active


def test_idle_connections_are_closed_in_time_and_a_few_at_once() -> None:
    async def run() -> None:
        client = client_of(idle_connection_s=60.0)
        for _ in range(100):
            connection = Connection(client, 4096)
            connection.connection_made(FakeTransport())
            connection.exchange(REQUEST, no_body=False, buffer_limit=9, limits=Limits(), begun=0.0)
            connection.data_received(OK + b"content-length: 0\r\n\r\n")
        assert client.idle_connections == 100
        client.sweep(1.0)
        assert client.idle_connections == 100
        client.idle_connection_s = 0.0
        await asyncio.sleep(0.01)
        client.sweep(1.0)
        assert 50 < client.idle_connections < 100
        deadline = asyncio.get_running_loop().time() + 30
        while client.idle_connections:
            assert asyncio.get_running_loop().time() < deadline
            await asyncio.sleep(0.01)

    asyncio.run(run())
