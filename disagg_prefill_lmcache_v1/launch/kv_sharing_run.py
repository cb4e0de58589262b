"""KV cache sharing between two vLLM instances, as the scripts kv_cache_sharing_lmcache_v1*.py run it.

The second instance retrieves when every rank of the first has found its KV in the store and the first has ended. The
exit status is 0 when both texts are equal and KV was reused, 1 when not or when something failed, 2 for bad usage.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from disagg_prefill_lmcache_v1.launch import checks
from disagg_prefill_lmcache_v1.launch.commands import kv_server
from disagg_prefill_lmcache_v1.launch.kv_sharing import (
    SIDES,
    SharingSettings,
    configure,
    instance_command,
    make_plan,
    server_command,
    settings_class,
)
from disagg_prefill_lmcache_v1.launch.load_size import load_warning
from disagg_prefill_lmcache_v1.launch.logs import start_problem
from disagg_prefill_lmcache_v1.launch.masked import with_masked_output
from disagg_prefill_lmcache_v1.launch.messages import (
    CONSOLE,
    Failure,
    Progress,
    UsageError,
    exit_status,
    info,
    mask_passwords,
)
from disagg_prefill_lmcache_v1.launch.plan import Plan
from disagg_prefill_lmcache_v1.launch.ports import free_port, is_listening
from disagg_prefill_lmcache_v1.launch.prepare import secret_of_run
from disagg_prefill_lmcache_v1.launch.processes import living, lookup
from disagg_prefill_lmcache_v1.launch.setup import build_model, set_up_python, set_up_redis
from disagg_prefill_lmcache_v1.launch.supervision import Supervisor, Target
from disagg_prefill_lmcache_v1.same_user import connect

WARM_UP_TOKENS = 300  # more than one chunk, so that both kinds of transfer have happened once
ENGINE_TITLE = "VLLM::"  # how vLLM calls its processes
STORE_END_WITHIN_S = 30.0  # ends before the other begins: the KV cache outlives it, and the timing is not disturbed
END_WITHIN_S = 9.0  # ends after the result
TERM_GRACE_S = 3.0


class Instance:
    """A vLLM instance that runs: operations go to its standard input, answers come by a pipe."""

    def __init__(self, plan: Plan[SharingSettings], role: str, supervisor: Supervisor) -> None:
        self.role = role
        self._pipe, write_end = os.pipe()
        os.set_blocking(self._pipe, False)
        self._received = b""
        self._engines: dict[int, str] = {}
        command = instance_command(plan, role, write_end)
        self.child = supervisor.start(
            role, with_masked_output(plan.backend.url, command.words), command.full_environment(plan.environ),
            plan.run_dir / f"{role}.log", stdin=subprocess.PIPE, pass_fds=(write_end,),
        )  # fmt: skip
        os.close(write_end)

    def send(self, operation: str, **arguments: Any) -> None:
        assert self.child.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # its end is noticed while waiting for the answer
            self.child.process.stdin.write(json.dumps({"do": operation, **arguments}).encode() + b"\n")
            self.child.process.stdin.flush()

    def answer(self) -> dict[str, Any] | None:
        """The next answer, if it is there. Raises Failure for one that tells an error."""
        with contextlib.suppress(BlockingIOError):
            self._received += os.read(self._pipe, 1 << 20)
        line, end, rest = self._received.partition(b"\n")
        if not end:
            return None
        self._received = rest
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            cause = " ".join(answer["error"].split())[:300]
            raise Failure(f"the {self.role} instance failed: {cause}", self.child.log)
        return answer

    def watch_engines(self) -> None:
        """From now on the engine's processes are watched too: an idle instance does not notice when one dies."""
        rows = [row for row in living() if row.group == self.child.pid]
        titles = {row.pid: title for row in rows if (title := row.title()).startswith(ENGINE_TITLE)}
        # One that has its parent's title is a fork on its way to become another program, which may end at any time.
        self._engines = {
            row.pid: titles[row.pid].split()[0]
            for row in rows
            if row.pid in titles and titles.get(row.parent) != titles[row.pid]
        }

    def check_engines(self) -> None:
        """Raises Failure when a process of the engine has died."""
        for pid, title in self._engines.items():
            if lookup(pid) is None:
                raise Failure(f"{title} of the {self.role} instance has died", self.child.log)


