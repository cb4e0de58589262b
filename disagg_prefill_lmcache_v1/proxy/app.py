"""The proxy application: prefill, then decode, and everything else straight to the decode server."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI
from fastapi import Response as FastAPIResponse
from fastapi.responses import JSONResponse

from disagg_prefill_lmcache_v1.proxy.access_log import AccessLog
from disagg_prefill_lmcache_v1.proxy.client import ClientProtocol, ClientRequest
from disagg_prefill_lmcache_v1.proxy.decode import DecodeStage
from disagg_prefill_lmcache_v1.proxy.handler import RequestHandler
from disagg_prefill_lmcache_v1.proxy.metrics import Metrics
from disagg_prefill_lmcache_v1.proxy.pool import DECODE, PREFILL, Pool, file_stamp, read_members
from disagg_prefill_lmcache_v1.proxy.prefill import PrefillStage
from disagg_prefill_lmcache_v1.proxy.settings import Settings
from disagg_prefill_lmcache_v1.proxy.upkeep import Upkeep

OWN_PATHS = frozenset({"/health", "/ready", "/metrics"})


class ProxyApp(FastAPI):
    """FastAPI application whose proxied routes bypass the framework: it would cost more than the proxy itself."""

    handler: RequestHandler
    pools: tuple[Pool, Pool]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"] not in OWN_PATHS:
            method = scope["method"]
            client = ClientRequest.of_asgi(receive, method == "HEAD")
            target = scope["raw_path"] + (b"?" + scope["query_string"] if scope["query_string"] else b"")
            headers = [(name, value, b"%b: %b\r\n" % (name, value)) for name, value in scope["headers"]]
            await self.handler.handle(client, method, scope["path"], target, headers)
        else:
            await super().__call__(scope, receive, send)


def create_app(settings: Settings, metrics: Metrics | None = None, access_log: AccessLog | None = None) -> ProxyApp:
    """The application; serve it with uvicorn and ``http=ClientProtocol``."""
    metrics = metrics or Metrics()

    @contextlib.asynccontextmanager
    async def lifespan(app: ProxyApp) -> AsyncIterator[None]:
        upkeep = _build(app, settings, metrics, access_log)
        ClientProtocol.own_paths = OWN_PATHS
        upkeep.start()
        yield
        await upkeep.stop()

    # The schema and its pages are the decode server's: clients talk to its routes.
    app = ProxyApp(title="Disaggregated prefill proxy", lifespan=lifespan, openapi_url=None, docs_url=None)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> JSONResponse:
        found: dict[str, dict[str, bool]] = {}
        for pool in app.pools:
            members = pool.upstreams
            results = await asyncio.gather(*(pool.check(member) for member in members))
            found[pool.role] = {member.name: up for member, up in zip(members, results, strict=True)}
        good = all(any(servers.values()) for servers in found.values())
        return JSONResponse({"ready": good, "servers": found}, 200 if good else 503)

    @app.get("/metrics")
    async def show_metrics() -> FastAPIResponse:
        return FastAPIResponse(metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return app


def _build(app: ProxyApp, settings: Settings, metrics: Metrics, access_log: AccessLog | None) -> Upkeep:
    """Make the parts that serve requests in the running event loop; returns the background work."""
    prefillers, decoders = settings.prefiller_urls, settings.decoder_urls
    stamp = (0, 0)
    if settings.upstreams_file:
        stamp = file_stamp(settings.upstreams_file)
        prefillers, decoders = read_members(settings.upstreams_file)
    pools = app.pools = (Pool(PREFILL, prefillers, settings, metrics), Pool(DECODE, decoders, settings, metrics))
    prefill = PrefillStage(settings, pools[0], metrics)
    decode = DecodeStage(settings, pools[1], metrics)
    handler = app.handler = RequestHandler(settings, metrics, access_log, prefill, decode)
    values = metrics.values
    return Upkeep(
        settings, *pools, finished=lambda: handler.finished,
        in_flight=lambda: values[prefill.in_flight] + values[decode.in_flight], stamp=stamp,
    )  # fmt: skip
