"""One vLLM instance of the KV cache sharing example, in a process of its own (started by kv_sharing.py).

Its settings come through its environment and its arguments (vLLM's own). It answers one JSON line on the report pipe
for each JSON line on standard input: `encode`, `generate`, `end`. Standard output and error are its log.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import socket
import sys
import time
from typing import Any

SOCKET_VARIABLE = "DISAGG_KV_VISIBILITY"


CANDIDATES = 2  # the chosen token and the next one, to tell rounding from a wrong KV cache
TOLD_WITHIN_S = 30.0  # of an answer: the workers' word goes with a step, and the machine may be busy


class Listener:
    """What the engine says of its requests: every tensor parallel rank of the first instance that its KV is in the
    store (kv/visibility.py), the second what it has really loaded (kv/reuse.py)."""

    def __init__(self, name: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + name[1:] if name.startswith("@") else name)
        self._ranks: dict[str, set[int]] = {}
        self._waiting: set[str] = set()
        self._reused: dict[str, int] = {}

    def _take(self, message: dict[str, Any]) -> None:
        request = message["id"]
        if "reused" in message:
            self._reused[request] = int(message["reused"])
            return
        done = self._ranks.setdefault(request, set())
        if "state" not in message:
            self._waiting.add(request)
            return
        if message["state"] not in ("stored", "none"):
            raise RuntimeError(f"the KV cache was not stored: {message.get('reason') or message['state']}")
        done.add(message["rank"])
        if len(done) >= message["ranks"]:
            self._waiting.discard(request)
        else:
            self._waiting.add(request)

    def wait(self, timeout_s: float) -> None:
        """Returns when all requests that the engine has begun are visible in the store.

        Raises:
            RuntimeError: they are not, or the KV connector does not announce anything.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            # What has been sent already is taken first: the engine announces a request before its first token.
            self._socket.settimeout(max(deadline - time.monotonic(), 0.001) if self._waiting else 0.001)
            try:
                self._take(json.loads(self._socket.recv(4096)))
            except TimeoutError:
                if not self._ranks:
                    raise RuntimeError("the KV connector did not announce the request") from None
                if not self._waiting:
                    return
                if time.monotonic() > deadline:
                    raise RuntimeError(f"the KV cache is not visible in the store after {timeout_s:g} s") from None
            except (ValueError, KeyError, TypeError):
                continue  # not from our engine

    def reused(self, request: str) -> int:
        """Prompt tokens that were not computed, of a request that has been answered.

        Raises:
            RuntimeError: the engine does not say.
        """
        deadline = time.monotonic() + TOLD_WITHIN_S
        while True:
            # the engine's name of a request has more letters behind it
            for name, tokens in self._reused.items():
                if name == request or name.startswith((f"{request}-", f"{request}_")):
                    return tokens
            self._socket.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                self._take(json.loads(self._socket.recv(4096)))
            except TimeoutError:
                raise RuntimeError("the KV connector does not say what it has loaded") from None
            except (ValueError, KeyError, TypeError):
                continue


def make_llm(words: list[str]) -> Any:
    """`words` are arguments as `vllm serve` takes them."""
    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    engine_args = EngineArgs.from_cli_args(parser.parse_args(words))
    engine_args.disable_log_stats = False  # outputs then carry the time to the first token
    return LLM.from_engine_args(engine_args)


class Instance:
    """The operations that the parent can ask for."""

    def __init__(self, llm: Any, listener: Listener) -> None:
        self._llm = llm
        self._listener = listener

    def encode(self, text: str, limit: int | None = None) -> dict[str, Any]:
        """Token ids of a text, the first `limit` of them."""
        return {"token_ids": self._llm.get_tokenizer().encode(text)[:limit]}

    def _output(self, token_ids: list[int], max_tokens: int, params: dict[str, Any] | None) -> Any:
        from vllm import SamplingParams

        extra = {"kv_transfer_params": params} if params else None
        parameters = SamplingParams(temperature=0, max_tokens=max_tokens, logprobs=CANDIDATES, extra_args=extra)
        return self._llm.generate([{"prompt_token_ids": token_ids}], parameters, use_tqdm=False)[0]

    def hold(self, token_ids: list[int]) -> dict[str, Any]:
        """Have the engine hold the prompt's KV: with which parameters the other instance fetches it."""
        output = self._output(token_ids, 1, {"do_remote_decode": True, "do_remote_prefill": False})
        return {"params": output.kv_transfer_params}

    def generate(
        self, token_ids: list[int], max_tokens: int, visible_within_s: float | None = None,
        params: dict[str, Any] | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Greedy answer, with times in seconds and what was reused of the prompt.

        With `visible_within_s` it waits until the KV is in the store, and reuse does not matter. `params` say from
        where KV is fetched.
        """
        begin = time.perf_counter()
        output = self._output(token_ids, max_tokens, params)
        duration_s = time.perf_counter() - begin
        reused = None
        if visible_within_s is not None:
            self._listener.wait(visible_within_s)
        else:
            reused = self._listener.reused(output.request_id)
        answer = output.outputs[0]
        return {
            "text": answer.text,
            "token_ids": list(answer.token_ids),
            "candidates": [{token: each.logprob for token, each in place.items()} for place in answer.logprobs],
            "reused_tokens": reused,
            "cached_tokens": output.num_cached_tokens or 0,
            "ttft_s": getattr(output.metrics, "first_token_latency", None) or duration_s,
            "duration_s": duration_s,
            "visible_s": time.perf_counter() - begin,
        }

    def end(self, within_s: float) -> dict[str, Any]:
        """Ends the engine and its workers in order, within a number of seconds, then by force."""
        # vLLM's own limit is shorter than a busy machine needs, and killed processes leave shared memory behind.
        core = self._llm.llm_engine.engine_core
        if "timeout" in inspect.signature(core.shutdown).parameters:
            core.shutdown(timeout=within_s)
        else:
            core.shutdown()
        return {}


def serve(instance: Instance, commands: Any, report: Any) -> None:
    """Answers commands until `end` or until the parent is gone."""
    for line in commands:
        command = json.loads(line)
        operation = command.pop("do")
        try:
            answer = getattr(instance, operation)(**command)
        except Exception as error:
            report({"error": f"{type(error).__name__}: {error}"})
            raise
        report({"done": operation, **answer})
        if operation == "end":
            return
    instance.end(within_s=5.0)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--report-fd", type=int, required=True, help="pipe to the parent")
    parser.add_argument("vllm_arguments", nargs="*", help="after --, as for `vllm serve`")
    options = parser.parse_args(arguments)
    os.set_inheritable(options.report_fd, False)
    pipe = os.fdopen(options.report_fd, "w", encoding="utf-8")

    def report(message: dict[str, Any]) -> None:
        pipe.write(json.dumps(message) + "\n")
        pipe.flush()

    listener = Listener(os.environ[SOCKET_VARIABLE])
    try:
        instance = Instance(make_llm(options.vllm_arguments), listener)
    except Exception as error:
        report({"error": f"{type(error).__name__}: {error}"})
        raise
    report({"done": "start"})
    serve(instance, sys.stdin, report)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # all is ended: the interpreter's own clean-up would take seconds with nothing left to do


if __name__ == "__main__":
    raise SystemExit(main())
