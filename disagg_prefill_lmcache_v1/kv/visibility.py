"""An answered prefill means a visible KV cache.

LMCache puts KV into the store after the prefill request has been answered, so a decode sent at once finds part of it
or nothing, and vLLM recomputes in silence. Here the prefiller's answer itself is the promise:

1. the engine's scheduler says ``begin`` for every request that it schedules (scheduler.py),
2. each tensor parallel rank says ``end`` when its shard of the request's KV was looked up in the store and found,
3. ``HoldUntilVisible``, an ASGI middleware in the same server (``vllm serve --middleware``), holds the answer until
   every request that began has ended on every rank, or a deadline has passed.

The engine never waits: while one request's KV travels, the next one is computed. Any client or router profits, none
has to know. The answer says how it went:

    x-kv-state: stored | failed | timeout | none (the request asked not to be stored)
    x-kv-wait-ms: how long the answer was held
    x-kv-transfer-ms: from the hand-over in the engine until the slowest rank found its chunks in the store
    x-kv-reason: why it is not stored
    x-kv-timing: queue=MS,prefill=MS,hold=MS (until the engine scheduled it, until it answered, until it was visible)

A request with the header ``x-kv-hold: off`` is answered at once, as without this module.

Messages are datagrams on an abstract Unix socket named by ``DISAGG_KV_VISIBILITY`` ("@name"); unset, nothing is sent
and nothing held. Where vLLM runs several API server processes (``--api-server-count``, data parallelism), the first
that serves takes that name, the next ones "@name.1" and so on; the engines tell all of them. Only the standard library
is used: this module is imported by the API server and by the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import queue
import socket
import threading
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from disagg_prefill_lmcache_v1.kv.settings import from_environment

# vLLM puts one of these before the X-Request-Id of a request (completions, chat and messages, responses)
_ID_PREFIXES = ("cmpl-", "chatcmpl-", "resp_")
GENERATING = frozenset(
    ("/v1/completions", "/v1/chat/completions", "/v1/chat/completions/batch", "/v1/responses", "/v1/messages")
)
_RECEIVE_BUFFER = 4 << 20  # bytes; a datagram is about 150
_SEND_TIMEOUT_S = 5.0
_ANNOUNCE_TIMEOUT_S = 1.0
_API_SERVERS = 64  # processes of one vLLM server, at most

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
Receive = Callable[[], Awaitable[Message]]


def _addresses(name: str) -> list[str]:
    """Where the API server processes listen, in the order in which they are taken."""
    first = "\0" + name[1:] if name.startswith("@") else name
    return [first, *(f"{first}.{i}" for i in range(1, _API_SERVERS))]


class Announcer:
    """Sends begin and end of requests to the API server; silent where nobody listens."""

    def __init__(self, name: str | None = None) -> None:
        name = from_environment().visibility if name is None else name
        self._addresses = _addresses(name)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) if name else None
        self._queue: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        if self._socket is not None:
            self._socket.settimeout(_SEND_TIMEOUT_S)
            threading.Thread(target=self._run, name="kv-visibility", daemon=True).start()

    def __bool__(self) -> bool:
        return self._socket is not None

    def begin(self, request_id: str) -> None:
        """The engine has just scheduled ``request_id`` (vLLM's internal id) and will store its KV."""
        self._send({"id": request_id, "at": time.monotonic()})

    def end(
        self, request_id: str, rank: int, ranks: int, state: str, reason: str = "", transfer_ms: float = 0.0
    ) -> None:
        """This rank's KV of ``request_id`` is visible (``state`` "stored") or will not be.

        Args:
            request_id: vLLM's internal id.
            rank, ranks: which tensor parallel rank of how many speaks.
            state: "stored"; "failed", with a reason; "none" where the request asked not to be stored.
            transfer_ms: from the hand-over in the engine until the chunks were found in the store.
        """
        message = {"id": request_id, "rank": rank, "ranks": ranks, "state": state, "reason": reason[:200]}
        self._send({**message, "ms": transfer_ms})

    def reused(self, request_id: str, tokens: int, scheduled_at: float, load_s: float = 0.0) -> None:
        """``tokens`` of the request's prompt were not computed (see reuse.py).

        Args:
            scheduled_at: when the engine scheduled it, on ``time.monotonic``, which is the machine's.
            load_s: what loading them took.
        """
        self._send({"id": request_id, "reused": tokens, "at": scheduled_at, "load_s": load_s})

    def _send(self, message: dict[str, Any]) -> None:
        if self._socket is not None:
            self._queue.put(json.dumps(message).encode())

    def _run(self) -> None:
        # In a thread: Linux queues few datagrams (net.unix.max_dgram_qlen), a step can schedule more requests, and
        # neither may a message be lost nor the engine wait for the API server.
        while (data := self._queue.get()) is not None:
            # The first address without a listener ends the row: no HTTP request was served yet, or offline use.
            with contextlib.suppress(OSError):
                for address in self._addresses:
                    self._socket.sendto(data, address)

    def close(self) -> None:
        self._queue.put(None)


class Visibility:
    """What the ranks have said about the engine requests of one HTTP request."""

    def __init__(self) -> None:
        self._ranks: dict[str, set[int]] = {}
        self._missing: set[str] = set()
        self.reasons: list[str] = []
        self.unasked = False
        self.transfer_ms = 0.0
        self._ended: set[str] = set()
        self.entered_at = time.monotonic()
        self.scheduled_at: float | None = None  # the first of its engine requests
        self.announced = asyncio.Event()
        self.complete = asyncio.Event()
        self.complete.set()

    def scheduled(self, at: float) -> None:
        """The engine has scheduled a request at that time."""
        self.scheduled_at = at if self.scheduled_at is None else min(at, self.scheduled_at)

    def begin(self, request_id: str) -> None:
        # The engine and its ranks are several processes: an end may overtake its begin.
        self.announced.set()
        self._ranks.setdefault(request_id, set())
        if request_id not in self._ended:
            self._missing.add(request_id)
            self.complete.clear()

    def end(self, request_id: str, rank: int, ranks: int, state: str, reason: str, transfer_ms: float) -> None:
        self.transfer_ms = max(self.transfer_ms, transfer_ms)
        self.announced.set()
        done = self._ranks.setdefault(request_id, set())
        done.add(rank)
        if state == "failed":
            self.reasons.append(reason or state)
        self.unasked = self.unasked or state == "none"
        if len(done) >= ranks:
            self._ended.add(request_id)
            self._missing.discard(request_id)
        else:
            self._missing.add(request_id)
        if self._missing:
            self.complete.clear()
        else:
            self.complete.set()

    def reused(self, request_id: str, tokens: int, load_s: float) -> None:
        """Nothing that is waited for here."""

    def timing(self, names: tuple[str, str, str], lasts: float, until: float) -> list[tuple[bytes, bytes]]:
        """The header that tells three parts of the time since the request came; none if the engine has not said.

        Args:
            names: of the time until it was scheduled, of what is left of the rest, and of the part that is known.
            lasts: the known part, seconds.
            until: end of the last part, on ``time.monotonic``.
        """
        if self.scheduled_at is None:
            return []
        scheduled = min(max(self.scheduled_at, self.entered_at), until)
        known = min(lasts, until - scheduled)
        values = (scheduled - self.entered_at, until - scheduled - known, known)
        text = ",".join(f"{name}={seconds * 1000:.2f}" for name, seconds in zip(names, values, strict=True))
        return [(b"x-kv-timing", text.encode())]


class Listener:
    """Reads the datagrams and hands each to the HTTP request whose id it carries.

    That is the X-Request-Id, or, on /v1/responses, an id that the client chose in the body or vLLM made up. vLLM leaves
    it in the state of the HTTP request before it hands the request to the engine.
    """

    def __init__(self, name: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
        self._socket.setblocking(False)
        self._bind(name)
        self._waiting: dict[str, list[Visibility]] = {}
        self._states: dict[Visibility, MutableMapping[str, Any]] = {}
        asyncio.get_running_loop().add_reader(self._socket.fileno(), self.drain)

    def _bind(self, name: str) -> None:
        """Take the first address that no other API server process has. Raises OSError."""
        for address in _addresses(name):
            try:
                self._socket.bind(address)
                return
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
        raise OSError(errno.EADDRINUSE, f"{name}: {_API_SERVERS} API servers listen already")

    def watch(self, token: str, state: MutableMapping[str, Any] | None = None, watcher: Any = None) -> Any:
        """A Visibility, or ``watcher``, that hears of the request with this X-Request-Id and this ASGI state."""
        visibility = Visibility() if watcher is None else watcher
        if state is not None:
            self._states[visibility] = state
        self._waiting.setdefault(token, []).append(visibility)
        return visibility

    def forget(self, token: str, visibility: Visibility) -> None:
        self._states.pop(visibility, None)
        waiting = self._waiting.get(token, [])
        if visibility in waiting:
            waiting.remove(visibility)
        if not waiting:
            self._waiting.pop(token, None)

    def find(self, request_id: str) -> list[Visibility]:
        """The watchers of an engine request: its id is a prefix, the request's id and suffixes after "-" or "_"."""
        if found := self._find_token(request_id):
            return found
        best, found = 0, []
        for visibility, state in self._states.items():
            name = getattr(state.get("request_metadata"), "request_id", "")
            if name and request_id.startswith(name) and request_id[len(name) : len(name) + 1] in ("", "-", "_"):
                if len(name) > best:
                    best, found = len(name), []
                if len(name) == best:
                    found.append(visibility)
        return found

    def _find_token(self, request_id: str) -> list[Visibility]:
        choice, _, rest = request_id.partition("_")
        if choice.isdecimal():  # one of several choices: vLLM puts its number first
            request_id = rest
        for prefix in _ID_PREFIXES:
            if request_id.startswith(prefix):
                request_id = request_id[len(prefix) :]
                break
        end = len(request_id)
        while end > 0:
            if found := self._waiting.get(request_id[:end]):
                return found
            end = max(request_id.rfind("-", 0, end), request_id.rfind("_", 0, end))
        return []

    def drain(self) -> None:
        """Take all datagrams that have arrived."""
        while True:
            try:
                data = self._socket.recv(4096)
            except (BlockingIOError, InterruptedError):
                return
            try:
                message = json.loads(data)
                watchers = self.find(message["id"])
                for visibility in watchers:
                    if "at" in message:
                        visibility.scheduled(float(message["at"]))
                    if "state" in message:
                        fields = (message[name] for name in ("id", "rank", "ranks", "state", "reason", "ms"))
                        visibility.end(*fields)
                    elif "reused" in message:
                        visibility.reused(message["id"], message["reused"], message["load_s"])
                    else:
                        visibility.begin(message["id"])
            except (ValueError, KeyError, TypeError, AttributeError):
                continue  # not ours: any local process may write to the socket

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._socket.fileno())
        self._socket.close()


def with_request_id(scope: Message) -> tuple[Message, str]:
    """The ASGI scope with an X-Request-Id, made up where there is none, and that id."""
    token = next((v.decode("latin-1") for k, v in scope["headers"] if k == b"x-request-id" and v), "")
    if token:
        return scope, token
    token = uuid.uuid4().hex
    headers = [(k, v) for k, v in scope["headers"] if k != b"x-request-id"]
    return {**scope, "headers": [*headers, (b"x-request-id", token.encode())]}, token


class HoldUntilVisible:
    """ASGI middleware for the prefiller: see the module's text."""

    def __init__(self, app: Callable[[Message, Receive, Send], Awaitable[None]]) -> None:
        self._app = app
        self._name = from_environment().visibility
        self._timeout_s = from_environment().wait_timeout
        self._listener: Listener | None = None

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if not self._name or scope["type"] != "http" or scope["path"] not in GENERATING:
            await self._app(scope, receive, send)
            return
        if (b"x-kv-hold", b"off") in scope["headers"]:
            await self._app(scope, receive, send)
            return
        if self._listener is None:
            self._listener = Listener(self._name)
        scope, token = with_request_id(scope)
        visibility = self._listener.watch(token, scope.setdefault("state", {}))
        hold = _Hold(send, self._listener, visibility, self._timeout_s)
        try:
            await self._app(scope, receive, hold.send)
        finally:
            self._listener.forget(token, visibility)


class _Hold:
    """Passes an answer on, its last part only when the KV is visible; start and body of a plain answer together."""

    def __init__(self, send: Send, listener: Listener, visibility: Visibility, timeout_s: float) -> None:
        self._send = send
        self._listener = listener
        self._visibility = visibility
        self._timeout_s = timeout_s
        self._start: Message | None = None
        self._parts: list[bytes] = []
        self._pass = False

    async def send(self, message: Message) -> None:
        if self._pass:
            await self._send(message)
        elif message["type"] == "http.response.start":
            streamed = any(k == b"content-type" and v.startswith(b"text/event-stream") for k, v in message["headers"])
            if message["status"] >= 400:
                self._pass = True
                await self._send(message)
            elif streamed:
                # Its headers are due now; only its end can be held.
                await self._send(message)
            else:
                self._start = message
        elif message["type"] == "http.response.body":
            if message.get("more_body", False):
                if self._start is None:
                    await self._send(message)
                else:
                    self._parts.append(message.get("body", b""))
                return
            headers = await self._wait()
            if self._start is not None:
                self._start["headers"] = [*self._start["headers"], *headers]
                await self._send(self._start)
                message = {**message, "body": b"".join([*self._parts, message.get("body", b"")])}
            await self._send(message)
        else:
            await self._send(message)

    async def _wait(self) -> list[tuple[bytes, bytes]]:
        begin = time.monotonic()
        self._listener.drain()
        visibility = self._visibility
        state, reason = "stored", ""
        try:
            # begin was sent before the answer's first token: mostly it is here by now
            await asyncio.wait_for(visibility.announced.wait(), min(_ANNOUNCE_TIMEOUT_S, self._timeout_s))
        except asyncio.TimeoutError:
            state, reason = "failed", "the engine did not announce the request: is the KV connector configured?"
        else:
            try:
                await asyncio.wait_for(visibility.complete.wait(), self._timeout_s)
            except asyncio.TimeoutError:
                state, reason = "timeout", f"not visible in the KV store within {self._timeout_s:g} s"
            if visibility.unasked:
                state = "none"
            if visibility.reasons:
                state, reason = "failed", visibility.reasons[0]
        end = time.monotonic()
        headers = [(b"x-kv-state", state.encode()), (b"x-kv-wait-ms", f"{(end - begin) * 1000:.2f}".encode())]
        headers += visibility.timing(("queue", "prefill", "hold"), end - begin, end)
        headers.append((b"x-kv-transfer-ms", f"{visibility.transfer_ms:.2f}".encode()))
        if reason:
            headers.append((b"x-kv-reason", reason.encode("latin-1", "replace").replace(b"\n", b" ")))
        return headers