class Sharing:
    """One run."""

    def __init__(self, plan: Plan[SharingSettings], supervisor: Supervisor) -> None:
        self.plan = plan
        self.supervisor = supervisor
        self._instances: dict[str, Instance] = {}

    def run(self) -> dict[str, Any]:
        """What was found out. Raises Failure: an instance or the KV server has failed."""
        settings = self.plan.settings
        self._start_kv_server()
        self._start_instances()
        longest = settings.max_model_len - settings.max_tokens
        prompt = self._tokens(settings.prompt, None) if settings.prompt else self._random_tokens(settings.prompt_len)
        if not 2 <= len(prompt) <= longest:
            raise UsageError(f"the prompt has {len(prompt)} tokens: from 2 to {longest} are possible")
        warm_up = self._random_tokens(min(WARM_UP_TOKENS, longest))
        # As long as the prompt, and different from the first token after the one that begins every text.
        other = self._random_tokens(len(prompt))
        other = (other * (len(prompt) // len(other) + 1))[: len(prompt)]

        self._store("warming up the store instance", warm_up, 2)
        self._retrieve("warming up the retrieve instance", warm_up, 2)
        stored = self._store("storing", prompt, settings.max_tokens)
        if self.plan.backend.hands_over:
            info(f"{len(prompt)} tokens are held by the first instance")
        else:
            info(f"{len(prompt)} tokens are in the store; the first instance ends")
            self._end("store", STORE_END_WITHIN_S)
        retrieved = self._retrieve("retrieving", prompt, settings.max_tokens)
        recomputed = self._ask("retrieve", "recomputing for comparison", "generate", token_ids=other, max_tokens=1)
        result = make_result(self.plan, len(prompt), stored, retrieved, recomputed)
        show(result)
        for role in tuple(self._instances):
            self._end(role, END_WITHIN_S)
        return result

    def _start_kv_server(self) -> None:
        """Starts the KV server, or looks for the given one; settles the KV port. Raises Failure."""
        backend = self.plan.backend
        port = self.plan.settings.kv_port
        if backend.ports:
            port = port or free_port(backend.ports)
            self.plan = self.plan.with_kv_port(port)
            backend = self.plan.backend
        if not backend.url and any(is_listening(port + index) for index in range(backend.ports)):
            raise UsageError(f"--kv-port {port} is in use: choose another one, or 0 for any free one")
        if backend.runs_server:
            command = server_command(self.plan)
            environment, log = command.full_environment(self.plan.environ), self.plan.run_dir / "kv_server.log"
            child = self.supervisor.start(command.name, command.words, environment, log)
            self.supervisor.await_ready(
                float(self.plan.profile.get("KV_READY_TIMEOUT")), [Target(child, backend.address)]
            )
            if backend.name == "redis":
                checks.check_redis_answers(self.plan, self.supervisor)
        elif backend.url and backend.name != "redis":  # that one has been asked already
            try:
                parts = urlsplit(backend.url)
                if backend.ports:
                    socket.create_connection((parts.hostname or "", parts.port or 0), timeout=5).close()
                else:
                    connect(parts.path, 5).close()
            except (OSError, ValueError) as error:
                raise Failure(f"no KV server answers at {backend.url}: {error}") from error
        info(f"KV goes by {mask_passwords(backend.store_url)}")

    def _start_instances(self) -> None:
        roles = ("store", "retrieve")
        for role in roles:
            self._instances[role] = Instance(self.plan, role, self.supervisor)
            if self.plan.cards.shared:  # both size their memory by what is free
                self._await_start(role)
        if not self.plan.cards.shared:
            for role in roles:
                self._await_start(role)
        info("both instances are ready")

    def _await_start(self, role: str) -> None:
        instance, timeout_s = self._instances[role], float(self.plan.profile.get("READY_TIMEOUT"))
        log = self.plan.run_dir / f"{role}.log"
        start = Target(instance.child, 0, problem=lambda: start_problem(log))
        self._receive(role, timeout_s, f"waiting for the {role} instance to start", start)
        instance.watch_engines()

    # --- operations

    def _tokens(self, text: str, limit: int | None) -> list[int]:
        return self._ask("store", "tokenizing", "encode", text=text, limit=limit)["token_ids"]

    def _random_tokens(self, count: int) -> list[int]:
        """New ones every time, at most so many."""
        rng = random.Random(secrets.randbits(64))
        words = ("".join(rng.choices("etaoinshrdlucmfwypvbgkqjxz", k=rng.randint(1, 7))) for _ in range(count))
        return self._tokens(" ".join(words), count)

    def _store(self, what: str, tokens: list[int], max_tokens: int) -> dict[str, Any]:
        wait = {"visible_within_s": self.plan.settings.timeout}
        return self._ask("store", what, "generate", token_ids=tokens, max_tokens=max_tokens, **wait)

    def _retrieve(self, what: str, tokens: list[int], max_tokens: int) -> dict[str, Any]:
        more = {}
        if self.plan.backend.hands_over:
            more = {"params": self._ask("store", "holding the KV cache", "hold", token_ids=tokens)["params"]}
        return self._ask("retrieve", what, "generate", token_ids=tokens, max_tokens=max_tokens, **more)

    def _ask(self, role: str, what: str, operation: str, **arguments: Any) -> dict[str, Any]:
        self._instances[role].send(operation, **arguments)
        # Storing is two steps, to compute and to become visible, and the instance tells better what was late.
        steps = 2 if "visible_within_s" in arguments else 1
        return self._receive(role, steps * self.plan.settings.timeout, what)

    def _receive(self, role: str, timeout_s: float, what: str, start: Target | None = None) -> dict[str, Any]:
        """The next answer. Raises Failure on an error, at the deadline, and when any process has ended.

        ``start``: an instance that starts, whose log is looked into.
        """
        instance = self._instances[role]
        with Progress() as progress:
            while (answer := instance.answer()) is None:
                if progress.elapsed_s > timeout_s:
                    raise Failure(f"{what} took longer than {timeout_s:g} s", instance.child.log)
                if start:
                    start.check(time.monotonic())
                progress.show(what)
                self._tick()
        return answer

    def _tick(self) -> None:
        try:
            self.supervisor.tick()
        except Failure:
            for instance in self._instances.values():
                instance.answer()  # what it has said about the cause tells more than its end
            raise
        for instance in self._instances.values():
            instance.check_engines()

    def _end(self, role: str, within_s: float) -> None:
        """Asks an instance to end and waits; what does not end in time is killed at the end of all."""
        instance = self._instances.pop(role)
        self.supervisor.release(instance.child)
        instance.send("end", within_s=within_s - 1)  # after that it kills what is left of its engine
        with Progress() as progress:
            while instance.child.process.poll() is None:
                if progress.elapsed_s > within_s:
                    info(f"the {role} instance does not end: it is killed (log: {instance.child.log})")
                    return
                progress.show(f"waiting for the {role} instance to end")
                self._tick()


# --- the result

Answer = Mapping[str, Any]

# Two tokens whose log-probabilities are no further apart are a tie, which rounding decides: sums of a prompt that was
# computed in one go and of one that was loaded differ in the last bits. As the probe has it (measure/settings.py).
TIES = {"cpu": 0.001}
LOW_PRECISION_TIE = 0.25


def first_difference(stored: Answer, retrieved: Answer, tie: float) -> tuple[str, bool]:
    """Where the second answer leaves the first, "" if nowhere, and whether that is a tie in the first."""
    ours, theirs = retrieved["token_ids"], stored["token_ids"]
    place = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    if place == len(ours) == len(theirs):
        return "", False
    if place in (len(ours), len(theirs)):
        return f"{len(ours)} tokens instead of {len(theirs)}", False
    text = f"token {place + 1} is {ours[place]} instead of {theirs[place]}"
    candidates = {int(token): value for token, value in stored["candidates"][place].items()}
    if ours[place] not in candidates:
        return text + ", which is far less likely", False
    gap = candidates[theirs[place]] - candidates[ours[place]]
    return text + f", log-probabilities {gap:.5f} apart", gap <= tie


def make_result(
    plan: Plan[SharingSettings], tokens: int, stored: Answer, retrieved: Answer, recomputed: Answer
) -> dict[str, Any]:
    """The result as JSON; times in seconds. ``store_s`` runs until the KV is visible, computing included."""
    difference, tie = first_difference(stored, retrieved, TIES.get(plan.settings.device, LOW_PRECISION_TIE))
    problems = [f"the two texts differ: {difference}"] if difference and not tie else []
    problems += [] if retrieved["reused_tokens"] else ["nothing was reused"]
    return {
        "prompt_tokens": tokens,
        "reused_tokens": retrieved["reused_tokens"],
        "cached_tokens": retrieved["cached_tokens"],
        "store_text": stored["text"],
        "retrieve_text": retrieved["text"],
        "texts_equal": not difference,
        "difference": difference,
        "store_ttft_s": round(stored["ttft_s"], 4),
        "store_s": round(stored["visible_s"], 4),
        "retrieve_s": round(retrieved["ttft_s"], 4),
        "recompute_s": round(recomputed["ttft_s"], 4),
        "recompute_reused_tokens": recomputed["reused_tokens"],
        "speed_up": round(recomputed["ttft_s"] / retrieved["ttft_s"], 2),
        "speed_up_to_store_ttft": round(stored["ttft_s"] / retrieved["ttft_s"], 2),
        "device": plan.settings.device,
        "backend": plan.settings.backend,
        "tensor_parallel_size": plan.settings.tensor_parallel_size,
        "model": plan.model.name,
        "problems": problems,
    }


def not_loaded(result: Answer) -> str:
    """vLLM counts what was to be loaded as cached, whether it has arrived or not."""
    lacking = result["cached_tokens"] - result["reused_tokens"]
    return f" ({lacking:,} that vLLM counts as cached were not loaded)" if lacking > 0 else ""


def show(result: Answer) -> None:
    """The result for a person, on standard output."""
    difference = result["difference"]
    rows = [
        ("stored by the first", repr(result["store_text"])),
        ("retrieved by the second", repr(result["retrieve_text"])),
        ("texts equal", f"{'NO' if result['problems'] else 'a tie'}: {difference}" if difference else "yes"),
        ("tokens reused", f"{result['reused_tokens']:,} of {result['prompt_tokens']:,}{not_loaded(result)}"),
        ("first: to the first token", f"{result['store_ttft_s']:.3f} s"),
        ("first: until stored", f"{result['store_s']:.3f} s"),
        ("second: to the first token", f"{result['retrieve_s']:.3f} s, KV retrieved"),
        ("second: recomputing", f"{result['recompute_s']:.3f} s"),
        ("speed-up", f"{result['speed_up']:.1f} times (second instance, retrieve instead of recompute)"),
    ]
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"  {name:<{width}}  {text}" for name, text in rows), flush=True)


