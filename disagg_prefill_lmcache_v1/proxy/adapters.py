"""vLLM's routes that load and unload LoRA adapters at run time: they reach every server of both pools, or none.

An adapter that only some servers have would be answered by some requests and refused by others.
"""

from __future__ import annotations

import asyncio

import msgspec

from disagg_prefill_lmcache_v1.proxy.answers import pass_on
from disagg_prefill_lmcache_v1.proxy.client_request import ClientRequest
from disagg_prefill_lmcache_v1.proxy.errors import ProxyError
from disagg_prefill_lmcache_v1.proxy.health import Upstream
from disagg_prefill_lmcache_v1.proxy.pool import Pool
from disagg_prefill_lmcache_v1.proxy.request import RequestContext
from disagg_prefill_lmcache_v1.proxy.upstream import Limits, Response, UpstreamError

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


class AdapterStage:
    """Sends a request to all servers of both pools."""

    def __init__(self, pools: tuple[Pool, Pool], timeout_s: float) -> None:
        self._pools = pools
        self._limits = Limits(whole_s=timeout_s)

    async def run(self, client: ClientRequest, request: RequestContext, body: bytes) -> None:
        """Answer with a decode server's answer, or with the first failure. Raises ProxyError."""
        request.stage = "decode"
        servers = [upstream for pool in self._pools for upstream in pool.upstreams]
        answers = await asyncio.gather(*(self._ask(server, request, request.path, body) for server in servers))
        failures = [answer for answer in answers if isinstance(answer, UpstreamError) or answer.status != 200]
        if failures and request.path == LOAD:
            loaded = [server for server, a in zip(servers, answers, strict=True) if a not in failures]
            await self._take_back(loaded, request, body)
        failure = failures[0] if failures else answers[-1]
        if isinstance(failure, UpstreamError):
            number = f"{len(failures)} of {len(servers)} servers"
            raise ProxyError(503, f"{number} did not take the adapter", "decode", "refused", str(failure))
        pass_on(client, request, failure)

    async def _take_back(self, loaded: list[Upstream], request: RequestContext, body: bytes) -> None:
        """Unload what was loaded, so that no server has what another has not."""
        try:
            name = msgspec.json.decode(body).get("lora_name")
        except (msgspec.DecodeError, AttributeError):
            return
        undo = msgspec.json.encode({"lora_name": name})
        await asyncio.gather(*(self._ask(server, request, UNLOAD, undo) for server in loaded))

    async def _ask(self, server: Upstream, request: RequestContext, path: str, body: bytes) -> Response | UpstreamError:
        head = b"POST %b HTTP/1.1\r\n%b%bcontent-length: %d\r\n\r\n" % (
            path.encode(), server.host_line, request.headers, len(body),
        )  # fmt: skip
        try:
            response = await server.client.request(head + body, limits=self._limits)
        except UpstreamError as error:
            return error
        if not response.complete:
            response.connection.abort()
        return response
