"""KV cache sharing between two vLLM instances: one computes and stores a prompt's KV cache, the other retrieves it.

Used by the scripts kv_cache_sharing_lmcache_v1.py and kv_cache_sharing_lmcache_v1_tp2.py. Each instance is a process
of its own (kv_sharing_instance.py) with its own environment; the KV server between them is started here unless a URL
is given. The second begins when every rank of the first has found its KV in the store and the first has ended.

Exit status: 0 when both texts are equal and KV was reused, 1 when not or when something failed, 2 for bad usage.
"""

from __future__ import annotations

import argparse
import ctypes
import fnmatch
import importlib.util
import json
import os
import random
import re
import secrets
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from disagg_prefill_lmcache_v1.launch import profiles
from disagg_prefill_lmcache_v1.launch.devices import assign_cards, choose_device
from disagg_prefill_lmcache_v1.launch.profiles import Profile

PACKAGE = Path(__file__).resolve().parent.parent
REPOSITORY = PACKAGE.parent
MODELS = REPOSITORY / ".models"
MODULE = "disagg_prefill_lmcache_v1.launch.kv_sharing"
HOST = "127.0.0.1"
BACKENDS = ("lm", "redis", "shm", "nixl")
URL_SCHEMES = {"lm": ("lm",), "redis": ("redis", "rediss"), "shm": ("shm",), "nixl": ()}
KV_ROLES = {"store": "kv_producer", "retrieve": "kv_consumer"}
SIDES = {"store": "prefiller", "retrieve": "decoder"}  # whose configuration each has with nixl
WARM_UP_TOKENS = 300  # more than one chunk, so that both kinds of transfer have happened once
ENGINE_TITLE = "VLLM::"  # how vLLM calls its processes
PROGRESS_EVERY_S = 5.0
STORE_END_WITHIN_S = 30.0  # ends before the other begins: the KV cache outlives it, and the timing is not disturbed
END_WITHIN_S = 9.0  # ends after the result
TERM_GRACE_S = 3.0
LOG_LINES_SHOWN = 15


class Failure(Exception):
    """Ends the example; the message is one line that names the cause."""

    def __init__(self, message: str, log: Path | None = None) -> None:
        super().__init__(message)
        self.log = log


class UsageError(Failure):
    """A wrong or impossible setting."""


def say(text: str) -> None:
    print(f"[kv-sharing] {text}", file=sys.stderr, flush=True)


# --- settings


def without_password(url: str) -> str:
    return re.sub(r"(//[^:@/]*):[^@]*@", r"\1:***@", re.sub(r"(password=)[^&]*", r"\1***", url))


@dataclass(frozen=True)
class Settings:
    """One run, all choices made. See `parse_settings` for the flags and their defaults."""

    device: str
    backend: str
    tensor_parallel_size: int
    model: str
    remote_url: str  # "": the KV server is started here
    kv_port: int  # 0: any free one
    prompt: str  # "": text made by code, new every time
    prompt_len: int
    max_tokens: int
    timeout: float
    json_path: Path | None
    log_dir: Path | None
    dry_run: bool
    vllm_arguments: tuple[str, ...]
    profile: Profile = field(repr=False)

    def of_profile(self, key: str) -> str:
        """A setting of the device's profile, "" when it has none."""
        return self.profile.settings.get(key, "")

    @property
    def max_model_len(self) -> int:
        return int(self.of_profile("MAX_MODEL_LEN"))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        self.exit(2, f"{self.prog}: {message}\n")


def _whole(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"\d{1,9}", text) or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} to {high}")
        return int(text)

    return parse


