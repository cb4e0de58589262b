"""KV cache sharing between two vLLM instances: its settings and the commands of its processes.

One instance computes and stores a prompt's KV cache, the other retrieves it. Cards, the way of the KV and the engines'
arguments and environment are those of the example's two servers; here stands what is different.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, make_dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from disagg_prefill_lmcache_v1.launch.backends import BACKENDS, make_backend
from disagg_prefill_lmcache_v1.launch.commands import (
    Command,
    common_environment,
    engine_arguments,
    engine_environment,
    kv_server,
)
from disagg_prefill_lmcache_v1.launch.devices import assign_cards
from disagg_prefill_lmcache_v1.launch.interpreter import Interpreter, choose_interpreter
from disagg_prefill_lmcache_v1.launch.messages import UsageError
from disagg_prefill_lmcache_v1.launch.plan import ROLES, Plan, choose_model
from disagg_prefill_lmcache_v1.launch.ports import HOST
from disagg_prefill_lmcache_v1.launch.settings import WAYS, Configuration, EngineSettings, read_configuration
from disagg_prefill_lmcache_v1.settings import SettingsError, setting

INSTANCE = "disagg_prefill_lmcache_v1.launch.kv_sharing_instance"
SIDES = {"store": "prefiller", "retrieve": "decoder"}  # the server of the example that does the same


@dataclass(frozen=True)
class SharingSettings(EngineSettings):
    """One run. The tensor parallel size's default is the script's, see ``settings_class``."""

    backend: str = setting("lm", WAYS, choices=tuple(BACKENDS), aliases=("--remote-server", "--remote_server"))
    kv_port: int = setting(0, "port of the KV server started here, 0: any free one", low=0, high=65535)
    kv_load: str = setting("always", "to load is what the second instance is there for", flag=False, env="")
    remote_url: str = setting(
        "", "use this KV server instead of starting one; a URL with a password better by the environment",
        aliases=("--redis-url",),
    )  # fmt: skip
    prompt: str = setting("", "prompt text", shown="random words, --prompt-len tokens of them")
    prompt_file: str = setting("", "file with the prompt text")
    prompt_len: int = setting(5000, "tokens of the default prompt", low=2, high=10**7)
    max_tokens: int = setting(16, "answer tokens", low=1, high=10**6, aliases=("--max_tokens",))
    timeout: float = setting(300.0, "deadline of each step after the start, seconds", above=0)
    json: Path | None = setting(None, "write the result to this file too", kind="path")
    log_dir: Path | None = setting(
        None, "keep the logs of the processes here", kind="path", shown="a temporary directory, kept on failure"
    )
    dry_run: bool = setting(False, "print the commands with their environment, start nothing")


def settings_class(tensor_parallel_size: int) -> type[SharingSettings]:
    """The settings with this default."""
    ranks: int = setting(
        tensor_parallel_size, "ranks (cards) of each instance", low=1, high=64, aliases=("--tp-size", "--tp_size")
    )
    return make_dataclass(
        "SharingSettings", [("tensor_parallel_size", int, ranks)], bases=(SharingSettings,), frozen=True
    )


def configure(
    cls: type[SharingSettings], argv: Sequence[str], environ: Mapping[str, str], prog: str
) -> Configuration[SharingSettings]:
    """The settings of a command line, with the text of the prompt file as prompt. Raises UsageError."""
    configuration = read_configuration(
        cls, argv, environ, prog=prog, lead="[kv-sharing] usage",
        description="Shares a prompt's KV cache between two vLLM instances through a KV server.",
    )  # fmt: skip
    settings = configuration.settings
    configuration.check_kv_port()
    schemes = BACKENDS[settings.backend].schemes
    starts_server = BACKENDS[settings.backend].starts_server
    if settings.remote_url and not (starts_server and urlsplit(settings.remote_url).scheme in schemes):
        allowed = " or ".join(f"{scheme}://" for scheme in schemes)
        needs = f"needs a URL that begins with {allowed}" if starts_server else "has no KV server"
        raise UsageError(f"{configuration.source('remote_url')}: --backend {settings.backend} {needs}")
    prompt = settings.prompt
    if settings.prompt_file:
        if prompt:
            raise UsageError("--prompt and --prompt-file exclude each other")
        try:
            prompt = Path(settings.prompt_file).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UsageError(f"--prompt-file {settings.prompt_file}: {error}") from error
        if not prompt:
            raise UsageError(f"--prompt-file {settings.prompt_file} is empty")
    longest = settings.max_model_len - settings.max_tokens
    if not prompt and settings.prompt_len > longest:
        raise UsageError(
            f"--prompt-len {settings.prompt_len}: at most {longest} fit with --max-tokens on {settings.device}"
        )
    if settings.json and not settings.json.absolute().parent.is_dir():
        raise UsageError(f"--json {settings.json}: no such directory")
    return replace(configuration, settings=replace(settings, prompt=prompt, kv_load="always"))


def make_plan(
    configuration: Configuration[SharingSettings], environ: Mapping[str, str], log_dir: Path
) -> Plan[SharingSettings]:
    """The cards and the way of the KV are those of the example's two servers. Raises UsageError."""
    settings, profile = configuration.settings, configuration.profile
    model = choose_model(configuration, environ)
    try:
        backend = make_backend(
            settings.backend, environ=environ, profile=profile.settings, host=HOST,
            port=settings.kv_port, ranks=settings.tensor_parallel_size, url=settings.remote_url, run_dir=log_dir,
        )  # fmt: skip
    except SettingsError as error:
        raise UsageError(str(error)) from error
    cards = assign_cards(profile, settings.tensor_parallel_size, ROLES, environ)
    interpreter = Interpreter("system", sys.executable)
    if settings.python or not interpreter.has_servers(settings.device):
        interpreter = choose_interpreter(settings.python, profile, environ)
    return Plan(configuration, backend, cards, model, interpreter, environ)


def server_command(plan: Plan[SharingSettings]) -> Command:
    """The KV server."""
    return Command("kv_server", tuple(kv_server(plan)), common_environment(plan))


def instance_command(plan: Plan[SharingSettings], role: str, report_fd: int) -> Command:
    """The vLLM instance of a role, "store" or "retrieve"."""
    side, name = SIDES[role], f"kv-sharing-{plan.run_id}-{role}"
    vllm = ["--model", plan.model.name, *engine_arguments(plan, side, name), *plan.configuration.vllm_arguments]
    environment = engine_environment(plan, side)
    environment["DISAGG_KV_VISIBILITY"] = f"@disagg-{name}"
    if role == "store":
        environment["DISAGG_KV_WAIT_TIMEOUT"] = f"{min(plan.settings.timeout, 3599):g}"
    if plan.settings.device == "hpu":
        # The Gaudi plugin sets its LMCache hooks when it finds the connector's name; there is no command line to read.
        environment["VLLM_KV_TRANSFER_CONFIG"] = vllm[vllm.index("--kv-transfer-config") + 1]
    words = (plan.interpreter.path, "-m", INSTANCE, "--report-fd", str(report_fd), "--", *vllm)
    return Command(role, words, environment, ("PROMETHEUS_MULTIPROC_DIR", *plan.backend.clears))