# --- the program


def describe_death(name: str, status: int) -> str:
    """What happened to a child, from its exit status or (negative) the signal that killed it."""
    how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    return f"the {name} process {how}"


def prepare(plan: Plan[SharingSettings], supervisor: Supervisor) -> None:
    """Checks and set-up. Raises Failure."""
    backend, log = plan.backend, plan.run_dir / "setup.log"
    problems = checks.Problems()
    for line in (checks.cards_problem(plan), checks.token_problem(plan), *checks.hpu_problems(plan)):
        problems.add(line)
    problems.report()
    checks.chunk_warning(plan)
    set_up_python(supervisor, plan.interpreter, plan.profile, plan.profile.get("SETUP_EXTRA"), log)
    checks.check_python(plan, supervisor)
    if backend.runs_server:
        program = kv_server(plan)[0]
        if backend.name == "redis":
            set_up_redis(supervisor, program, log)
        elif shutil.which(program) is None:
            raise Failure(f"{program} is not there: install it, or give --remote-url")
    build_model(supervisor, plan, log)


@contextlib.contextmanager
def log_folder(given: Path | None) -> Iterator[Path]:
    """Where the logs go: the given directory, or a temporary one that is kept when there is something to look up."""
    if given:
        given.mkdir(parents=True, exist_ok=True)
        yield given
        return
    folder, keep = Path(tempfile.mkdtemp(prefix="kv-sharing-")), False
    try:
        yield folder
    except Failure as failure:
        keep = failure.status == Failure.status and any(folder.iterdir())
        raise
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


