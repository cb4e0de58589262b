"""What ``export`` can be told beside the flags of the example."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from disagg_prefill_lmcache_v1.launch.settings import Settings
from disagg_prefill_lmcache_v1.settings import setting

NAME = {"pattern": r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", "allowed": "small letters, digits and -, at most 63"}
IMAGE = {"pattern": r"[A-Za-z0-9][\w./:@-]*", "allowed": "an image, as in registry.example/name:tag"}
ROOT = "/opt/disagg-prefill-lmcache-v1"


@dataclass(frozen=True)
class FileSettings:
    """Of the files alone."""

    output: Path | None = setting(None, "folder that the files are written to", kind="path")
    root: str = setting(
        ROOT, "where this repository lies on the machine or in the image", pattern=r"/[\w./-]*\w", allowed="a path"
    )
    namespace: str = setting("disagg-prefill", "Kubernetes namespace", **NAME)
    proxy_image: str = setting("disagg-prefill-proxy:latest", "image of deploy/containers/proxy.Containerfile", **IMAGE)
    server_image: str = setting(
        "", "image of deploy/containers/server.Containerfile", shown="disagg-prefill-server:DEVICE", **IMAGE
    )
    redis_image: str = setting("redis:7.4", "image that has redis-server", **IMAGE)
    drain_settle: int = setting(
        40, "Kubernetes: seconds until no proxy sends new requests to a server that stops (the name's TTL and 5 s)",
        low=0, high=3600,
    )  # fmt: skip
    drain_limit: int = setting(600, "longest time that requests in progress get when a server stops", low=0, high=86400)


@dataclass(frozen=True)
class ExportSettings(Settings, FileSettings):
    """All of them."""
