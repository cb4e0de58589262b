"""What is refused before anything is started or installed: ports, cards, programs, disk space, tokens, versions."""

from __future__ import annotations

import contextlib
import fcntl
import fnmatch
import itertools
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from disagg_prefill_lmcache_v1.launch.backends.base import role_of
from disagg_prefill_lmcache_v1.launch.commands import build_command, server_address
from disagg_prefill_lmcache_v1.launch.interpreter import PREFLIGHT
from disagg_prefill_lmcache_v1.launch.messages import Failure, info
from disagg_prefill_lmcache_v1.launch.plan import ROLES, Plan
from disagg_prefill_lmcache_v1.launch.ports import answers, is_listening
from disagg_prefill_lmcache_v1.launch.preflight import PROBLEM, WARNING
from disagg_prefill_lmcache_v1.launch.settings import Settings
from disagg_prefill_lmcache_v1.launch.supervision import Supervisor
from disagg_prefill_lmcache_v1.same_user import read_secret
from disagg_prefill_lmcache_v1.settings import authority, is_loopback

PROGRAM_VARIABLES = {"prefiller": "VLLM_PROGRAM", "decoder": "VLLM_PROGRAM", "proxy": "PROXY_PROGRAM"}


SPELLED = {1: "one server", 2: "two servers"}


class Problems:
    """Problems found so far, once each: two roles may share one."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, line: str) -> None:
        if line and line not in self.lines:
            self.lines.append(line)

    def report(self) -> None:
        """Tells all of them and raises Failure."""
        for line in self.lines[:-1]:
            info(f"error: {line}")
        if self.lines:
            raise Failure(self.lines[-1])


def check_machine(plan: Plan[Settings], roles: Sequence[str]) -> None:
    """What can be known before anything is installed. Roles: whose ports and programs matter. Raises Failure."""
    problems = Problems()
    problems.add(cards_problem(plan))
    for role in roles:
        problems.add(program_problem(plan, role))
        for port, name in role_ports(plan, role):
            problems.add(port_problem(plan, port, name))
        address = plan.backend.address
        if role == "kv-server" and isinstance(address, str) and answers(address):
            problems.add(
                f"another server has {address}: stop it, or give another {plan.configuration.source('run_dir')}"
            )
        if role_of(role) in ROLES:
            config = build_command(plan, role).environment.get("LMCACHE_CONFIG_FILE")
            if config and not os.access(config, os.R_OK):
                problems.add(f"cannot read LMCache's settings {config}")
    problems.add(run_dir_problem(plan))
    interpreter = plan.interpreter
    if interpreter.kind == "bundle" and not interpreter.exists:
        problems.add(space_problem(interpreter.venv, int(plan.profile.get("SETUP_GIB")), "set-up"))
    problems.add(token_problem(plan))
    problems.add(parallel_problem(plan))
    for line in hpu_problems(plan):
        problems.add(line)
    chunk_warning(plan)
    problems.report()


def cards_problem(plan: Plan[Any]) -> str:
    """Too few cards."""
    cards, settings = plan.cards, plan.settings
    if not cards.too_few:
        return ""
    servers = SPELLED.get(len(cards.of), f"{len(cards.of)} servers")
    return (
        f"{cards.found} {settings.device} card(s) found, {cards.needed} needed for {servers} "
        f"of tensor parallel size {settings.tensor_parallel_size}: free some, or choose another --device"
    )


def program_problem(plan: Plan[Settings], role: str) -> str:
    """A server whose program is not there. Redis is left to set-up, which may install it."""
    if role == "kv-server" and plan.backend.name == "redis":
        return ""
    first = build_command(plan, role).words[0]
    if first == plan.interpreter.path or shutil.which(first):
        return ""
    name = PROGRAM_VARIABLES.get(role_of(role)) or plan.backend.program_variable
    return f"the program {first} is missing: install it, or name another with {name}"


def role_ports(plan: Plan[Settings], role: str) -> list[tuple[int, str]]:
    """The ports that a server listens on, each with its setting's name."""
    backend, server_role = plan.backend, role_of(role)
    if role == "kv-server":
        return [(backend.port + index, "kv_port") for index in range(backend.ports)]
    own = [(server_address(plan, role), f"{server_role}_port")]
    if server_role in ROLES and backend.hands_over:
        own.append((backend.port_of(role), "kv_port"))
    return own