def _seconds(text: str) -> float:
    if not re.fullmatch(r"\d+(\.\d+)?", text) or float(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return float(text)


def parse_settings(arguments: Sequence[str] | None = None, *, program: str, tensor_parallel_size: int) -> Settings:
    """Precedence: flag, then environment variable DISAGG_<FLAG>, then the device's profile.

    Raises:
        UsageError: values that do not fit together.
    """
    parser = _Parser(
        prog=program,
        description="Share a prompt's KV cache between two vLLM instances through a KV server.",
        epilog="Arguments after -- go to both vLLM instances. Each flag is also an environment variable: --kv-port is "
        "DISAGG_KV_PORT. A URL with a password is better given by DISAGG_REMOTE_URL than on the command line.",
    )
    flags: list[str] = []

    def add(name: str, help_: str, default: str = "", aliases: Sequence[str] = (), **more: Any) -> None:
        flags.append(name)
        variable = f"DISAGG_{name[2:].upper().replace('-', '_')}"
        shown = f"{help_} (default: {default})" if default else help_
        # argparse passes a string default through `type`: the environment is checked like a flag
        parser.add_argument(name, *aliases, default=os.environ.get(variable) or default, help=shown, **more)

    add("--device", "what vLLM runs on: auto, hpu, cuda or cpu", "auto", choices=("auto", *profiles.DEVICES))
    store = ("--remote-server", "--remote_server")
    add("--backend", "way of the KV: lm, redis, shm or nixl (peer to peer)", "lm", store, choices=BACKENDS)
    add(
        "--remote-url",
        "use this KV server (lm://, redis://, rediss:// or shm://) instead of starting one",
        "",
        ("--redis-url",),
    )
    add("--kv-port", "port of the KV server started here, 0: any free one", "0", type=_whole(0, 65535))
    add(
        "--tensor-parallel-size",
        "ranks (cards) of each instance",
        str(tensor_parallel_size),
        ("--tp-size", "--tp_size"),
        type=_whole(1, 64),
    )
    add("--model", "Hugging Face name or local directory (default: the device's; on cpu a small one, built here)")
    add("--prompt", "prompt text (default: random words, --prompt-len tokens of them)")
    add("--prompt-file", "file with the prompt text")
    add("--prompt-len", "tokens of the default prompt", "5000", type=_whole(2, 10**7))
    add("--max-tokens", "answer tokens", "16", ("--max_tokens",), type=_whole(1, 10**6))
    add("--timeout", "deadline of each step after the start, seconds", "300", type=_seconds)
    add("--json", "write the result to this file too")
    add("--log-dir", "keep the logs of the processes here (default: a temporary directory, kept on failure)")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the commands with their environment, start nothing"
    )
    words = list(sys.argv[1:] if arguments is None else arguments)
    split = words.index("--") if "--" in words else len(words)
    options = parser.parse_args(words[:split])
    for action in parser._actions:  # argparse does not check the choice of a default, here from the environment
        if action.choices and getattr(options, action.dest) not in action.choices:
            value, name = getattr(options, action.dest), action.option_strings[0]
            parser.error(f"argument {name}: invalid choice: {value!r} (choose from {', '.join(action.choices)})")

    scheme = urlsplit(options.remote_url).scheme
    if options.remote_url and options.backend == "nixl":
        raise UsageError("--remote-url: with --backend nixl there is no KV server")
    if options.remote_url and scheme not in URL_SCHEMES[options.backend]:
        allowed = " or ".join(f"{scheme}://" for scheme in URL_SCHEMES[options.backend])
        raise UsageError(f"--remote-url: --backend {options.backend} needs a URL that begins with {allowed}")
    if options.prompt and options.prompt_file:
        raise UsageError("--prompt and --prompt-file exclude each other")
    prompt = options.prompt
    if options.prompt_file:
        try:
            prompt = Path(options.prompt_file).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UsageError(f"--prompt-file {options.prompt_file}: {error}") from error
        if not prompt:
            raise UsageError(f"--prompt-file {options.prompt_file} is empty")
    device = choose_device(options.device)[0]
    profile = profiles.load_profile(device)
    longest = int(profile.settings["MAX_MODEL_LEN"]) - options.max_tokens
    if not prompt and options.prompt_len > longest:
        raise UsageError(f"--prompt-len {options.prompt_len}: at most {longest} fit with --max-tokens on {device}")
    model = options.model
    if model and Path(model).is_dir():
        if not (Path(model) / "config.json").is_file():
            raise UsageError(f"--model {model} is a directory without a config.json")
        model = str(Path(model).resolve())
    elif model and not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", model):
        raise UsageError(f"--model {model!r}: no such directory, and not a Hugging Face name (NAME or OWNER/NAME)")
    return Settings(
        device=device,
        backend=options.backend,
        tensor_parallel_size=options.tensor_parallel_size,
        model=model or profile.settings.get("MODEL") or str(MODELS / profile.settings["BUILT_MODEL"]),
        remote_url=options.remote_url,
        kv_port=options.kv_port,
        prompt=prompt,
        prompt_len=options.prompt_len,
        max_tokens=options.max_tokens,
        timeout=options.timeout,
        json_path=Path(options.json) if options.json else None,
        log_dir=Path(options.log_dir) if options.log_dir else None,
        dry_run=options.dry_run,
        vllm_arguments=tuple(words[split + 1 :]),
        profile=profile,
    )


