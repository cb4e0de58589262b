"""Mock OpenAI server for tests and benchmarks of the proxy. It is not vLLM: its answers are made up.

Run it as a process: ``python tests/mock_openai_server.py --port 0``; it prints ``mock listening on PORT``.

What a request gets can be chosen by its ``x-mock`` header, a list of KEY=VALUE separated by ``;``, or for a whole
server by ``--behave`` in the same form:
  status=N       answer with this status
  delay=S        seconds before the answer
  chunks=N       parts of a streamed answer         gap=S   seconds between them
  size=N         bytes of text in each part / in the whole answer
  cut=N          close the connection after N parts of the stream (0: before the answer)
  hang=N         stop sending after N parts, keep the connection
  kv=STATE       x-kv-state header of the answer    kv_wait=MS
  told=TEXT      x-kv-reused-tokens header of the answer    timing=TEXT   its x-kv-timing header
  layout=TEXT    x-kv-layout header of /health (only of the whole server)
  split=N        write the stream in pieces of N bytes
  close=1        answer, then close the connection
  params=TEXT    kv_transfer_params of the answer, JSON (only where the request has them)
A key that begins with ``prefill.`` or ``decode.`` applies only to a server with that ``--role``.
Every request's method, path, headers and body are kept; GET /mock/requests lists them, POST /mock/reset forgets them.
GET /mock/state tells the open connections and how many requests were aborted by the other side.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys

import httptools

try:
    import uvloop
except ImportError:
    uvloop = None

_JSON = b"content-type: application/json\r\n"


def parse_behaviour(text: str, role: str = "") -> dict[str, str]:
    """KEY=VALUE pairs that apply to this role."""
    found = {}
    for pair in text.split(";"):
        key, _, value = pair.strip().partition("=")
        scope, dot, rest = key.rpartition(".")
        if key and (not dot or scope == role):
            found[rest if dot else key] = value
    return found


class MockState:
    """What all connections of one mock server share."""

    def __init__(self, role: str = "", behaviour: str = "", keep: bool = True) -> None:
        self.role = role
        self.behaviour = parse_behaviour(behaviour, role)
        self.keep = keep
        self.requests: list[dict[str, object]] = []
        self.connections = 0
        self.aborted = 0
        self.running = 0
        self.served = 0


class MockProtocol(asyncio.Protocol):
    """One connection of the mock server."""

    def __init__(self, state: MockState) -> None:
        self.state = state
        self.task: asyncio.Task[None] | None = None
        self.drained = asyncio.Event()
        self.drained.set()
        self.queue: list[tuple[str, str, dict[str, str], bytes]] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: asyncio.Transport = transport  # type: ignore[assignment]
        self.parser = httptools.HttpRequestParser(self)
        self.state.connections += 1

    def connection_lost(self, exc: Exception | None) -> None:
        self.state.connections -= 1
        self.drained.set()
        if self.task is not None and not self.task.done():
            self.state.aborted += 1
            self.task.cancel()

    def pause_writing(self) -> None:
        self.drained.clear()

    def resume_writing(self) -> None:
        self.drained.set()

    def data_received(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            self.transport.close()

    def on_message_begin(self) -> None:
        self.headers: dict[str, str] = {}
        self.body: list[bytes] = []
        self.url = b""

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_body(self, body: bytes) -> None:
        self.body.append(body)

    def on_message_complete(self) -> None:
        request = (self.parser.get_method().decode(), self.url.decode("latin-1"), self.headers, b"".join(self.body))
        if self.state.keep:
            method, url, headers, body = request
            self.state.requests.append(
                {"method": method, "path": url, "headers": headers, "body": body.decode("latin-1")}
            )
        if not self._quick(request):
            self.task = asyncio.get_running_loop().create_task(self._serve(*request))

    def write(self, status: int, lines: bytes, body: bytes) -> None:
        self.transport.write(b"HTTP/1.1 %d Mock\r\n%bcontent-length: %d\r\n\r\n%b" % (status, lines, len(body), body))

    def _quick(self, request: tuple[str, str, dict[str, str], bytes]) -> bool:
        """Answer at once what needs no waiting."""
        method, url, headers, body = request
        if self.state.behaviour or "x-mock" in headers or method != "POST":
            return False
        if not url.startswith("/v1/") or (b'"stream":true' in body or b'"stream": true' in body):
            return False
        self.state.served += 1
        lines = _JSON
        if self.state.role == "prefill":
            lines += b"x-kv-state: stored\r\nx-kv-wait-ms: 1.5\r\n"
        self.write(200, lines, _answer(url, body, "x" * 64))
        return True

    async def _serve(self, method: str, url: str, headers: dict[str, str], body: bytes) -> None:
        state = self.state
        state.running += 1
        try:
            path = url.partition("?")[0]
            if path == "/health":
                layout = state.behaviour.get("layout", "")
                self.write(200, f"x-kv-layout: {layout}\r\n".encode() if layout else b"", b"")
            elif path == "/mock/requests":
                self.write(200, _JSON, json.dumps(state.requests).encode())
            elif path == "/mock/reset":
                state.requests.clear()
                state.aborted = 0
                self.write(200, _JSON, b"{}")
            elif path == "/mock/state":
                self.write(200, _JSON, json.dumps({
                    "connections": state.connections, "aborted": state.aborted, "running": state.running - 1,
                    "served": state.served,
                }).encode())  # fmt: skip
            else:
                await self._answer(method, path, headers, body)
        finally:
            state.running -= 1

    async def _answer(self, method: str, path: str, headers: dict[str, str], body: bytes) -> None:
        state = self.state
        state.served += 1
        behave = {**state.behaviour, **parse_behaviour(headers.get("x-mock", ""), state.role)}
        if "delay" in behave:
            await asyncio.sleep(float(behave["delay"]))
        if behave.get("cut") == "0":
            self.transport.abort()
            return
        lines = b"server: mock\r\n"
        if "kv" in behave or state.role == "prefill":
            wait = behave.get("kv_wait", "1.5")
            lines += f"x-kv-state: {behave.get('kv', 'stored')}\r\nx-kv-wait-ms: {wait}\r\n".encode()
        if "told" in behave:
            lines += f"x-kv-reused-tokens: {behave['told']}\r\n".encode()
        if "timing" in behave:
            lines += f"x-kv-timing: {behave['timing']}\r\n".encode()
        if "x-request-id" in headers:
            lines += f"x-request-id: {headers['x-request-id']}\r\n".encode()
        status = int(behave.get("status", 200))
        if status != 200:
            error = {"error": {"message": f"mock status {status}", "type": "mock", "param": None, "code": status}}
            self.write(status, _JSON + lines, json.dumps(error).encode())
            return
        try:
            request = json.loads(body) if body else {}
        except ValueError:
            request = None
        if not isinstance(request, dict):
            request = {}
        text = "x" * int(behave.get("size", 8))
        if request.get("stream"):
            await self._stream(path, request, behave, lines, text)
        elif method == "HEAD":
            self.transport.write(b"HTTP/1.1 200 Mock\r\n" + lines + b"content-length: 42\r\n\r\n")
        elif path == "/v1/models":
            self.write(200, _JSON + lines, b'{"object":"list","data":[{"id":"mock","object":"model"}]}')
        else:
            answer = _answer(path, body, text)
            if "params" in behave and "kv_transfer_params" in request:
                answer = json.dumps({**json.loads(answer), "kv_transfer_params": json.loads(behave["params"])}).encode()
            self.write(200, _JSON + lines, answer)
        if behave.get("close"):
            self.transport.close()

    async def _stream(
        self, path: str, request: dict[str, object], behave: dict[str, str], lines: bytes, text: str
    ) -> None:
        head = b"HTTP/1.1 200 Mock\r\ncontent-type: text/event-stream; charset=utf-8\r\n" + lines
        self.transport.write(head + b"transfer-encoding: chunked\r\n\r\n")
        count, gap = int(behave.get("chunks", 5)), float(behave.get("gap", 0))
        cut, hang = int(behave.get("cut", -1)), int(behave.get("hang", -1))
        options = request.get("stream_options")
        last = []
        if isinstance(options, dict) and options.get("include_usage"):
            last.append(json.dumps({"choices": [], "usage": _usage(path, request)}))
        last.append("[DONE]")
        for number in range(count + len(last)):
            if number == cut:
                self.transport.close() if behave.get("soft") else self.transport.abort()
                return
            if number == hang:
                await asyncio.Event().wait()
            if number < count:
                event = f'{{"object":"mock.chunk","choices":[{{"index":0,"text":"{number} {text}"}}]}}'
            else:
                event = last[number - count]
            data = b"data: " + event.encode() + b"\n\n"
            await self._write_slowly(b"%x\r\n%b\r\n" % (len(data), data), int(behave.get("split", 0)))
            if gap:
                await asyncio.sleep(gap)
        self.transport.write(b"0\r\n\r\n")

    async def _write_slowly(self, data: bytes, split: int) -> None:
        for start in range(0, len(data), split or len(data)):
            await self.drained.wait()
            if self.transport.is_closing():
                raise asyncio.CancelledError
            self.transport.write(data[start : start + (split or len(data))])
            if split:
                await asyncio.sleep(0)


def _usage(path: str, request: dict[str, object]) -> dict[str, object]:
    prompt = request.get("prompt")
    tokens = len(prompt) if isinstance(prompt, (str, list)) else 10
    if path == "/v1/messages":
        return {"input_tokens": 1, "output_tokens": 5, "cache_creation_input_tokens": 2,
                "cache_read_input_tokens": tokens - 3}  # fmt: skip
    return {
        "prompt_tokens": tokens,
        "total_tokens": tokens + 5,
        "completion_tokens": 5,
        "prompt_tokens_details": {"cached_tokens": max(tokens - 1, 0)},
    }


def _answer(path: str, body: bytes, text: str) -> bytes:
    if len(body) > 4096:  # long prompts: the mock must not be what is measured
        return b'{"id":"mock","choices":[{"index":0,"text":"x"}],"usage":{"prompt_tokens":1000,"total_tokens":1001}}'
    try:
        request = json.loads(body)
        usage = _usage(path, request)
    except (ValueError, AttributeError):
        usage = {}
    choices = [{"index": 0, "text": text}]
    return json.dumps({"id": "mock", "object": "mock", "choices": choices, "usage": usage}).encode()


async def start_mock(
    port: int = 0, role: str = "", behaviour: str = "", keep: bool = True
) -> tuple[asyncio.AbstractServer, int, MockState]:
    """Mock server in the running event loop: the server, its port and its state."""
    state = MockState(role, behaviour, keep)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: MockProtocol(state), "127.0.0.1", port, backlog=2048)
    return server, server.sockets[0].getsockname()[1], state


async def _main(arguments: argparse.Namespace) -> None:
    server, port, _ = await start_mock(arguments.port, arguments.role, arguments.behave, not arguments.forget)
    print(f"mock listening on {port}", flush=True)
    await server.serve_forever()


def main() -> int:
    """Command line entry."""
    parser = argparse.ArgumentParser(description="Mock OpenAI server, not vLLM")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--role", default="", choices=("", "prefill", "decode"))
    parser.add_argument("--behave", default="", help="behaviour of all answers, see the file's head")
    parser.add_argument("--forget", action="store_true", help="do not keep the requests")
    arguments = parser.parse_args()
    if uvloop is not None:
        uvloop.install()
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_main(arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main())
