"""Peer to peer by NIXL: no KV server, the prefiller writes into the decoder's memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from disagg_prefill_lmcache_v1.launch.backends.base import Backend, memory_size, plugin_environment
from disagg_prefill_lmcache_v1.launch.profiles import PACKAGE
from disagg_prefill_lmcache_v1.settings import setting


@dataclass(frozen=True)
class Nixl(Backend):
    name: ClassVar[str] = "nixl"
    default_port: ClassVar[int] = 8500
    title: ClassVar[str] = "peer to peer"
    starts_server: ClassVar[bool] = False
    modules: ClassVar[tuple[str, ...]] = ("nixl|nixl_cu12|nixl_cu13",)
    imported: ClassVar[tuple[str, ...]] = ("nixl._api|nixl_cu12._api|nixl_cu13._api",)
    decoder_first: ClassVar[bool] = True  # the prefiller waits for it
    clears: ClassVar[tuple[str, ...]] = ("LMCACHE_REMOTE_URL",)  # LMCache would use that store too

    kv_nixl_size: str = memory_size("memory of each rank of the decoder for chunks on their way")
    # Both servers are on this machine.
    ucx_net_devices: str = setting("lo", "network devices of UCX, NIXL's transport; all: any", flag=False)

    @property
    def ports(self) -> int:
        return self.ranks

    def config(self, role: str) -> Path:
        return PACKAGE / "configs" / f"lmcache-{role}-config.yaml"

    def environment(self, role: str, environ: Mapping[str, str]) -> dict[str, str]:
        values = {**plugin_environment(self, role, environ), "UCX_NET_DEVICES": self.ucx_net_devices}
        return {**values, "KV_NIXL_SIZE": self.kv_nixl_size} if role == "decoder" else values
