"""Redis, without persistence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from disagg_prefill_lmcache_v1.launch.backends.base import SECRET_FILE, Backend, memory_size
from disagg_prefill_lmcache_v1.same_user import SECRET_VARIABLE
from disagg_prefill_lmcache_v1.settings import setting

SOCKET_PATH_LIMIT = 100  # bytes; the kernel takes 107


@dataclass(frozen=True)
class Redis(Backend):
    name: ClassVar[str] = "redis"
    default_port: ClassVar[int] = 8379
    size_variable: ClassVar[str] = "REDIS_MAXMEMORY"
    takes_per_s: ClassVar[float | None] = 2.0e9
    title: ClassVar[str] = "Redis"
    schemes: ClassVar[tuple[str, ...]] = ("redis", "rediss")
    local: ClassVar[bool] = True  # what other machines use should have a password and TLS: a Redis of their own
    program_variable: ClassVar[str] = "REDIS_SERVER_PROGRAM"

    redis_server_program: str = setting("redis-server", "words that start Redis", flag=False)
    redis_maxmemory: str = memory_size("memory of Redis; then it forgets what was not used for longest")
    redis_args: str = setting("", "further words of Redis's command line", flag=False, shown="the device's")

    @property
    def socket(self) -> str:
        """Where the Redis that is started here listens besides its port: a Unix socket costs less than TCP.

        "" where the path would be longer than the kernel takes.
        """
        path = str(self.run_dir / f"redis-{self.port}.sock")
        return path if self.runs_server and len(path.encode()) < SOCKET_PATH_LIMIT else ""

    @property
    def secret_file(self) -> Path | None:
        """Configuration of the Redis that is started here, with its password: no argument list shows that."""
        return self.run_dir / SECRET_FILE if self.runs_server else None

    def server(self) -> list[str]:
        words = [*self.redis_server_program.split(), str(self.secret_file)]
        words += ["--bind", self.host, "--port", str(self.port), "--save", ""]
        words += ["--appendonly", "no", "--maxmemory", self.redis_maxmemory, "--maxmemory-policy", "allkeys-lru"]
        words += ["--unixsocket", self.socket, "--unixsocketperm", "700"] if self.socket else []
        return words + self.redis_args.split()

    def environment(self, server: str, environ: Mapping[str, str]) -> dict[str, str]:
        values = super().environment(server, environ)
        if self.secret_file:
            values[SECRET_VARIABLE] = str(self.secret_file)
        return {**values, "DISAGG_REDIS_SOCKET": self.socket} if self.socket else values