# --- commands of the processes (pure)


@dataclass(frozen=True)
class Command:
    """A program with what its environment has beyond this one's."""

    name: str
    words: tuple[str, ...]
    environment: Mapping[str, str]

    def line(self) -> str:
        """As a shell takes it, without a password."""
        pairs = [f"{key}={without_password(value)}" for key, value in self.environment.items()]
        return shlex.join(["env", *pairs, *self.words])


def _program(settings: Settings, key: str, python: str) -> list[str]:
    words = (os.environ.get(key) or settings.of_profile(key)).split()
    return [word.replace("{python}", python).replace("{package}", str(PACKAGE)) for word in words]


def _python_path(environment: Mapping[str, str]) -> str:
    path = environment.get("PYTHONPATH")
    return f"{REPOSITORY}:{path}" if path else str(REPOSITORY)


def cards_of(settings: Settings, environment: Mapping[str, str]) -> tuple[dict[str, dict[str, str]], bool]:
    """The variable that gives each role its cards (if the device has one), and whether both share the only one.

    Raises:
        Failure: too few cards.
    """
    cards = assign_cards(settings.profile, settings.tensor_parallel_size, tuple(KV_ROLES), environment)
    if cards.too_few and not settings.dry_run:
        raise Failure(
            f"{cards.found} {settings.device} cards found, {cards.needed} needed: use --device cpu to try it without"
        )
    return {role: cards.environment(role) for role in KV_ROLES}, cards.shared


def kv_server_command(settings: Settings, port: int, python: str) -> Command:
    if settings.backend == "lm":
        return Command("kv_server", (*_program(settings, "KV_SERVER_PROGRAM", python), HOST, str(port)), {})
    if settings.backend == "shm":
        size = os.environ.get("KV_SHM_SIZE") or settings.of_profile("KV_SHM_SIZE")
        words = [*_program(settings, "KV_SHM_SERVER_PROGRAM", python), HOST, str(port), "--size", size]
        return Command("kv_server", tuple(words), {"PYTHONPATH": _python_path(os.environ)})
    words = [*_program(settings, "REDIS_SERVER_PROGRAM", python), "--bind", HOST, "--port", str(port)]
    words += ["--save", "", "--appendonly", "no", "--maxmemory", settings.of_profile("REDIS_MAXMEMORY")]
    return Command("kv_server", (*words, "--maxmemory-policy", "allkeys-lru"), {})


