"""What the launcher must know of a way for the KV cache: its server, and what it changes in the vLLM servers.

A backend is one subclass in a file of its own and one line in ``__init__.py``. Its class variables say what it is; its
fields made by ``setting`` are what a person may set for it alone, by an environment variable of that name in capitals
or in the device's profile; the other fields say where it runs. Methods are pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from disagg_prefill_lmcache_v1.launch.profiles import PACKAGE
from disagg_prefill_lmcache_v1.memory import parse_size
from disagg_prefill_lmcache_v1.settings import authority, setting

SECRET_FILE = "kv_secret"  # in the run directory
SIZE = {"pattern": r"[0-9]{1,12}([kKmMgG][bB]?|[bB])?", "allowed": "a whole number and a unit, as in 512mb or 2gb"}


def memory_size(help: str) -> Any:
    """A setting of the environment alone: bytes with a unit."""
    return setting("", help, flag=False, shown="the device's", **SIZE)


# What a server of the stack reaches another one by that listens on every address of this machine.
WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def role_of(server: str) -> str:
    """The role of a server by its name: ``decoder2`` is the second one."""
    return server.rstrip("0123456789")


def number_of(server: str) -> int:
    """Its number, from 0 on."""
    return int(server[len(role_of(server)) :] or 1) - 1


@dataclass(frozen=True)
class Backend:
    """Base of all backends.

    ``host`` and ``port`` are where the KV server listens (without one: the first of ``ports`` in a row, one for each
    vLLM server), ``advertise_host`` what other machines reach this one by, ``url`` that of a store which runs already
    ("": one is started here), ``run_dir`` where files of the stack lie.
    """

    name: ClassVar[str]
    default_port: ClassVar[int] = 0  # 0: it has no port
    title: ClassVar[str]  # for the help text
    # Class of the connector; Gaudi's plugin recognises LMCache by this text in the name.
    connector: ClassVar[str] = "LMCacheDisaggConnectorV1"
    schemes: ClassVar[tuple[str, ...]] = ()  # of URLs of a store that runs already; (): there can be none
    starts_server: ClassVar[bool] = True
    local: ClassVar[bool] = False  # its server is for the vLLM servers of its own machine alone
    modules: ClassVar[tuple[str, ...]] = ()  # further Python modules; of those joined by | one is enough
    imported: ClassVar[tuple[str, ...]] = ()  # of them, those that preflight imports: native libraries may not load
    hands_over: ClassVar[bool] = False  # the proxy hands on how the decoder fetches KV from the prefiller
    program_variable: ClassVar[str] = ""  # names another program for the server
    size_variable: ClassVar[str] = ""  # names its memory; "": it has none
    # Bytes a second that it takes from a card (an H200, docs/performance.md); None: no limit was seen.
    takes_per_s: ClassVar[float | None] = None
    clears: ClassVar[tuple[str, ...]] = ()  # variables that the vLLM servers must not inherit

    host: str = "127.0.0.1"
    port: int = 0
    ranks: int = 1
    prefillers: int = 1
    decoders: int = 1
    advertise_host: str = ""
    url: str = ""
    run_dir: Path = Path()
    kv_connector_module: str = setting(
        "disagg_prefill_lmcache_v1.kv.connector", "module of the connector class in both vLLM servers", flag=False
    )

    @property
    def ports(self) -> int:
        """Ports in a row from ``port`` on that are taken."""
        return 1 if self.default_port else 0

    @property
    def address(self) -> int | str:
        """What the KV server listens on: a port, or the path of a Unix socket."""
        return self.port

    @property
    def secret_file(self) -> Path | None:
        """File with a secret of this run, which the launcher makes; None: there is none."""
        return None

    @property
    def capacity(self) -> int | None:
        """Bytes of KV that it holds in all, by its own setting; None: that is not known."""
        size = getattr(self, self.size_variable.lower(), "")
        return None if self.url or not size else parse_size(size)

    @property
    def reuse_block(self) -> int:
        """Prompt tokens that are kept together: only whole ones are reused."""
        return 1

    @property
    def runs_server(self) -> bool:
        """Whether a KV server is started here."""
        return self.starts_server and not self.url

    @property
    def reach(self) -> str:
        """The host by which this machine's processes reach what listens on ``host``."""
        return WILDCARDS.get(self.host, self.host)

    @property
    def store_url(self) -> str:
        """Where the vLLM servers find the store."""
        return self.url or f"{self.name}://{authority(self.reach, self.port)}"

    def server(self) -> list[str]:
        """The KV server's command line, before ``{python}`` is filled in."""
        raise NotImplementedError

    def config(self, server: str) -> Path:
        """LMCache's settings file of a vLLM server."""
        return PACKAGE / "configs" / f"lmcache-config-{self.name}.yaml"

    def environment(self, server: str, environ: Mapping[str, str]) -> dict[str, str]:
        """What the environment of a vLLM server of this name needs; ``environ`` is the caller's, which wins."""
        return {
            "LMCACHE_CONFIG_FILE": environ.get("LMCACHE_CONFIG_FILE") or str(self.config(server)),
            "LMCACHE_REMOTE_URL": self.store_url,
        }

    def transfer_config(self, kv_role: str, name: str) -> dict[str, Any]:
        """The value of ``--kv-transfer-config``; ``name`` is unique to the server."""
        return {
            "kv_connector": self.connector,
            "kv_connector_module_path": self.kv_connector_module,
            "kv_role": kv_role,
            # A chunk that cannot be loaded is computed again; vLLM's default is to fail the request.
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": self.extra_config(name),
        }

    def extra_config(self, name: str) -> dict[str, Any]:
        """What LMCache's connector reads from it."""
        return {"discard_partial_chunks": False, "lmcache_rpc_port": name}

    def vllm_arguments(self) -> list[str]:
        """Further arguments of vLLM's engine."""
        return []


def plugin_environment(backend: Backend, server: str, environ: Mapping[str, str]) -> dict[str, str]:
    """For a store that LMCache knows as a plugin: its URL instead of LMCache's own."""
    values = Backend.environment(backend, server, environ)
    del values["LMCACHE_REMOTE_URL"]
    return {**values, f"DISAGG_{backend.name.upper()}_URL": backend.store_url}
