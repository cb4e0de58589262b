"""A mock of vLLM for the tests of the KV sharing scripts: it computes nothing. Faults are set by MOCK_* variables."""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROLE = os.environ["DISAGG_KV_VISIBILITY"].rpartition("-")[2]


def fault(name: str) -> str:
    """MOCK_<NAME> is "<role>" or "<role>:<value>"; "" where this process is not meant."""
    role, _, value = os.environ.get(f"MOCK_{name}", "").partition(":")
    return (value or "yes") if role == ROLE else ""


class SamplingParams:
    def __init__(self, temperature: float, max_tokens: int, logprobs: int, extra_args: Any = None) -> None:
        assert (temperature, logprobs, extra_args) == (0, 2, None)
        self.max_tokens = max_tokens


class Tokenizer:
    def encode(self, text: str) -> list[int]:
        return [0, *text.encode()]


class LLM:
    @classmethod
    def from_engine_args(cls, engine_args: argparse.Namespace) -> LLM:
        return cls(engine_args)

    def __init__(self, engine_args: argparse.Namespace) -> None:
        self.ranks = engine_args.tensor_parallel_size
        assert engine_args.disable_log_stats is False
        config = json.loads(engine_args.kv_transfer_config)
        assert config["kv_role"] == {"store": "kv_producer", "retrieve": "kv_consumer"}[ROLE]
        self.requests = 0
        # as vLLM has one: a process that would outlive a parent that is killed, with a title of its own
        script = "while :; do sleep 1; done"
        if fault("FORK"):  # for a while a second process has the title
            script = f"(while [ $SECONDS -lt 1 ]; do read -rt 0.1 <> <(:); done) & {script}"
        self.engine = subprocess.Popen(["VLLM::MockEngine", "-c", script], executable="/bin/bash")
        self.llm_engine = SimpleNamespace(engine_core=SimpleNamespace(shutdown=self.shutdown))
        print(f"mock vLLM, role {ROLE}, store {os.environ.get('LMCACHE_REMOTE_URL')}", flush=True)  # as LMCache tells
        if log := fault("LINGER"):  # as vLLM does when a thread of its failed engine is left
            print(Path(log).read_text(), flush=True)
            time.sleep(600)
        if fault("FAIL_START"):
            raise ValueError("mock: no memory\nfor the KV cache")

    def get_tokenizer(self) -> Tokenizer:
        return Tokenizer()

    def shutdown(self) -> None:
        if fault("HANG_AT_END"):
            time.sleep(600)
        self.engine.terminate()
        self.engine.wait()

    def announce(self, message: dict[str, Any]) -> None:
        name = os.environ["DISAGG_KV_VISIBILITY"]
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(json.dumps(message).encode(), "\0" + name[1:])

    def store(self, request_id: str) -> None:
        time.sleep(float(fault("STORE_DELAY") or 0))
        for rank in range(self.ranks):
            if fault("RANK_SILENT") == str(rank):
                continue
            state = fault("STATE") or "stored"
            reason = "mock reason" if state == "failed" else ""
            self.announce({"id": request_id, "rank": rank, "ranks": self.ranks, "state": state, "reason": reason})

    def generate(self, prompts: list[dict[str, Any]], parameters: SamplingParams, use_tqdm: bool) -> list[Any]:
        assert use_tqdm is False
        if fault("KILL"):
            print("mock: about to be killed", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        if fault("HANG"):
            time.sleep(600)
        tokens = prompts[0]["prompt_token_ids"]
        request_id = f"{self.requests}-mock"
        self.requests += 1
        if ROLE == "store":
            self.announce({"id": request_id})
            threading.Thread(target=self.store, args=(request_id,)).start()
        known = self.requests <= 2  # the warm-up and the prompt; the third request is another one
        cached = len(tokens) - 1 if ROLE == "retrieve" and known and not fault("NO_REUSE") else 0
        if ROLE == "retrieve" and not fault("SILENT"):
            loaded = cached - min(int(fault("NOT_LOADED") or 0), cached)
            self.announce({"id": f"{request_id}-a1b2c3", "reused": loaded})
        answer = [(token + 1) % 100 for token in tokens[: parameters.max_tokens]]
        gap = float(fault("TIE") or 1)
        candidates = [{token: -1.0, token + 1: -1.0 - gap} for token in answer]
        if fault("OTHER_TEXT"):
            answer[-1] += 1
        logprobs = [{token: SimpleNamespace(logprob=value) for token, value in place.items()} for place in candidates]
        return [
            SimpleNamespace(
                request_id=request_id,
                num_cached_tokens=cached,
                metrics=SimpleNamespace(first_token_latency=0.01 if cached else 0.1),
                outputs=[SimpleNamespace(text=" ".join(map(str, answer)), token_ids=answer, logprobs=logprobs)],
            )
        ]
