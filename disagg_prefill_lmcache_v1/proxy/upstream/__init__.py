"""The proxy's side towards the servers: a fast, strict HTTP/1.1 client."""

from disagg_prefill_lmcache_v1.proxy.upstream.client import Client
from disagg_prefill_lmcache_v1.proxy.upstream.connection import Connection, Limits
from disagg_prefill_lmcache_v1.proxy.upstream.errors import UpstreamError
from disagg_prefill_lmcache_v1.proxy.upstream.response import Relay, Response

__all__ = ["Client", "Connection", "Limits", "Relay", "Response", "UpstreamError"]
