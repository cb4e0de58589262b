"""Starts vLLM engines as forks of one process: vLLM, LMCache and transformers are imported once, not for each engine.

    python tests/helpers/engine_host.py

Reads a JSON object a line from stdin: ``log``, ``address`` (a Unix socket), ``arguments`` as for ``vllm serve``, and
``kind`` and ``folder`` of a model to build first (matrix_models.py). Each engine is a process of its own, scheduler and
worker in it: one that ends or hangs takes no other along. On the socket it says "" when it is ready, or why it is not,
and then answers lists of requests (one_engine.py) with their tokens and what of each prompt was reused, until "end".

Without a ``kind`` and with ``environment`` it says its process id when it is ready and answers lists of steps.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import traceback
from multiprocessing.connection import Client, Connection
from typing import Any

import matrix_models
from one_engine import Announcements, make_llm, prompt_of, run_steps

PR_SET_PDEATHSIG = 1


def import_all() -> None:
    import transformers  # noqa: F401
    from vllm.model_executor.models import registry
    from vllm.v1.engine import core, llm_engine  # noqa: F401
    from vllm.v1.worker import cpu_worker  # noqa: F401

    import disagg_prefill_lmcache_v1.kv.connector  # noqa: F401

    # vLLM looks at each new architecture in a process of its own, which imports all of it again.
    registry._run_in_subprocess = lambda function: function()
    # vLLM 0.32 looks through all modules for kernels and falls over an object of this one.
    sys.modules.pop("llvmlite.binding.ffi", None)


def serve(spec: dict[str, Any], connection: Connection) -> None:
    from vllm import SamplingParams

    matrix_models.build(spec["kind"], spec["folder"])
    announcements = Announcements()
    try:
        llm = make_llm(spec["arguments"])
    except Exception as error:
        traceback.print_exc()
        connection.send(f"{type(error).__name__}: {error}")
        return
    connection.send("")
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    while (requests := connection.recv()) != "end":
        outputs = llm.generate([prompt_of(request) for request in requests], params, use_tqdm=False)
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        stores = llm.llm_engine.vllm_config.kv_transfer_config.kv_role == "kv_producer"
        told = announcements.take(len(requests)) if stores else announcements.take_reused(len(requests))
        connection.send((tokens, told))
    llm.llm_engine.engine_core.shutdown()


def serve_steps(spec: dict[str, Any], connection: Connection) -> None:
    os.environ.update(spec["environment"])
    announcements = Announcements()
    llm = make_llm(spec["arguments"])
    connection.send(os.getpid())
    while (steps := connection.recv()) != "end":
        connection.send(run_steps(llm, announcements, steps))
    llm.llm_engine.engine_core.shutdown()
    sys.stdout.flush()
    connection.send("ended")


def child(spec: dict[str, Any]) -> None:
    os.setsid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # even one that hangs ends with the host
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    log = os.open(spec["log"], os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    status = 1
    try:
        with Client(spec["address"], "AF_UNIX") as connection:
            (serve if "kind" in spec else serve_steps)(spec, connection)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # all is ended: the interpreter's own clean-up would take seconds


def main() -> None:
    import_all()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks for their exit status
    for line in sys.stdin:
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            child(json.loads(line))


if __name__ == "__main__":
    main()
