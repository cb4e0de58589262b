#!/usr/bin/env python3
"""Stand-in for a server of the stack (no model, no cache): answers its health address, records how it was started.

Usage: standin_server.py KIND ARGUMENTS..., KIND one of vllm, proxy, kv, redis. Environment:
STANDIN_RECORD   directory for KIND-PORT.json with argv, environment and pid
STANDIN_DELAY_<KIND> seconds until the port is opened
STANDIN_DIE      "KIND-PORT:STATUS": this one prints an error and exits instead of opening its port
STANDIN_STUBBORN if set, the process and its child ignore TERM, and it holds a piece of shared memory
A vllm stand-in has two children, one of them in a session of its own, as an engine process may be.
"""

from __future__ import annotations

import json
import os
import signal
import socketserver
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import shared_memory
from pathlib import Path


class Health(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        known = self.path in ("/health", "/ready", "/v1/models")
        self.send_response(200 if known else 404)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


class Resp(socketserver.StreamRequestHandler):
    """Just enough Redis to be pinged."""

    def handle(self) -> None:
        while header := self.rfile.readline():
            words = []
            for _ in range(int(header[1:])):
                self.rfile.readline()
                words.append(self.rfile.readline().strip())
            command = words[0].upper()
            if command == b"HELLO":
                reply = b"%2\r\n$6\r\nserver\r\n$5\r\nredis\r\n$5\r\nproto\r\n:3\r\n"
            else:
                reply = b"+PONG\r\n" if command == b"PING" else b"+OK\r\n"
            self.wfile.write(reply)


class Silent(socketserver.StreamRequestHandler):
    """Reads until the client goes, as LMCache's server does with a client that sends nothing."""

    def handle(self) -> None:
        self.rfile.read()


class TcpServer(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = False  # as LMCache's server


def main() -> None:
    kind, arguments = sys.argv[1], sys.argv[2:]
    flagged = "--port" in arguments
    port = int(arguments[arguments.index("--port") + 1] if flagged else arguments[-1])
    me = f"{kind}-{port}"
    shared = ""
    if os.environ.get("STANDIN_STUBBORN"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        memory = shared_memory.SharedMemory(create=True, size=4096)
        shared = memory.name
    print(f"stand-in {me} starts", flush=True)
    if record := os.environ.get("STANDIN_RECORD"):
        text = json.dumps({"argv": sys.argv[2:], "env": dict(os.environ), "pid": os.getpid(), "shared": shared})
        partial = Path(record, f".{me}")
        partial.write_text(text)
        partial.rename(Path(record, f"{me}.json"))
    if kind == "vllm":
        ignore = "signal.signal(signal.SIGTERM, signal.SIG_IGN);" if os.environ.get("STANDIN_STUBBORN") else ""
        body = f"import signal, time; {ignore} time.sleep(300)"
        for own_session in (True, False):
            subprocess.Popen([sys.executable, "-c", body], start_new_session=own_session)
    time.sleep(float(os.environ.get(f"STANDIN_DELAY_{kind.upper()}", "0")))
    name, _, status = os.environ.get("STANDIN_DIE", "").partition(":")
    if name == me:
        print(f"stand-in {me} cannot go on", flush=True)
        sys.exit(int(status))
    if kind in ("kv", "redis"):
        TcpServer(("127.0.0.1", port), Resp if kind == "redis" else Silent).serve_forever()
    ThreadingHTTPServer(("127.0.0.1", port), Health).serve_forever()


if __name__ == "__main__":
    main()
