"""LMCache's own server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from disagg_prefill_lmcache_v1.launch.backends.base import Backend
from disagg_prefill_lmcache_v1.memory import available_memory
from disagg_prefill_lmcache_v1.settings import setting


@dataclass(frozen=True)
class Lm(Backend):
    name: ClassVar[str] = "lm"
    default_port: ClassVar[int] = 8300
    size_variable: ClassVar[str] = "KV_LM_SIZE"
    takes_per_s: ClassVar[float | None] = 1.2e9
    title: ClassVar[str] = "LMCache's own server"
    schemes: ClassVar[tuple[str, ...]] = ("lm",)
    program_variable: ClassVar[str] = "KV_SERVER_PROGRAM"

    kv_server_program: str = setting(
        "{python} -m disagg_prefill_lmcache_v1.kv.stores.lm_server", "words that start the lm:// server", flag=False
    )
    kv_lm_size: str = setting(
        "",
        "memory of the lm:// server; then it forgets what was not used for longest",
        flag=False,
        shown="4/5 of what is free",
    )

    @property
    def capacity(self) -> int | None:
        if self.url or self.kv_lm_size:
            return super().capacity
        return available_memory() * 4 // 5  # as the server says

    def server(self) -> list[str]:
        return [*self.kv_server_program.split(), self.host, str(self.port)]
