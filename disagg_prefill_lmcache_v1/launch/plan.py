"""All choices of a run, made from its settings and a look at the machine: model, ports, cards, interpreter."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Generic

from disagg_prefill_lmcache_v1.launch.backends import BACKENDS, make_backend
from disagg_prefill_lmcache_v1.launch.backends.base import Backend
from disagg_prefill_lmcache_v1.launch.devices import Cards, assign_cards
from disagg_prefill_lmcache_v1.launch.interpreter import Interpreter, choose_interpreter
from disagg_prefill_lmcache_v1.launch.messages import UsageError
from disagg_prefill_lmcache_v1.launch.places import default_run_dir, place
from disagg_prefill_lmcache_v1.launch.profiles import Profile
from disagg_prefill_lmcache_v1.launch.settings import Configuration, S, Settings
from disagg_prefill_lmcache_v1.settings import SettingsError

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
        return self.backend.host

    def with_kv_port(self, port: int) -> Plan[S]:
        return replace(self, backend=replace(self.backend, port=port))


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


def make_plan(configuration: Configuration[Settings], environ: Mapping[str, str]) -> Plan[Settings]:
    """The plan of the example or of one of its servers.

    Raises:
        UsageError: settings that do not fit together.
    """
    settings, profile = configuration.settings, configuration.profile
    check_redis_url(configuration)
    model = choose_model(configuration, environ, settings.served_model_name)
    run_dir = Path(os.path.abspath(settings.run_dir or default_run_dir(environ)))
    try:
        backend = make_backend(
            settings.backend, environ=environ, profile=profile.settings, host=profile.get("HOST"),
            port=settings.kv_port, ranks=settings.tensor_parallel_size, url=settings.redis_url, run_dir=run_dir,
        )  # fmt: skip
    except SettingsError as error:
        raise UsageError(str(error)) from error
    check_ports(settings, backend)
    cards = assign_cards(profile, settings.tensor_parallel_size, ROLES, environ)
    interpreter = choose_interpreter(settings.python, profile, environ)
    return Plan(configuration, backend, cards, model, interpreter, environ)


def check_redis_url(configuration: Configuration[Settings]) -> None:
    """Raises UsageError for a URL that cannot be, without showing it: it may hold a password."""
    url, source = configuration.settings.redis_url, configuration.source("redis_url")
    if not url:
        return
    if configuration.settings.backend != "redis":
        raise UsageError(f"{source} goes with --backend redis")
    schemes = "|".join(BACKENDS["redis"].schemes)
    if not re.fullmatch(rf"({schemes})://[^\s/]+(/\S*)?", url):
        raise UsageError(f"{source}: allowed: redis:// or rediss://, as in redis://:password@host:6379/0")


def check_ports(settings: Settings, backend: Backend) -> None:
    """Raises UsageError where two servers would take the same port."""
    ports = {**{name: getattr(settings, name) for name in PORTS}, "kv_port": backend.port}
    names = list(ports)
    for index, name in enumerate(names):
        for other in names[index + 1 :]:
            if ports[name] == ports[other]:
                first, second = (f"--{each.replace('_', '-')}" for each in (name, other))
                raise UsageError(f"{first} and {second} are both {ports[name]}: four different ports are needed")
    row = f"--kv-port {backend.port}"
    for name in PORTS:
        if backend.port <= ports[name] < backend.port + backend.ports:
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(
                f"{flag} {ports[name]} is one of the {backend.ports} ports from {row} on, one for each rank of the "
                "decoder"
            )
    if backend.port + backend.ports > 65536:
        raise UsageError(f"{row}: {backend.ports} ports in a row are needed")