def instance_command(
    settings: Settings, role: str, remote_url: str, report_fd: int, python: str, environment: Mapping[str, str]
) -> Command:
    """Args:
    role: "store" or "retrieve".
    environment: the caller's; its values win over the profile's.
    """
    run = f"{os.getpid()}-{role}"
    connector = {
        "kv_connector": "LMCacheDisaggConnectorV1",
        "kv_connector_module_path": environment.get("KV_CONNECTOR_MODULE")
        or settings.of_profile("KV_CONNECTOR_MODULE"),
        "kv_role": KV_ROLES[role],
        "kv_connector_extra_config": {"discard_partial_chunks": False, "lmcache_rpc_port": f"kv-sharing-{run}"},
    }
    transfer_config = json.dumps(connector, separators=(",", ":"))
    cards, shared = cards_of(settings, environment)
    vllm = ["--model", settings.model, "--tensor-parallel-size", str(settings.tensor_parallel_size)]
    vllm += ["--max-model-len", str(settings.max_model_len), "--kv-transfer-config", transfer_config]
    vllm += settings.profile.words("VLLM_ARGS")
    memory = settings.of_profile("SHARED_GPU_MEMORY_UTILIZATION" if shared else "GPU_MEMORY_UTILIZATION")
    vllm += ["--gpu-memory-utilization", memory] if memory else []
    vllm += settings.vllm_arguments

    child = {"PYTHONPATH": _python_path(environment), "DISAGG_DEVICE": settings.device}
    child |= settings.profile.child_environment(environment) | cards[role]
    nixl = settings.backend == "nixl"
    config = PACKAGE / "configs" / f"lmcache-{f'{SIDES[role]}-config' if nixl else f'config-{settings.backend}'}.yaml"
    child["LMCACHE_CONFIG_FILE"] = environment.get("LMCACHE_CONFIG_FILE") or str(config)
    plugin = settings.backend in ("shm", "nixl")
    child[f"DISAGG_{settings.backend.upper()}_URL" if plugin else "LMCACHE_REMOTE_URL"] = remote_url
    if nixl:
        child["UCX_NET_DEVICES"] = environment.get("UCX_NET_DEVICES") or settings.of_profile("UCX_NET_DEVICES")
        if role == "retrieve":
            child["KV_NIXL_SIZE"] = environment.get("KV_NIXL_SIZE") or settings.of_profile("KV_NIXL_SIZE")
    child["DISAGG_KV_LOAD"] = "always"  # to load is what the second instance is there for
    if Path(settings.model).is_absolute():
        child["HF_HUB_OFFLINE"] = "1"
    if role == "store":
        child["DISAGG_KV_VISIBILITY"] = f"@disagg-kv-sharing-{run}"
        child["DISAGG_KV_WAIT_TIMEOUT"] = f"{min(settings.timeout, 3599):g}"
    if settings.device == "hpu":
        # The Gaudi plugin sets its LMCache hooks when it finds the connector's name; there is no command line to read.
        child["VLLM_KV_TRANSFER_CONFIG"] = transfer_config
    return Command(role, (python, "-m", f"{MODULE}_instance", "--report-fd", str(report_fd), "--", *vllm), child)


# --- processes


def is_alive(pid: int) -> bool:
    with suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def _parents() -> dict[int, int]:
    """Process id to parent id of all processes (zombies left out)."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError, ValueError, IndexError):
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
                if state != "Z":
                    found[int(entry.name)] = int(parent)
    return found


def descendants(pid: int) -> set[int]:
    """All living processes below `pid`."""
    parents, found = _parents(), {pid}
    while True:
        more = {child for child, parent in parents.items() if parent in found and child not in found}
        if not more:
            return found - {pid}
        found |= more


_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def adopt_orphans() -> None:
    """Processes whose parent ends become ours: vLLM's engine processes can then always be found and ended."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def free_port(in_a_row: int = 1) -> int:
    """A port that nothing listens on, nor on the next ones."""
    while True:
        with ExitStack() as stack, suppress(OSError):
            first = stack.enter_context(socket.create_server((HOST, 0))).getsockname()[1]
            for port in range(first + 1, first + in_a_row):
                stack.enter_context(socket.create_server((HOST, port)))
            return first


def listens(pid: int, port: int) -> bool:
    """Whether this very process has the listening socket: another one may have taken the port in between."""
    inodes = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        words = line.split()
        if words[3] == "0A" and int(words[1].rpartition(":")[2], 16) == port:
            inodes.add(f"socket:[{words[9]}]")
    with suppress(OSError):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                if os.readlink(entry) in inodes:
                    return True
    return False


class Child:
    """A running process with a log file."""

    def __init__(self, command: Command, log_dir: Path, *, pass_fds: Sequence[int] = ()) -> None:
        self.name = command.name
        self.log = log_dir / f"{command.name}.log"
        with self.log.open("w") as log:
            try:
                self.process = subprocess.Popen(
                    command.words,
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **command.environment},
                    pass_fds=pass_fds,
                    start_new_session=True,  # Ctrl-C is for the parent, which ends all in order
                    preexec_fn=_end_with_parent,
                )
            except OSError as error:
                raise Failure(f"cannot start {command.words[0]}: {error.strerror}") from error

    def check(self) -> None:
        """Raises Failure when the process has ended."""
        status = self.process.poll()
        if status is not None:
            how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
            raise Failure(f"the {self.name} process {how}", self.log)


