"""Clients with bad intentions, all at once, for the proxy's tests.

    python tests/helpers/hostile_clients.py PORT KEY COUNT

Opens COUNT connections of each kind below to 127.0.0.1:PORT and keeps at it; prints ``at work`` once each kind has
done its worst at least once. Ends, with a line of counts, when its standard input does. A kind that knows no KEY sends
none.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import socket
import struct
import sys
from collections import Counter
from collections.abc import Awaitable, Callable

PAUSE_S = 0.25  # between two attempts of one connection
DRIP_S = 0.05
MIB = 1 << 20

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def head(key: str, length: int, more: str = "") -> bytes:
    """Head of a request; without an API key if ``key`` is empty."""
    line = f"authorization: Bearer {key}\r\n" if key else ""
    return (
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        f"{line}{more}content-length: {length}\r\n\r\n"
    ).encode()


async def drip(writer: asyncio.StreamWriter, begin: bytes) -> None:
    """One byte at a time, for ever."""
    writer.write(begin)
    while True:
        writer.write(b"a")
        await writer.drain()
        await asyncio.sleep(DRIP_S)


async def slow_head(key: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await drip(writer, b"GET /v1/models HTTP/1.1\r\nhost: x\r\nx-slow: ")


async def slow_second_head(key: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await drip(writer, b"GET /health HTTP/1.1\r\nhost: x\r\n\r\nGET /v1/models HTTP/1.1\r\nx-slow: ")


async def slow_body(key: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await drip(writer, head(key, 1_000_000))


async def slow_health_body(key: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await drip(writer, b"POST /health HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n")


async def huge_header(key: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"GET /v1/models HTTP/1.1\r\nhost: x\r\nx-huge: " + b"a" * 2 * MIB)
    await reader.read()


async def many_headers(key: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"GET /v1/models HTTP/1.1\r\n" + b"x:y\r\n" * 100_000)
    await reader.read()


async def body_without_key(key: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(head("", 100 * MIB) + b"x" * 4 * MIB)
    await reader.read()


async def deep_json(key: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    body = b'{"prompt":' + b"[" * 50_000
    writer.write(head(key, len(body)) + body)
    await reader.read(1000)


async def stalled_stream(key: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    body = json.dumps({"prompt": "x", "stream": True}).encode()
    writer.write(head(key, len(body), "x-mock: decode.chunks=100000;decode.size=5000\r\n") + body)
    await asyncio.sleep(3600)  # and never reads


async def stalled_answer(key: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(head(key, 2, "x-mock: decode.size=1000000\r\n") + b"{}")
    await asyncio.sleep(3600)


async def garbage(key: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(random.randbytes(5000))
    await reader.read()


async def cut_request(key: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    whole = head(key, 50, "x-mock: delay=5\r\n") + b"{" + b" " * 48 + b"}"
    writer.write(whole[: random.randrange(1, len(whole) + 1)])
    await asyncio.sleep(random.random() * 0.1)
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, random.randrange(2) - 1))


async def smuggled(key: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(head(key, 400) + b"DELETE /v1/admin/secret HTTP/1.1\r\nhost: x\r\n\r\n")
    await reader.read()
    writer.write(b"DELETE /v1/admin/secret HTTP/1.1\r\nhost: x\r\n\r\n" * 100)


async def flood(key: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n" * 500)
    await reader.read()


KINDS: tuple[Callable[[str, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]], ...] = (
    slow_head, slow_second_head, slow_body, slow_health_body, huge_header, many_headers, body_without_key, deep_json,
    stalled_stream, stalled_answer, garbage, cut_request, smuggled, flood,
)  # fmt: skip


async def main(port: int, key: str, count: int) -> None:
    """Until standard input ends."""
    attempts: Counter[str] = Counter()

    async def one(kind: Callable[..., Awaitable[None]]) -> None:
        await asyncio.sleep(random.random() * PAUSE_S)
        while True:
            with contextlib.suppress(OSError):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                attempts[kind.__name__] += 1
                try:
                    await kind(key, reader, writer)
                finally:
                    writer.close()
            await asyncio.sleep(PAUSE_S)

    tasks = [asyncio.create_task(one(kind)) for kind in KINDS for _ in range(count)]
    while len(attempts) < len(KINDS):
        await asyncio.sleep(0.01)
    print("at work", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    print(json.dumps(attempts), flush=True)


if __name__ == "__main__":
    os.nice(5)  # what is measured beside it is the proxy, not who of the two gets the core
    asyncio.run(main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
