"""LMCache's multi-process mode: one cache server for all engines of the machine."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar
from urllib.parse import urlsplit

from disagg_prefill_lmcache_v1.launch.backends.base import Backend, memory_size
from disagg_prefill_lmcache_v1.settings import setting


@dataclass(frozen=True)
class Mp(Backend):
    name: ClassVar[str] = "mp"
    default_port: ClassVar[int] = 8600
    size_variable: ClassVar[str] = "KV_MP_SIZE"
    title: ClassVar[str] = "LMCache's multi-process server"
    schemes: ClassVar[tuple[str, ...]] = ("mp",)
    connector: ClassVar[str] = "LMCacheDisaggMPConnector"
    # They are the in-process LMCache's.
    clears: ClassVar[tuple[str, ...]] = ("LMCACHE_REMOTE_URL", "LMCACHE_CONFIG_FILE")
    local: ClassVar[bool] = True
    program_variable: ClassVar[str] = "KV_MP_SERVER_PROGRAM"

    kv_connector_module: str = setting(
        "disagg_prefill_lmcache_v1.kv.mp", "module of the connector class in both vLLM servers", flag=False
    )
    kv_mp_server_program: str = setting(
        "{python} -m disagg_prefill_lmcache_v1.kv.mp_server", "words that start LMCache's server", flag=False
    )
    kv_mp_size: str = memory_size("memory of the KV server; then it evicts what was not used for longest")
    kv_mp_redis: str = setting(
        "", "HOST:PORT of a Redis that is its second tier; the password in LMCACHE_RESP_PASSWORD", flag=False,
        pattern=r"[^\s:]+:[0-9]{1,5}", allowed="HOST:PORT",
    )  # fmt: skip
    kv_mp_args: str = setting("", "further words of its command line", flag=False)
    # The unit of reuse: at most so many tokens of a prompt are computed again.
    kv_mp_block_size: int = setting(
        None, "tokens of a KV block and of a chunk", kind="whole", flag=False, low=1, high=4096, shown="the device's"
    )
    kv_mp_timeout: float = setting(
        10.0, "seconds that the KV server gets for an answer, then what it was asked for is computed", flag=False,
        above=0, high=3600,
    )  # fmt: skip

    @property
    def reuse_block(self) -> int:
        return self.kv_mp_block_size

    def server(self) -> list[str]:
        words = [*self.kv_mp_server_program.split(), self.host, str(self.port), "--size", self.kv_mp_size]
        words += ["--chunk-size", str(self.kv_mp_block_size)]
        words += ["--redis", self.kv_mp_redis] if self.kv_mp_redis else []
        return words + shlex.split(self.kv_mp_args)

    def environment(self, server: str, environ: Mapping[str, str]) -> dict[str, str]:
        return {}

    def vllm_arguments(self) -> list[str]:
        return ["--block-size", str(self.kv_mp_block_size)]

    def extra_config(self, name: str) -> dict[str, Any]:
        address = urlsplit(self.store_url)
        return {
            "lmcache.mp.host": f"tcp://{address.hostname}",
            "lmcache.mp.port": address.port,
            "lmcache.mp.mq_timeout": self.kv_mp_timeout,
        }
