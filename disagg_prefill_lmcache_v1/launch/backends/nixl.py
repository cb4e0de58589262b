"""Peer to peer by vLLM's NixlConnector: no KV server, the decoder of a request fetches its KV from the prefiller."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from disagg_prefill_lmcache_v1.launch.backends.base import Backend, number_of, role_of
from disagg_prefill_lmcache_v1.launch.profiles import PACKAGE
from disagg_prefill_lmcache_v1.settings import is_loopback, setting


@dataclass(frozen=True)
class Nixl(Backend):
    name: ClassVar[str] = "nixl"
    default_port: ClassVar[int] = 8500
    title: ClassVar[str] = "peer to peer"
    starts_server: ClassVar[bool] = False
    hands_over: ClassVar[bool] = True
    modules: ClassVar[tuple[str, ...]] = ("nixl|nixl_cu12|nixl_cu13",)
    imported: ClassVar[tuple[str, ...]] = ("nixl._api|nixl_cu12._api|nixl_cu13._api",)
    connector: ClassVar[str] = "NixlConnector"
    # They are LMCache's.
    clears: ClassVar[tuple[str, ...]] = ("LMCACHE_REMOTE_URL", "LMCACHE_CONFIG_FILE")

    kv_connector_module: str = setting(
        "disagg_prefill_lmcache_v1.kv.nixl", "module of the connector class in both vLLM servers", flag=False
    )
    ucx_net_devices: str = setting(
        "", "network devices of UCX, NIXL's transport; all: any", flag=False, shown="lo; all beyond this machine"
    )

    @property
    def ports(self) -> int:
        return self.prefillers + self.decoders

    @property
    def store_url(self) -> str:
        return f"{self.name}://{self.reach}"

    def port_of(self, server: str) -> int:
        """Where a server tells others how to reach its memory: prefillers first, then decoders."""
        return self.port + number_of(server) + (self.prefillers if role_of(server) == "decoder" else 0)

    def config(self, server: str) -> Path:
        return PACKAGE / "configs" / f"lmcache-{role_of(server)}-config.yaml"

    def environment(self, server: str, environ: Mapping[str, str]) -> dict[str, str]:
        return {
            "DISAGG_NIXL_CONFIG_FILE": environ.get("DISAGG_NIXL_CONFIG_FILE") or str(self.config(server)),
            "UCX_NET_DEVICES": self.ucx_net_devices or ("lo" if is_loopback(self.host) else "all"),
            # vLLM listens there and tells it to the other side; the caller's own, where a host has several names.
            "VLLM_NIXL_SIDE_CHANNEL_HOST": environ.get("VLLM_NIXL_SIDE_CHANNEL_HOST") or self.side_host,
            "VLLM_NIXL_SIDE_CHANNEL_PORT": str(self.port_of(server)),
        }

    @property
    def side_host(self) -> str:
        """The host of this machine that others know."""
        return self.advertise_host or self.host

    def extra_config(self, name: str) -> dict[str, Any]:
        return {}