class Instance(Child):
    """A vLLM instance: operations are sent on its standard input and answered on a pipe."""

    def __init__(self, command: Command, log_dir: Path, report_fd: int, write_fd: int) -> None:
        self._pipe, self._buffer = report_fd, b""
        self._engines: dict[int, str] = {}
        os.set_blocking(report_fd, False)
        super().__init__(command, log_dir, pass_fds=(write_fd,))
        os.close(write_fd)

    def send(self, operation: str, **arguments: Any) -> None:
        message = json.dumps({"do": operation, **arguments}) + "\n"
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # its end is noticed while waiting for the answer
            self.process.stdin.write(message.encode())
            self.process.stdin.flush()

    def receive(self, timeout_s: float, what: str, others: Sequence[Child]) -> dict[str, Any]:
        """The next answer. Raises Failure on an error, at the deadline, and when any process has ended."""
        begin = time.monotonic()
        next_report = begin + PROGRESS_EVERY_S
        while b"\n" not in self._buffer:
            select.select([self._pipe], [], [], 0.2)
            self._read()
            if b"\n" in self._buffer:
                break
            for child in (self, *others):
                child.check()
            now = time.monotonic()
            if now - begin > timeout_s:
                raise Failure(f"{what} took longer than {timeout_s:g} s", self.log)
            if now >= next_report:
                say(f"{what}: {now - begin:.0f} s")
                next_report = now + PROGRESS_EVERY_S
        return self._take()

    def started(self) -> None:
        """From now on the engine's processes are watched too: an idle instance does not notice when one dies."""
        titles = {}
        for pid in descendants(self.process.pid):
            with suppress(OSError):
                title = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
                if title.startswith(ENGINE_TITLE):
                    titles[pid] = title
        parents = _parents()
        # One that has its parent's title is a fork on its way to become another program, which may end at any time.
        self._engines = {
            pid: title.split()[0] for pid, title in titles.items() if titles.get(parents.get(pid, 0)) != title
        }

    def check(self) -> None:
        """Raises Failure when a process of the instance has ended, with what it said about the cause."""
        if self.process.poll() is not None:
            self._read()
            while b"\n" in self._buffer:
                self._take()
        super().check()
        for pid, title in self._engines.items():
            if not is_alive(pid):
                raise Failure(f"{title} of the {self.name} instance has died", self.log)

    def _read(self) -> None:
        with suppress(BlockingIOError):
            self._buffer += os.read(self._pipe, 1 << 20)

    def _take(self) -> dict[str, Any]:
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer = json.loads(line)
        if "error" in answer:
            raise Failure(f"the {self.name} instance failed: {' '.join(answer['error'].split())[:300]}", self.log)
        return answer


@contextmanager
def all_ended() -> Iterator[list[Child]]:
    """Whatever happens inside, nothing that was started is left running."""
    adopt_orphans()
    children: list[Child] = []
    try:
        yield children
    finally:
        for wanted in (signal.SIGTERM, signal.SIGKILL):
            deadline, told, empty = time.monotonic() + TERM_GRACE_S, set(), 0
            # Seen empty twice: while a parent dies, its children belong to nobody for a moment. And what a dying
            # process has just started is told too.
            while empty < 2 and time.monotonic() < deadline:
                left = descendants(os.getpid())
                empty = 0 if left else empty + 1
                for pid in left - told:
                    with suppress(ProcessLookupError):
                        os.kill(pid, wanted)
                told |= left
                time.sleep(0.05)
        for child in children:
            with suppress(subprocess.TimeoutExpired):
                child.process.wait(timeout=1)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _ping_redis(url: str) -> str:
    """What is wrong with this Redis, or "". Never shows the URL, which may carry a password."""
    import redis

    try:
        with redis.Redis.from_url(url, socket_timeout=2, socket_connect_timeout=2) as client:
            client.ping()
    except (redis.RedisError, ValueError, OSError) as error:
        return type(error).__name__
    return ""


