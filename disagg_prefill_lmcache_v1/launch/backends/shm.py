"""A store in this machine's shared memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from disagg_prefill_lmcache_v1.launch.backends.base import Backend, memory_size, plugin_environment
from disagg_prefill_lmcache_v1.settings import setting


@dataclass(frozen=True)
class Shm(Backend):
    name: ClassVar[str] = "shm"
    size_variable: ClassVar[str] = "KV_SHM_SIZE"
    title: ClassVar[str] = "shared memory"
    schemes: ClassVar[tuple[str, ...]] = ("shm",)
    clears: ClassVar[tuple[str, ...]] = ("LMCACHE_REMOTE_URL",)  # LMCache would use that store too
    local: ClassVar[bool] = True
    program_variable: ClassVar[str] = "KV_SHM_SERVER_PROGRAM"

    kv_shm_server_program: str = setting(
        "{python} -m disagg_prefill_lmcache_v1.kv.stores.shm_server", "words that start the store's server", flag=False
    )
    kv_shm_size: str = memory_size("shared memory of the store")

    @property
    def address(self) -> str:
        return str(self.run_dir / "kv_store.sock")

    @property
    def store_url(self) -> str:
        return self.url or f"shm://{self.address}"

    def server(self) -> list[str]:
        return [*self.kv_shm_server_program.split(), self.address, "--size", self.kv_shm_size]

    def environment(self, server: str, environ: Mapping[str, str]) -> dict[str, str]:
        return plugin_environment(self, server, environ)