def port_problem(plan: Plan[Settings], port: int, name: str) -> str:
    """A port that something listens on."""
    if not is_listening(port, plan.host):
        return ""
    return f"port {port} is used by another program: stop it, or give another {plan.configuration.source(name)}"


def run_dir_problem(plan: Plan[Settings]) -> str:
    """A run directory that cannot be made, written to, or is too full."""
    run_dir = plan.run_dir
    with contextlib.suppress(OSError):
        run_dir.mkdir(parents=True, exist_ok=True)
    if not run_dir.is_dir() or not os.access(run_dir, os.W_OK):
        return f"{plan.configuration.source('run_dir')} '{run_dir}' cannot be written to"
    return space_problem(run_dir, int(plan.profile.get("RUN_DIR_GIB")), "logs and results")


def space_problem(folder: Path, gib: int, purpose: str) -> str:
    """Too little room on the disk of a folder that may not be there yet."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free >> 30
    if free >= gib:
        return ""
    return f"{folder} has {free} GiB free, {purpose} need(s) {gib} GiB: free some, or use another place"


def hub_home(plan: Plan[Any]) -> Path:
    """Hugging Face's folder."""
    return Path(plan.environ.get("HF_HOME") or os.path.expanduser("~/.cache/huggingface"))


def hub_cache(plan: Plan[Any]) -> Path:
    """Where Hugging Face keeps the model."""
    hub = Path(plan.environ.get("HF_HUB_CACHE") or hub_home(plan) / "hub")
    return hub / f"models--{plan.model.name.replace('/', '--')}"


def token_problem(plan: Plan[Any]) -> str:
    """A gated model needs a token unless it lies in the cache already."""
    environ, name = plan.environ, plan.model.name
    gated = any(fnmatch.fnmatchcase(name, pattern) for pattern in plan.profile.words("GATED_MODELS"))
    if plan.model.is_local or not gated:
        return ""
    token = hub_home(plan) / "token"
    has_token = environ.get("HF_TOKEN") or environ.get("HUGGING_FACE_HUB_TOKEN")
    if has_token or (token.is_file() and token.stat().st_size) or (hub_cache(plan) / "snapshots").is_dir():
        return ""
    return f"the model {name} is gated: set HF_TOKEN to a Hugging Face token with access, or choose another --model"


def hpu_problems(plan: Plan[Any]) -> list[str]:
    """What makes Gaudi's contiguous paged attention move KV blocks behind LMCache's back: wrong KV, no error."""
    if plan.settings.device != "hpu":
        return []
    words = vllm_words(plan)
    cause = "Gaudi's plugin then moves KV blocks, and LMCache would store and load wrong ones"
    problems = []
    if plan.environ.get("VLLM_CONTIGUOUS_PA", "").lower() in ("1", "true", "yes", "on"):
        problems.append(f"VLLM_CONTIGUOUS_PA={plan.environ['VLLM_CONTIGUOUS_PA']}: unset it; {cause}")
    if "--no-enable-prefix-caching" in words:
        problems.append(f"--no-enable-prefix-caching is not possible on hpu: leave it out; {cause}")
    return problems


def parallel_problem(plan: Plan[Any]) -> str:
    """Ways of several cards that the KV connector would refuse once the model is loaded."""
    for flag, value in itertools.pairwise(vllm_words(plan)):
        if flag in ("--pipeline-parallel-size", "-pp") and value != "1":
            return (
                f"{flag} {value} is not supported: each stage has the KV of its own layers; take --tensor-parallel-size"
            )
        if flag in ("--data-parallel-size", "-dp") and value != "1":
            return (
                f"{flag} {value} is not supported: take --prefillers and --decoders, servers with a proxy before them"
            )
    return ""


def vllm_words(plan: Plan[Any]) -> list[str]:
    """The profile's and the caller's own arguments of vLLM: flags with dashes, each followed by its value."""
    words = []
    for word in (*plan.profile.words("VLLM_ARGS"), *plan.configuration.vllm_arguments):
        flag, *value = word.split("=", 1) if word.startswith("--") else [word]
        words += [flag.replace("_", "-") if word.startswith("--") else word, *value]
    return words