def start_kv_server(settings: Settings, log_dir: Path, python: str, children: list[Child]) -> str:
    """Starts the KV server, or looks for the given one; returns its URL.

    Raises:
        Failure: it does not start, or does not answer.
    """
    url = settings.remote_url
    if settings.backend == "nixl":  # each rank of the retrieve instance has one of the ports
        return f"nixl://{HOST}:{settings.kv_port or free_port(settings.tensor_parallel_size)}"
    if not url:
        port = settings.kv_port or free_port()
        command = kv_server_command(settings, port, python)
        if shutil.which(command.words[0]) is None:
            hint = "apt-get install redis-server" if settings.backend == "redis" else "install it"
            raise Failure(f"{command.words[0]} is not there: {hint}, or give --remote-url")
        with socket.socket() as probe:
            if probe.connect_ex((HOST, port)) == 0:
                raise UsageError(f"--kv-port {port} is in use: choose another one, or 0 for any free one")
        server = Child(command, log_dir)
        children.append(server)
        begin = time.monotonic()
        next_report, limit = begin + PROGRESS_EVERY_S, float(settings.of_profile("KV_READY_TIMEOUT"))
        while not listens(server.process.pid, port):
            server.check()
            now = time.monotonic()
            if now - begin > limit:
                raise Failure(f"the KV server does not listen on port {port} after {limit:g} s", server.log)
            if now >= next_report:
                say(f"waiting for the KV server: {now - begin:.0f} s")
                next_report = now + PROGRESS_EVERY_S
            time.sleep(0.05)
        url = f"{URL_SCHEMES[settings.backend][0]}://{HOST}:{port}"
    if settings.backend == "redis":
        problem = _ping_redis(url)
        if problem:
            raise Failure(f"Redis at {without_password(url)} does not answer PING: {problem}")
    elif settings.remote_url:
        try:
            parts = urlsplit(url)
            socket.create_connection((parts.hostname or "", parts.port or 0), timeout=5).close()
        except (OSError, ValueError) as error:
            raise Failure(f"no KV server answers at {url}: {error}") from error
    return url


# --- the example


def random_text(words: int) -> str:
    rng = random.Random(secrets.randbits(64))
    return " ".join("".join(rng.choices("etaoinshrdlucmfwypvbgkqjxz", k=rng.randint(1, 7))) for _ in range(words))


