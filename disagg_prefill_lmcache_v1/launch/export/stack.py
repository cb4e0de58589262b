"""The one description of the stack's servers from which all files are made: the launcher's commands, what runs them.

What a server runs with is what ``launch/commands.py`` builds for the example, with this repository's folder replaced by
the one on the target. Of the caller's environment only the settings of this project count, so that the files depend on
nothing else of the machine that writes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from disagg_prefill_lmcache_v1.launch.backends import BACKENDS
from disagg_prefill_lmcache_v1.launch.backends.base import role_of
from disagg_prefill_lmcache_v1.launch.commands import build_command, server_address
from disagg_prefill_lmcache_v1.launch.devices import Cards
from disagg_prefill_lmcache_v1.launch.export.settings import ExportSettings
from disagg_prefill_lmcache_v1.launch.messages import UsageError, mask_passwords
from disagg_prefill_lmcache_v1.launch.plan import ROLES, Plan, make_plan, server_names
from disagg_prefill_lmcache_v1.launch.profiles import REPOSITORY, Profile
from disagg_prefill_lmcache_v1.launch.settings import PREFIX, Configuration
from disagg_prefill_lmcache_v1.memory import parse_size
from disagg_prefill_lmcache_v1.settings import env_of

COUNTER = ("--middleware", "disagg_prefill_lmcache_v1.kv.in_flight.CountRequests")
PASSWORD = "{redis-password}"  # stands for the secret until a format writes it in its own way
SIDE_HOST = "VLLM_NIXL_SIDE_CHANNEL_HOST"  # an address that the server itself has
APART = ("lm", "redis", "nixl")  # ways of the KV cache that need no common machine
PROXY_SETTLE_S = 10
MEBIBYTE = 1 << 20


@dataclass(frozen=True)
class Server:
    """One server: ``health`` is the path that tells it is alive ("": a TCP connection does), sizes are Kubernetes'."""

    name: str
    words: tuple[str, ...]
    environment: Mapping[str, str]
    port: int
    image: str
    ready_s: int
    health: str = "/health"
    settle_s: int = 0
    limit_s: int = 0
    secrets: Mapping[str, str] = field(default_factory=dict)  # variable -> key in the secret
    secret_file: str = ""  # made before it is started, if it is not there
    prepare: tuple[str, ...] = ()  # a command that runs once before it,
    prepare_environment: Mapping[str, str] = field(default_factory=dict)
    more_ports: tuple[int, ...] = ()
    cards: int = 0
    cpu: str = "250m"
    memory: str = "256Mi"
    memory_limit: str = "1Gi"

    @property
    def runs_vllm(self) -> bool:
        return role_of(self.name) in ROLES


@dataclass(frozen=True)
class Stack:
    """The servers by name, and what all of them share."""

    settings: ExportSettings
    profile: Profile
    servers: Mapping[str, Server]

    @property
    def vllm_servers(self) -> tuple[str, ...]:
        """Names of the vLLM servers, those of prefill first."""
        return tuple(name for name, server in self.servers.items() if server.runs_vllm)

    @property
    def models(self) -> str:
        """Where a model that is built lies."""
        return f"{self.settings.root}/.models"


