"""One vLLM engine that stores KV and loads it again, for tests of what is reused and whether answers stay equal.

A step is a list of requests that are in flight together, or "reset": forget vLLM's own prefix cache, so that what comes
next is in the store or nowhere. A request has ``prompt`` (token ids) and may have ``max_tokens``, ``salt``, ``lora``
([name, number, path]), ``params`` (``kv_transfer_params``) and ``image`` (a seed).

Answers: for each step of requests their token ids and ``cached_tokens``, the tokens that the workers say they loaded,
and the states that the engine announced once the step's KV was in the store, or was told not to be.
"""

from __future__ import annotations

import json
import os
import queue
import socket
import threading
import uuid
from typing import Any

ANNOUNCED_WITHIN_S = 60.0


class Announcements:
    """What the connector says about requests (kv/visibility.py)."""

    def __init__(self) -> None:
        name = f"one-engine-{uuid.uuid4().hex}"
        os.environ["DISAGG_KV_VISIBILITY"] = f"@{name}"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(f"\0{name}")
        self._said: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        # always read: the kernel queues few, and the engine gives a message up that it cannot send for seconds
        threading.Thread(target=self._read, daemon=True).start()
        self.reused: dict[str, int] = {}
        self._ended: set[str] = set()

    def _read(self) -> None:
        while True:
            self._said.put(self._socket.recv(4096))

    def take(self, count: int) -> list[str]:
        """States of ``count`` requests, when all have been said."""
        ended: dict[str, list[str]] = {}
        begun: set[str] = set()
        while len(ended) < count or not begun <= ended.keys():
            message = json.loads(self._said.get(timeout=ANNOUNCED_WITHIN_S))
            if "reused" in message:
                self.reused[message["id"]] = message["reused"]
                continue
            if "state" not in message:
                if message["id"] not in self._ended:  # an end may overtake its begin, even into the next step
                    begun.add(message["id"])
                continue
            if message["id"] in self._ended:
                continue
            said = ended.setdefault(message["id"], [])
            said.append(message["state"])
            if len(said) < message["ranks"] and message["state"] != "none":
                begun.add(message["id"])
        self._ended |= ended.keys()
        return [max(states) for states in ended.values()]

    def take_reused(self, count: int) -> list[int]:
        """What workers say that each of the next ``count`` requests reuses, in the order of the requests."""
        told: dict[str, int] = {}
        while len(told) < count:
            message = json.loads(self._said.get(timeout=ANNOUNCED_WITHIN_S))
            if "reused" in message:
                told[message["id"]] = message["reused"]
        return [tokens for _, tokens in sorted(told.items(), key=lambda item: int(item[0].split("-")[0]))]


def make_llm(arguments: list[str]) -> Any:
    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    engine_args = EngineArgs.from_cli_args(parser.parse_args(arguments))
    engine_args.disable_log_stats = False
    return LLM.from_engine_args(engine_args)


def prompt_of(request: dict[str, Any]) -> dict[str, Any]:
    prompt: dict[str, Any] = {"prompt_token_ids": request["prompt"]}
    if "salt" in request:
        prompt["cache_salt"] = request["salt"]
    if "image" in request:
        import numpy as np
        from PIL import Image

        pixels = np.random.default_rng(request["image"]).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        prompt["multi_modal_data"] = {"image": Image.fromarray(pixels)}
    return prompt


def run(llm: Any, announcements: Announcements, requests: list[dict[str, Any]]) -> dict[str, Any]:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    params = [
        SamplingParams(
            temperature=0,
            max_tokens=request.get("max_tokens", 12),
            ignore_eos=True,
            extra_args={"kv_transfer_params": request["params"]} if "params" in request else None,
        )
        for request in requests
    ]
    adapters = [LoRARequest(*request["lora"]) if "lora" in request else None for request in requests]
    before = loaded_tokens()
    outputs = llm.generate([prompt_of(r) for r in requests], params, lora_request=adapters, use_tqdm=False)
    states = announcements.take(len(requests))
    return {
        "requests": [{"tokens": list(o.outputs[0].token_ids), "cached": o.num_cached_tokens or 0} for o in outputs],
        "loaded": loaded_tokens() - before,
        "states": states,
    }


def loaded_tokens() -> int:
    from prometheus_client import REGISTRY

    samples = (sample for family in REGISTRY.collect() for sample in family.samples)
    return sum(int(sample.value) for sample in samples if sample.name == "disagg_kv_loaded_tokens_total")


def run_steps(llm: Any, announcements: Announcements, steps: list[Any]) -> list[dict[str, Any]]:
    answers = []
    for step in steps:
        if step == "reset":
            assert llm.reset_prefix_cache(), "the prefix cache is in use"
        else:
            answers.append(run(llm, announcements, step))
    return answers