def run(cls: type[SharingSettings], argv: Sequence[str], environ: Mapping[str, str], prog: str) -> None:
    """Raises Failure, also where the run itself worked and its result is wrong."""
    configuration = configure(cls, argv, environ, prog)
    settings = configuration.settings
    if settings.dry_run:
        plan = make_plan(configuration, environ, settings.log_dir or Path(tempfile.gettempdir()))
        commands = [server_command(plan)] if plan.backend.runs_server else []
        for command in (*commands, *(instance_command(plan, role, 3) for role in SIDES)):
            print(f"# {command.name}\n{command.shell_line(environ)}")
        return
    with log_folder(settings.log_dir) as folder:
        plan = make_plan(configuration, environ, folder.absolute())
        with secret_of_run(plan.backend), Supervisor(grace_s=TERM_GRACE_S, describe=describe_death) as supervisor:
            prepare(plan, supervisor)
            size, model = settings.tensor_parallel_size, plan.model.name
            info(f"{settings.device}, {settings.backend}, tensor parallel {size}, {model}")
            if warning := load_warning(plan, 1, settings.prompt_len):
                info(warning)
            result = Sharing(plan, supervisor).run()
        if settings.json:
            settings.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        if result["problems"]:
            raise Failure("; ".join(result["problems"]), plan.run_dir / "retrieve.log")


def main(*, tensor_parallel_size: int = 1) -> int:
    """Entry of both scripts, which differ in the default tensor parallel size."""
    CONSOLE.name, CONSOLE.failed = "kv-sharing", "failed"
    cls = settings_class(tensor_parallel_size)
    return exit_status(lambda: run(cls, sys.argv[1:], os.environ, Path(sys.argv[0]).name))