def chunk_warning(plan: Plan[Any]) -> None:
    """Tells of a chunk size that is no multiple of vLLM's block size, where both are known."""
    block = plan.profile.get("BLOCK_SIZE")
    for flag, value in itertools.pairwise(vllm_words(plan)):
        block = value if flag == "--block-size" else block
    chunk = plan.environ.get("LMCACHE_CHUNK_SIZE", "")
    config = plan.backend.environment("decoder", plan.environ).get("LMCACHE_CONFIG_FILE")
    if not chunk and config:
        with contextlib.suppress(OSError):
            match = re.search(r"^chunk_size:\s*(\d+)", Path(config).read_text(), re.MULTILINE)
            chunk = match.group(1) if match else ""
    if block.isdigit() and chunk.isdigit() and int(block) and int(chunk) % int(block):
        info(f"warning: LMCache's chunk size {chunk} is no multiple of the block size {block}: the rest is not reused")


def exposure(plan: Plan[Settings], name: str) -> str:
    """What to tell of a server here that other machines reach and that asks them for nothing, "" for none.

    The proxy tells of itself.
    """
    host, port = (plan.backend.host if name == "kv-server" else plan.host), server_address(plan, name)
    if is_loopback(host) or name == "proxy":
        return ""
    flags = {word for word in vllm_words(plan) if word.startswith("--")}
    if name != "kv-server" and (flags & {"--api-key", "--ssl-certfile"} or plan.environ.get("VLLM_API_KEY")):
        return ""
    return f"{name} listens on {authority(host, port)} without TLS or a key: let only the stack's machines reach it"


def lock_run_dir(plan: Plan[Settings]) -> int:
    """Keeps other runs out of the run directory until this process ends. Returns the descriptor. Raises Failure."""
    descriptor = os.open(plan.run_dir, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise Failure(
            f"another run writes its logs to {plan.run_dir}: wait for its end, or give another "
            f"{plan.configuration.source('run_dir')}"
        ) from None
    return descriptor


def check_python(plan: Plan[Any], supervisor: Supervisor) -> None:
    """Modules, versions, libraries, and a Redis that is not started here. Raises Failure."""
    if not plan.interpreter.exists:
        raise Failure(f"the Python {plan.interpreter.path} is missing: check DISAGG_PYTHON")
    modules = [*plan.profile.words("REQUIRED_MODULES"), *plan.profile.words("DEVICE_MODULES"), *plan.backend.modules]
    imports = [*plan.profile.words("DEVICE_IMPORTS"), *plan.backend.imported]
    words = ["--device", plan.settings.device, "--modules", *modules]
    words += ["--imports", *imports] if imports else []
    run_preflight(plan, supervisor, words, plan.backend.url if plan.backend.name == "redis" else "")


def check_redis_answers(plan: Plan[Any], supervisor: Supervisor) -> None:
    """PING to the Redis that was started here. Raises Failure."""
    scheme, _, address = plan.backend.store_url.partition("://")
    run_preflight(plan, supervisor, [], f"{scheme}://:{read_secret(str(plan.backend.secret_file))}@{address}")


def run_preflight(plan: Plan[Any], supervisor: Supervisor, arguments: Sequence[str], redis_url: str) -> None:
    """Preflight in the servers' Python. Raises Failure with what it finds."""
    problems = Problems()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "preflight.log")
        words = [plan.interpreter.path, PREFLIGHT, *arguments]
        child = supervisor.start("preflight", words, {**plan.environ, "DISAGG_REDIS_URL": redis_url}, log)
        status = supervisor.await_end(child, f"looking at the packages of {plan.interpreter.path}")
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    for line in lines:
        if line.startswith(WARNING):
            info(line)
        elif line.startswith(PROBLEM):
            problems.add(line[len(PROBLEM) :])
    if status and not problems.lines:
        last = next(filter(None, map(str.strip, reversed(lines))), f"exit status {status}")
        problems.add(f"the Python {plan.interpreter.path} cannot be used: {last}")
    problems.report()