def own_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Those variables of the caller that are settings of this project."""
    names = {env_of(each, PREFIX) for each in fields(ExportSettings) if "kind" in each.metadata}
    for kind in BACKENDS.values():
        names |= {env_of(each, "") for each in fields(kind) if "kind" in each.metadata}
    return {name: value for name, value in environ.items() if name in names}


def describe(configuration: Configuration[ExportSettings], environ: Mapping[str, str], *, apart: bool) -> Stack:
    """The stack of a configuration; ``apart``: each server has a host of its own, named like it. Raises UsageError.

    Of several servers of a role all are alike there but for their names: ``decoder2`` listens on the same port.
    """
    settings = configuration.settings
    kind = BACKENDS[settings.backend]
    if apart and settings.backend not in APART:
        raise UsageError(f"--backend {settings.backend} needs one machine: allowed here: {', '.join(APART)}")
    environ = own_environment(environ)
    names = (*server_names(settings), "proxy")
    if kind.starts_server and not (settings.kv_url or settings.redis_url):
        names = ("kv-server", *names)
    servers = {name: _server(configuration, environ, name, apart) for name in names}
    return Stack(settings, configuration.profile, servers)


def _plan(
    configuration: Configuration[ExportSettings], environ: Mapping[str, str], name: str, apart: bool
) -> Plan[ExportSettings]:
    settings = configuration.settings
    if not apart:
        return make_plan(configuration, environ)
    port = settings.kv_port or BACKENDS[settings.backend].default_port
    user = f":{PASSWORD}@" if settings.backend == "redis" else ""
    store = settings.kv_url or settings.redis_url
    if not store and name in ROLES and BACKENDS[settings.backend].starts_server:
        store = f"{settings.backend}://{user}kv-server:{port}"
    if name == "kv-server":  # the launcher's own Redis is for one machine; here it has a password
        plan = make_plan(replace(configuration, settings=replace(settings, run_dir=Path("/tmp"))), environ)
        return replace(plan, backend=replace(plan.backend, host="0.0.0.0"))
    names = server_names(settings)
    urls = {
        f"{role}_url": getattr(settings, f"{role}_url")
        or tuple(f"http://{each}:{getattr(settings, f'{role}_port')}" for each in names if role_of(each) == role)
        for role in ROLES
    }
    settings = replace(
        settings, host="0.0.0.0", advertise_host=name, kv_url=store, redis_url="", run_dir=Path("/tmp"),
        prefillers=1, decoders=1, **urls,
    )  # fmt: skip
    plan = make_plan(replace(configuration, settings=settings), environ, name)
    return replace(plan, cards=Cards("", dict.fromkeys(ROLES, "")))  # the device plugin gives each its cards


def _server(configuration: Configuration[ExportSettings], environ: Mapping[str, str], name: str, apart: bool) -> Server:
    settings, profile = configuration.settings, configuration.profile
    one = role_of(name) if apart else name
    plan = replace(_plan(configuration, environ, one, apart), run_id="exported")
    command = build_command(plan, one)
    words, environment = list(command.words), dict(command.environment)
    more: dict[str, Any]
    if name == "proxy":
        words += ["--drain-timeout-s", str(settings.drain_limit)]
        more = {
            "image": settings.proxy_image, "ready_s": int(profile.get("PROXY_READY_TIMEOUT")),
            "settle_s": PROXY_SETTLE_S, "limit_s": settings.drain_limit,
            "secrets": {"DISAGG_PROXY_API_KEY": "api-key"},
        }  # fmt: skip
    elif name == "kv-server":
        more = _store(plan, words, environment, apart)
    else:
        words += COUNTER
        more = _vllm(plan, name)
        if apart and SIDE_HOST in environment:
            environment[SIDE_HOST] = name
        if plan.model.built:
            prepare = build_command(plan, "model")
            more |= {
                "prepare": tuple(_on_target(word, settings.root) for word in prepare.words),
                "prepare_environment": _environment(prepare.environment, settings.root),
            }
    if name != "proxy" and settings.redis_image != more["image"]:
        # LMCache's numba wants to write beside its code; where it cannot, LMCache offers nothing but its command line.
        environment["NUMBA_CACHE_DIR"] = "/tmp/numba"
    if not apart and name != "proxy" and plan.backend.secret_file:
        more["secret_file"] = str(plan.backend.secret_file)
    words = [_on_target(word, settings.root) for word in words]
    return Server(name, tuple(words), _environment(environment, settings.root), server_address(plan, one), **more)


def _environment(values: Mapping[str, str], root: str) -> dict[str, str]:
    found = {name: _on_target(value, root) for name, value in values.items()}
    return found | {"PYTHONDONTWRITEBYTECODE": "1"}  # its folder is only read


def _on_target(text: str, root: str) -> str:
    """A text with this repository's folder replaced by the target's. Raises UsageError for one with a password."""
    rest = text.replace(f":{PASSWORD}@", "")
    if mask_passwords(rest) != rest:
        raise UsageError("an exported file holds no password: name the store without one and add it by your secrets")
    return text.replace(str(REPOSITORY), root)


def _vllm(plan: Plan[ExportSettings], name: str) -> dict[str, Any]:
    settings, profile = plan.settings, plan.profile
    secrets = {"HF_TOKEN": "hf-token"}
    if PASSWORD in plan.backend.store_url:
        secrets["REDIS_PASSWORD"] = "redis-password"
    return {
        "image": settings.server_image or f"disagg-prefill-server:{settings.device}",
        "ready_s": settings.ready_timeout, "settle_s": settings.drain_settle, "limit_s": settings.drain_limit,
        "secrets": secrets,
        "more_ports": (plan.backend.port_of(name),) if plan.backend.hands_over else (),
        "cards": settings.tensor_parallel_size * int(profile.get("CARDS_PER_RANK") or 0),
        "cpu": profile.get("POD_CPU"), "memory": profile.get("POD_MEMORY"),
        "memory_limit": profile.get("POD_MEMORY_LIMIT"),
    }  # fmt: skip


def _store(plan: Plan[ExportSettings], words: list[str], environment: dict[str, str], apart: bool) -> dict[str, object]:
    """What a KV server needs beside its command; adds to that."""
    settings = plan.settings
    size = plan.profile.get("REDIS_MAXMEMORY")
    image = settings.server_image or f"disagg-prefill-server:{settings.device}"
    if settings.backend == "redis":
        size, image = plan.backend.redis_maxmemory, settings.redis_image
    elif settings.backend == "lm":
        size = plan.backend.kv_lm_size or size
        environment["KV_LM_SIZE"] = size
    mebibytes = -(-parse_size(size) // MEBIBYTE)
    more: dict[str, object] = {
        "image": image, "health": "", "ready_s": int(plan.profile.get("KV_READY_TIMEOUT")),
        "memory": f"{mebibytes + 512}Mi", "memory_limit": f"{mebibytes * 5 // 4 + 1024}Mi",
    }  # fmt: skip
    if settings.backend == "redis" and apart:
        words.remove(str(plan.backend.secret_file))
        words += ["--requirepass", PASSWORD]
        more["secrets"] = {"REDIS_PASSWORD": "redis-password"}
    return more
