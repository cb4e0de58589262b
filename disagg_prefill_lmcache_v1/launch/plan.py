"""All choices of a run, made from its settings and a look at the machine: model, ports, cards, interpreter."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Generic
from urllib.parse import urlsplit

from disagg_prefill_lmcache_v1.launch.backends import BACKENDS, make_backend
from disagg_prefill_lmcache_v1.launch.backends.base import WILDCARDS, Backend
from disagg_prefill_lmcache_v1.launch.devices import Cards, assign_cards
from disagg_prefill_lmcache_v1.launch.interpreter import Interpreter, choose_interpreter
from disagg_prefill_lmcache_v1.launch.messages import UsageError
from disagg_prefill_lmcache_v1.launch.places import default_run_dir, place
from disagg_prefill_lmcache_v1.launch.profiles import Profile
from disagg_prefill_lmcache_v1.launch.settings import Configuration, S, Settings
from disagg_prefill_lmcache_v1.settings import SettingsError, flag_of, is_loopback

ROLES = ("prefiller", "decoder")
PORTS = ("proxy_port", "prefiller_port", "decoder_port")
HUB_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?"


@dataclass(frozen=True)
class Model:
    """What the servers serve: a Hugging Face name or an absolute path, and whether it is built here."""

    name: str
    served_name: str
    built: bool = False

    @property
    def is_local(self) -> bool:
        return self.built or Path(self.name).is_dir()


@dataclass(frozen=True)
class Plan(Generic[S]):
    """Everything that the commands depend on."""

    configuration: Configuration[S]
    backend: Backend
    cards: Cards
    model: Model
    interpreter: Interpreter
    environ: Mapping[str, str]
    run_id: str = field(default_factory=lambda: str(os.getpid()))  # tells its names from those of other runs

    @property
    def settings(self) -> S:
        return self.configuration.settings

    @property
    def profile(self) -> Profile:
        return self.configuration.profile

    @property
    def run_dir(self) -> Path:
        return self.backend.run_dir

    @property
    def host(self) -> str:
        """Where its servers listen."""
        return self.settings.host

    @property
    def reach(self) -> str:
        """The host by which they reach each other on this machine."""
        return WILDCARDS.get(self.host, self.host)

    @property
    def servers(self) -> tuple[str, ...]:
        """Names of its vLLM servers, ``prefiller``, ``prefiller2`` and so on."""
        return server_names(self.settings)

    def with_kv_port(self, port: int) -> Plan[S]:
        return replace(self, backend=replace(self.backend, port=port))


def server_names(settings: Settings) -> tuple[str, ...]:
    """Names of the vLLM servers of the example, prefillers first."""
    return tuple(
        role if number == 1 else f"{role}{number}"
        for role in ROLES
        for number in range(1, getattr(settings, f"{role}s") + 1)
    )


def choose_model(configuration: Configuration[S], environ: Mapping[str, str], served_name: str = "") -> Model:
    """The model that was asked for, else the device's, else the small one that is built here.

    Raises:
        UsageError: neither a model's directory nor a name that Hugging Face can have.
    """
    name = configuration.settings.model
    built_name = configuration.profile.get("BUILT_MODEL")
    built_path = str(place(f".models/{built_name}", environ)) if built_name else ""
    if not name:
        return Model(built_path, served_name or built_name, built=True)
    source = configuration.source("model")
    if os.path.exists(name):
        if not Path(name, "config.json").is_file():
            raise UsageError(f"{source} '{name}': allowed: a Hugging Face name or a directory with a config.json")
        name = os.path.abspath(name)
        return Model(name, served_name or (built_name if name == built_path else name))
    if not re.fullmatch(HUB_NAME, name):
        raise UsageError(f"{source} '{name}': no such directory and not a Hugging Face name (NAME or OWNER/NAME)")
    return Model(name, served_name or name)


def make_plan(configuration: Configuration[Settings], environ: Mapping[str, str], role: str = "") -> Plan[Settings]:
    """The plan of the example, or of one of its servers.

    Raises:
        UsageError: settings that do not fit together.
    """
    settings, profile = configuration.settings, configuration.profile
    url = check_store_url(configuration)
    configuration.check_kv_port()
    model = choose_model(configuration, environ, settings.served_model_name)
    run_dir = Path(os.path.abspath(settings.run_dir or default_run_dir(environ)))
    try:
        backend = make_backend(
            settings.backend, environ=environ, profile=profile.settings, host=settings.host, port=settings.kv_port,
            ranks=settings.tensor_parallel_size, prefillers=settings.prefillers, decoders=settings.decoders,
            advertise_host=settings.advertise_host, url=url, run_dir=run_dir,
        )  # fmt: skip
    except SettingsError as error:
        raise UsageError(str(error)) from error
    check_hosts(configuration, backend, role)
    check_ports(settings, backend)
    on_cards: Sequence[str] = server_names(settings)
    if role and (role not in ROLES or not is_loopback(settings.host)):
        # A server that others are to reach has its machine to itself; on one machine two share its cards.
        on_cards = [role] if role in ROLES else []
    cards = assign_cards(profile, settings.tensor_parallel_size, on_cards, environ)
    interpreter = choose_interpreter(settings.python, profile, environ)
    return Plan(configuration, backend, cards, model, interpreter, environ)


def check_store_url(configuration: Configuration[Settings]) -> str:
    """The URL of a store that runs already, "" for none. Raises UsageError, without showing a URL with a password."""
    settings = configuration.settings
    if settings.redis_url and settings.kv_url:
        raise UsageError("--kv-url and --redis-url are the same setting: give one")
    name = "redis_url" if settings.redis_url else "kv_url"
    url, source = getattr(settings, name), configuration.source(name)
    if not url:
        return ""
    if settings.redis_url and settings.backend != "redis":
        raise UsageError(f"{source} goes with --backend redis")
    kind = BACKENDS[settings.backend]
    if not kind.schemes:
        raise UsageError(f"{source}: with --backend {settings.backend} there is no KV server")
    schemes = " or ".join(f"{scheme}://" for scheme in kind.schemes)
    if settings.backend == "redis":
        if not re.fullmatch(rf"({'|'.join(kind.schemes)})://[^\s/]+(/\S*)?", url):
            raise UsageError(f"{source}: allowed: {schemes}, as in redis://:password@host:6379/0")
        return url
    if not kind.default_port:
        if not re.fullmatch(rf"({'|'.join(kind.schemes)})://(/[^\s/]+)+", url):
            raise UsageError(f"{source}: --backend {settings.backend} allows {schemes}/PATH of its server's socket")
        return url
    if not re.fullmatch(rf"({'|'.join(kind.schemes)})://([A-Za-z0-9_.-]+|\[[0-9a-fA-F:.]+\]):[0-9]{{1,5}}", url):
        raise UsageError(f"{source}: --backend {settings.backend} allows {schemes}HOST:PORT")
    if kind.local and not is_loopback(urlsplit(url).hostname or ""):
        raise UsageError(
            f"{source}: the server of --backend {settings.backend} must run on the machine of the vLLM server: "
            "between machines take --backend lm, redis or nixl"
        )
    return url


def check_hosts(configuration: Configuration[Settings], backend: Backend, role: str) -> None:
    """Raises UsageError for servers that others are to reach and cannot, or what a backend cannot do. ``role`` "": of
    the example."""
    settings = configuration.settings
    for name in ("prefiller_url", "decoder_url"):
        if not role and getattr(settings, name):
            raise UsageError(f"{configuration.source(name)}: the example starts its servers itself: use the launcher")
    for name in ("prefillers", "decoders"):
        if role and getattr(settings, name) > 1:
            raise UsageError(f"{configuration.source(name)} is the example's: start each server with its own port")
    if settings.save_decode_cache and backend.name in ("mp", "nixl"):
        raise UsageError(f"--save-decode-cache is not supported with --backend {backend.name}: take lm, redis or shm")
    if settings.advertise_host in WILDCARDS:
        raise UsageError(f"--advertise-host {settings.advertise_host}: allowed: what other machines can connect to")
    if is_loopback(settings.host):
        return
    if role == "kv-server" and backend.local:
        other = " (another Redis: --kv-url)" if backend.name == "redis" else ""
        raise UsageError(
            f"--host {settings.host}: the server of --backend {backend.name} is for this machine alone{other}"
        )
    if role in ROLES and backend.hands_over and settings.host in WILDCARDS and not settings.advertise_host:
        raise UsageError(
            f"--host {settings.host} with --backend {backend.name} needs --advertise-host: where other servers fetch KV"
        )


def ports_of(settings: Settings, backend: Backend) -> dict[str, range]:
    """The ports that each setting's servers take."""
    counts = {"prefiller_port": settings.prefillers, "decoder_port": settings.decoders}
    ports = {name: range(getattr(settings, name), getattr(settings, name) + counts.get(name, 1)) for name in PORTS}
    return {**ports, "kv_port": range(backend.port, backend.port + backend.ports)}


def check_ports(settings: Settings, backend: Backend) -> None:
    """Raises UsageError where two servers would take the same port."""
    ports = {name: row for name, row in ports_of(settings, backend).items() if row}
    names = list(ports)
    for index, name in enumerate(names):
        row = ports[name]
        if row[-1] > 65535:
            raise UsageError(f"{flag_of(name)} {row[0]}: {len(row)} ports in a row are needed")
        for other in names[index + 1 :]:
            if row[0] == ports[other][0]:
                raise UsageError(
                    f"{flag_of(name)} and {flag_of(other)} are both {row[0]}: four different ports are needed"
                )
            for first, second in ((name, other), (other, name)):
                if ports[first][0] in ports[second]:
                    raise UsageError(
                        f"{flag_of(first)} {ports[first][0]} is one of the {len(ports[second])} ports from "
                        f"{flag_of(second)} {ports[second][0]} on, one for each server"
                    )