def share(settings: Settings, log_dir: Path, python: str) -> dict[str, Any]:
    """Runs the example; returns what it found out.

    Raises:
        Failure: an instance or the KV server has failed.
    """
    with all_ended() as children:
        url = start_kv_server(settings, log_dir, python, children)
        say(f"KV goes by {without_password(url)}")
        ready_timeout = float(settings.of_profile("READY_TIMEOUT"))
        one_after_the_other = cards_of(settings, os.environ)[1]  # both size their memory by what is free
        instances: dict[str, Instance] = {}

        def begin(role: str) -> None:
            read_fd, write_fd = os.pipe()
            command = instance_command(settings, role, url, write_fd, python, os.environ)
            instances[role] = Instance(command, log_dir, read_fd, write_fd)
            children.append(instances[role])

        def await_start(role: str) -> None:
            instances[role].receive(ready_timeout, f"waiting for the {role} instance to start", children)
            instances[role].started()

        def ask(role: str, what: str, operation: str, **arguments: Any) -> dict[str, Any]:
            instances[role].send(operation, **arguments)
            # Storing is two steps, to compute and to become visible, and the instance tells better what was late.
            steps = 2 if "visible_within_s" in arguments else 1
            return instances[role].receive(steps * settings.timeout, what, children)

        # with nixl the first waits for the second
        for role in reversed(KV_ROLES) if settings.backend == "nixl" else KV_ROLES:
            begin(role)
            if one_after_the_other:
                await_start(role)
        if not one_after_the_other:
            for role in KV_ROLES:
                await_start(role)
        say("both instances are ready")

        def tokens(text: str, limit: int | None) -> list[int]:
            return ask("store", "tokenizing", "encode", text=text, limit=limit)["token_ids"]

        count = settings.prompt_len
        prompt = tokens(settings.prompt, None) if settings.prompt else tokens(random_text(count), count)
        longest = settings.max_model_len - settings.max_tokens
        if not 2 <= len(prompt) <= longest:
            raise UsageError(f"the prompt has {len(prompt)} tokens: from 2 to {longest} are possible")
        warm_up = tokens(random_text(WARM_UP_TOKENS), min(WARM_UP_TOKENS, longest))
        # As long as the prompt, and different from the first token after the one that begins every text.
        other = tokens(random_text(len(prompt)), len(prompt))
        other = (other * (len(prompt) // len(other) + 1))[: len(prompt)]

        store = {"visible_within_s": settings.timeout}
        ask("store", "warming up the store instance", "generate", token_ids=warm_up, max_tokens=2, **store)
        ask("retrieve", "warming up the retrieve instance", "generate", token_ids=warm_up, max_tokens=2)
        stored = ask("store", "storing", "generate", token_ids=prompt, max_tokens=settings.max_tokens, **store)
        say(f"{len(prompt)} tokens are in the store; the first instance ends")
        children.remove(instances["store"])
        end(instances["store"], STORE_END_WITHIN_S)
        retrieved = ask("retrieve", "retrieving", "generate", token_ids=prompt, max_tokens=settings.max_tokens)
        recomputed = ask("retrieve", "recomputing for comparison", "generate", token_ids=other, max_tokens=1)
        result = make_result(settings, prompt, stored, retrieved, recomputed)
        show(result)
        end(instances["retrieve"], END_WITHIN_S)
        return result


def end(instance: Instance, within_s: float) -> None:
    """Asks an instance to end and waits; what does not end in time is left to `all_ended`, which kills it."""
    instance.send("end", within_s=within_s - 1)  # after that it kills what is left of its engine
    begin = time.monotonic()
    next_report = begin + PROGRESS_EVERY_S
    while instance.process.poll() is None:
        now = time.monotonic()
        if now - begin > within_s:
            say(f"the {instance.name} instance does not end: it is killed (log: {instance.log})")
            return
        if now >= next_report:
            say(f"waiting for the {instance.name} instance to end: {now - begin:.0f} s")
            next_report = now + PROGRESS_EVERY_S
        time.sleep(0.05)


def make_result(
    settings: Settings,
    prompt: list[int],
    stored: Mapping[str, Any],
    retrieved: Mapping[str, Any],
    recomputed: Mapping[str, Any],
) -> dict[str, Any]:
    """The result as JSON; times in seconds. `store_s` runs until the KV is visible, computing included."""
    problems = []
    if stored["token_ids"] != retrieved["token_ids"]:
        problems.append("the two texts differ")
    if retrieved["cached_tokens"] == 0:
        problems.append("nothing was reused")
    return {
        "prompt_tokens": len(prompt),
        "reused_tokens": retrieved["cached_tokens"],
        "store_text": stored["text"],
        "retrieve_text": retrieved["text"],
        "texts_equal": stored["token_ids"] == retrieved["token_ids"],
        "store_ttft_s": round(stored["ttft_s"], 4),
        "store_s": round(stored["visible_s"], 4),
        "retrieve_s": round(retrieved["ttft_s"], 4),
        "recompute_s": round(recomputed["ttft_s"], 4),
        "recompute_reused_tokens": recomputed["cached_tokens"],
        "speed_up": round(recomputed["ttft_s"] / retrieved["ttft_s"], 2),
        "speed_up_to_store_ttft": round(stored["ttft_s"] / retrieved["ttft_s"], 2),
        "device": settings.device,
        "backend": settings.backend,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "model": settings.model,
        "problems": problems,
    }


def show(result: Mapping[str, Any]) -> None:
    rows = [
        ("stored by the first", repr(result["store_text"])),
        ("retrieved by the second", repr(result["retrieve_text"])),
        ("texts equal", "yes" if result["texts_equal"] else "NO"),
        ("tokens reused", f"{result['reused_tokens']:,} of {result['prompt_tokens']:,}"),
        ("first: to the first token", f"{result['store_ttft_s']:.3f} s"),
        ("first: until stored", f"{result['store_s']:.3f} s"),
        ("second: to the first token", f"{result['retrieve_s']:.3f} s, KV retrieved"),
        ("second: recomputing", f"{result['recompute_s']:.3f} s"),
        ("speed-up", f"{result['speed_up']:.1f} times (second instance, retrieve instead of recompute)"),
    ]
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"  {name:<{width}}  {text}" for name, text in rows), flush=True)


def _tail(log: Path) -> str:
    with suppress(OSError):
        return without_password("\n".join(log.read_text(errors="replace").splitlines()[-LOG_LINES_SHOWN:]))
    return ""


