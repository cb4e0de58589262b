"""Peer to peer by NIXL: no KV server, the prefiller writes into the memory of the decoder that a request goes to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
from urllib.parse import urlsplit

from disagg_prefill_lmcache_v1.launch.backends.base import (
    SECRET_FILE,
    Backend,
    memory_size,
    number_of,
    plugin_environment,
    role_of,
)
from disagg_prefill_lmcache_v1.launch.profiles import PACKAGE
from disagg_prefill_lmcache_v1.same_user import SECRET_VARIABLE
from disagg_prefill_lmcache_v1.settings import authority, is_loopback, setting


@dataclass(frozen=True)
class Nixl(Backend):
    name: ClassVar[str] = "nixl"
    default_port: ClassVar[int] = 8500
    size_variable: ClassVar[str] = "KV_NIXL_SIZE"
    title: ClassVar[str] = "peer to peer"
    schemes: ClassVar[tuple[str, ...]] = ("nixl",)
    starts_server: ClassVar[bool] = False
    modules: ClassVar[tuple[str, ...]] = ("nixl|nixl_cu12|nixl_cu13",)
    imported: ClassVar[tuple[str, ...]] = ("nixl._api|nixl_cu12._api|nixl_cu13._api",)
    decoder_first: ClassVar[bool] = True  # the prefiller waits for it
    clears: ClassVar[tuple[str, ...]] = ("LMCACHE_REMOTE_URL",)  # LMCache would use that store too

    kv_nixl_size: str = memory_size("memory of each rank of the decoder for chunks on their way")
    ucx_net_devices: str = setting(
        "", "network devices of UCX, NIXL's transport; all: any", flag=False, shown="lo; all beyond this machine"
    )

    @property
    def ports(self) -> int:
        return self.ranks * self.decoders

    @property
    def capacity(self) -> int | None:
        each = super().capacity
        return each and each * self.ranks * self.decoders

    @property
    def secret_file(self) -> Path:
        """Both sides prove to each other that they know it."""
        return self.run_dir / SECRET_FILE

    def config(self, server: str) -> Path:
        return PACKAGE / "configs" / f"lmcache-{role_of(server)}-config.yaml"

    def environment(self, server: str, environ: Mapping[str, str]) -> dict[str, str]:
        values = plugin_environment(self, server, environ)
        # the caller's own, for servers on several machines
        values[SECRET_VARIABLE] = environ.get(SECRET_VARIABLE) or str(self.secret_file)
        alone = is_loopback(self.host) and (not self.url or is_loopback(urlsplit(self.url).hostname or ""))
        values["UCX_NET_DEVICES"] = self.ucx_net_devices or ("lo" if alone else "all")
        if role_of(server) == "decoder":
            port = self.port + number_of(server) * self.ranks
            values |= {"DISAGG_NIXL_URL": f"nixl://{authority(self.host, port)}", "KV_NIXL_SIZE": self.kv_nixl_size}
        return values
