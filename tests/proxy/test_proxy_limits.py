"""Limits for requests in progress: places, a queue, a deadline. Real proxy process, mock servers."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import socket
import time

import httpx
from proxy_harness import DEADLINE_S, Stack, stack, wait_until

BODY = json.dumps({"prompt": "x"}).encode()


def ask(one: Stack, seconds: float = 0.0) -> httpx.Response:
    """A completion that the decode mock answers after ``seconds``."""
    headers = {"content-type": "application/json", "x-mock": f"decode.delay={seconds}"}
    return httpx.post(one.url + "/v1/completions", content=BODY, headers=headers, timeout=DEADLINE_S)


def hold(one: Stack) -> socket.socket:
    """A request that takes a place until its connection closes."""
    sock = one.proxy.connect()
    served = one.decode.served
    sock.sendall(
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nx-mock: decode.delay=600\r\n"
        b"content-length: %d\r\n\r\n%b" % (len(BODY), BODY)
    )
    wait_until(lambda: one.decode.served > served, "the request runs")
    return sock


def waiting(one: Stack, count: int) -> None:
    """Wait until so many requests wait for a place."""
    text = f'disagg_in_flight{{stage="queue"}} {count}.0'
    wait_until(lambda: text in httpx.get(one.url + "/metrics").text, f"{count} wait")


def test_more_than_the_places_get_429_before_their_body() -> None:
    with stack("--max-in-flight", "2") as one:
        held = [hold(one), hold(one)]
        try:
            served = one.prefill.served
            answer = ask(one)
            assert answer.status_code == 429
            assert answer.headers["retry-after"] == "1"
            assert answer.json()["error"]["type"] == "RateLimitError"
            assert httpx.get(one.url + "/v1/models").status_code == 429
            for path in ("/health", "/ready", "/metrics"):  # the operator looks at exactly such a proxy
                assert httpx.get(one.url + path).status_code == 200
            with one.proxy.connect() as sock:  # refused at its head
                sock.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n")
                assert sock.recv(65536).startswith(b"HTTP/1.1 429")
            assert one.prefill.served == served
        finally:
            for sock in held:
                sock.close()
        wait_until(lambda: ask(one).status_code == 200, "the places are free again")


def test_the_queue_is_served_in_order_and_has_an_end() -> None:
    with stack("--max-in-flight", "1", "--max-queue", "2", "--queue-timeout-s", "20") as one:
        held = hold(one)
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            queued = [pool.submit(ask, one) for _ in range(2)]
            waiting(one, 2)
            assert ask(one).status_code == 429
            assert not any(future.done() for future in queued)
            held.close()
            assert [future.result(DEADLINE_S).status_code for future in queued] == [200, 200]
            waiting(one, 0)
        assert ask(one).status_code == 200


def test_waiting_has_a_deadline() -> None:
    with stack("--max-in-flight", "1", "--max-queue", "5", "--queue-timeout-s", "0.3") as one:
        with contextlib.closing(hold(one)):
            begin = time.monotonic()
            answer = ask(one)
            assert answer.status_code == 503
            assert 0.3 <= time.monotonic() - begin < DEADLINE_S
            assert answer.headers["retry-after"] == "1"
        wait_until(lambda: ask(one).status_code == 200, "the place is free again")


def test_the_body_of_who_waits_is_not_read() -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    limits = ("--max-in-flight", "1", "--max-queue", "1", "--queue-timeout-s", "20")
    with stack(*limits) as one, contextlib.closing(hold(one)), one.proxy.connect() as sock:
        sock.sendall(head + b"content-length: 100000000\r\n\r\n")
        waiting(one, 1)
        before, sent = one.proxy.resident_bytes(), 0
        sock.settimeout(0.5)
        with contextlib.suppress(TimeoutError):
            while sent < 100_000_000:
                sent += sock.send(b" " * 100_000)
        assert sent < 50_000_000  # what the system's buffers hold
        assert one.proxy.resident_bytes() - before < 2_000_000


def test_who_hangs_up_in_the_queue_takes_no_place() -> None:
    with stack("--max-in-flight", "1", "--max-queue", "1", "--queue-timeout-s", "20") as one:
        for _ in range(3):
            held = hold(one)
            left = one.proxy.connect()
            left.sendall(
                b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
                b"content-length: %d\r\n\r\n%b" % (len(BODY), BODY)
            )
            waiting(one, 1)
            left.close()
            waiting(one, 0)
            served = one.decode.served
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                queued = pool.submit(ask, one)
                waiting(one, 1)
                held.close()
                assert queued.result(DEADLINE_S).status_code == 200
            assert one.decode.served == served + 1