def _interpreter_with_vllm() -> str:
    """This Python, or the one of the virtual environment in the clone.

    Raises:
        Failure: neither has vLLM.
    """
    if importlib.util.find_spec("vllm") and importlib.util.find_spec("lmcache"):
        return sys.executable
    bundled = REPOSITORY / ".venv" / "bin" / "python"
    if bundled.exists() and Path(sys.prefix) != bundled.parent.parent:
        return str(bundled)
    raise Failure("vLLM and LMCache are not installed for this Python: run tests/run.sh or the example script once")


def _raise_interrupt(number: int, _frame: Any) -> None:
    raise SystemExit(128 + number)


def main(arguments: Sequence[str] | None = None, *, tensor_parallel_size: int = 1) -> int:
    """Entry of both scripts; they differ in the default tensor parallel size."""
    program = Path(sys.argv[0]).name
    log_dir: Path | None = None
    keep_logs = True
    try:
        settings = parse_settings(arguments, program=program, tensor_parallel_size=tensor_parallel_size)
        if settings.dry_run:
            print_commands(settings)
            return 0
        python = _interpreter_with_vllm()
        if python != sys.executable:
            words = list(sys.argv[1:] if arguments is None else arguments)
            words = ["--tensor-parallel-size", str(settings.tensor_parallel_size), *words]
            path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
            os.execve(python, [python, "-m", MODULE, *words], {**os.environ, "PYTHONPATH": path})
        if settings.json_path and not settings.json_path.absolute().parent.is_dir():
            raise UsageError(f"--json {settings.json_path}: no such directory")
        keep_logs = settings.log_dir is not None
        if settings.log_dir:
            settings.log_dir.mkdir(parents=True, exist_ok=True)
        log_dir = settings.log_dir or Path(tempfile.mkdtemp(prefix="kv-sharing-"))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, _raise_interrupt)
        check_token(settings)
        build_model(settings)
        say(f"{settings.device}, {settings.backend}, tensor parallel {settings.tensor_parallel_size}, {settings.model}")
        result = share(settings, log_dir, python)
        if settings.json_path:
            settings.json_path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        for problem in result["problems"]:
            say(f"failed: {problem}")
        keep_logs = keep_logs or bool(result["problems"])
        return 1 if result["problems"] else 0
    except UsageError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    except Failure as error:
        keep_logs = True
        if error.log:
            print(_tail(error.log), file=sys.stderr)
        say(f"failed: {error}" + (f" (log: {error.log})" if error.log else ""))
        return 1
    except OSError as error:
        say(f"failed: {error}")
        return 1
    finally:
        if log_dir and not keep_logs:
            shutil.rmtree(log_dir, ignore_errors=True)


def print_commands(settings: Settings) -> None:
    """The dry run: every command with its environment, as shell lines."""
    url = settings.remote_url or f"{settings.backend}://{HOST}:{settings.kv_port}"
    if not settings.remote_url and settings.backend != "nixl":
        server = kv_server_command(settings, settings.kv_port, sys.executable)
        print(f"# {server.name}\n{server.line()}")
    for role in KV_ROLES:
        command = instance_command(settings, role, url, 3, sys.executable, os.environ)
        print(f"# {role}\n{command.line()}")


def check_token(settings: Settings) -> None:
    """Raises Failure for a gated model that is not in the cache, without a Hugging Face token."""
    if not any(fnmatch.fnmatch(settings.model, pattern) for pattern in settings.of_profile("GATED_MODELS").split()):
        return
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    cached = Path(os.environ.get("HF_HUB_CACHE") or home / "hub") / f"models--{settings.model.replace('/', '--')}"
    token = os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN") or (home / "token").is_file()
    if not token and not (cached / "snapshots").is_dir():
        raise Failure(f"the model {settings.model} is gated: set HF_TOKEN, or choose another --model")


def build_model(settings: Settings) -> None:
    built = settings.of_profile("BUILT_MODEL")
    if built and settings.model == str(MODELS / built):
        from disagg_prefill_lmcache_v1.measure import tiny_model

        try:
            tiny_model.build(Path(settings.model))
        except tiny_model.BuildError as error:
            raise Failure(str(error)) from error


if __name__ == "__main__":
    raise SystemExit(main())
