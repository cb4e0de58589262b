"""The proxy application: prefill, then decode, and everything else straight to the decode server."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI
from fastapi import Response as FastAPIResponse
from fastapi.responses import JSONResponse

from disagg_prefill_lmcache_v1.proxy import status
from disagg_prefill_lmcache_v1.proxy.access_log import AccessLog
from disagg_prefill_lmcache_v1.proxy.adapters import AdapterStage
from disagg_prefill_lmcache_v1.proxy.client_parser import ClientLimits
from disagg_prefill_lmcache_v1.proxy.decode import DecodeStage
from disagg_prefill_lmcache_v1.proxy.handler import RequestHandler
from disagg_prefill_lmcache_v1.proxy.kv_layouts import LayoutWatch
from disagg_prefill_lmcache_v1.proxy.members import file_stamp, read_members
from disagg_prefill_lmcache_v1.proxy.metrics import Metrics
from disagg_prefill_lmcache_v1.proxy.pool import DECODE, PREFILL, Pool
from disagg_prefill_lmcache_v1.proxy.prefill import PrefillStage
from disagg_prefill_lmcache_v1.proxy.prompt_meter import PromptMeter
from disagg_prefill_lmcache_v1.proxy.request import TraceMaker
from disagg_prefill_lmcache_v1.proxy.route_chooser import make_chooser
from disagg_prefill_lmcache_v1.proxy.settings import Settings
from disagg_prefill_lmcache_v1.proxy.upkeep import Upkeep


def create_app(
    settings: Settings, metrics: Metrics | None = None, access_log: AccessLog | None = None,
    tracing: TraceMaker | None = None,
) -> FastAPI:  # fmt: skip
    """The application; serve it with uvicorn and ``http=ClientConnection``.

    FastAPI answers the proxy's own routes. All others bypass it, which would cost more than the proxy itself: the
    connection calls the handler that the lifespan state gives it.
    """
    metrics = metrics or Metrics()

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
        handler, upkeep = _build(app, settings, metrics, access_log, tracing)
        limits = ClientLimits(
            settings.max_head_bytes, settings.max_body_bytes, settings.client_timeout_s, settings.stream_idle_timeout_s
        )
        upkeep.start()
        yield {"handler": handler.handle, "limits": limits}
        await upkeep.stop()
        # A signal ends the process right after this: nothing else would be run.
        for writer in (access_log, tracing):
            if writer is not None:
                writer.close()

    # The schema and its pages are the decode server's: clients talk to its routes.
    app = FastAPI(title="Disaggregated prefill proxy", lifespan=lifespan, openapi_url=None, docs_url=None)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> JSONResponse:
        found = {pool.role: await pool.health() for pool in app.state.pools}
        if settings.decode_only:
            del found[PREFILL]
        good = all(any(servers.values()) for servers in found.values())
        problems = app.state.layouts.told(*(pool.upstreams for pool in app.state.pools))
        return JSONResponse({"ready": good, "servers": found, **problems}, 200 if good else 503)

    @app.get("/metrics")
    async def show_metrics() -> FastAPIResponse:
        return FastAPIResponse(metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    if settings.status_page:
        page, headers = status.read_page()

        @app.get(status.PAGE)
        async def show_page() -> FastAPIResponse:
            return FastAPIResponse(page, media_type="text/html; charset=utf-8", headers=headers)

        @app.get(status.DATA)
        async def show_status() -> JSONResponse:
            return JSONResponse(
                status.snapshot(metrics, app.state.layouts.problems), headers={"cache-control": "no-store"}
            )

    return app


def _build(
    app: FastAPI, settings: Settings, metrics: Metrics, access_log: AccessLog | None, tracing: TraceMaker | None
) -> tuple[RequestHandler, Upkeep]:
    """Make the parts that serve requests in the running event loop, and the work in the background."""
    prefillers, decoders = settings.prefiller_urls, settings.decoder_urls
    stamp = (0, 0)
    if settings.upstreams_file:
        stamp = file_stamp(settings.upstreams_file)
        prefillers, decoders = read_members(settings.upstreams_file)
    pools = app.state.pools = (Pool(PREFILL, prefillers, settings, metrics), Pool(DECODE, decoders, settings, metrics))
    app.state.layouts = LayoutWatch()
    prefill = PrefillStage(settings, pools[0], metrics)
    chooser = make_chooser(settings, *pools, metrics)
    prompts = PromptMeter(chooser is not None, *pools)
    decode = DecodeStage(settings, pools[1], metrics, chooser)
    adapters = AdapterStage(pools, settings.prefill_timeout_s)
    own_route = functools.partial(_call, app)
    handler = RequestHandler(
        settings, metrics, access_log, prefill, decode, adapters, own_route, prompts, chooser, tracing
    )
    values = metrics.values
    upkeep = Upkeep(
        settings, *pools, finished=lambda: handler.finished,
        in_flight=lambda: values[prefill.in_flight] + values[decode.in_flight], stamp=stamp,
        layouts=app.state.layouts,
    )  # fmt: skip
    return handler, upkeep


async def _call(app: FastAPI, method: str, path: str) -> tuple[int, list[bytes], bytes]:
    """The application's answer to a request without a body: status, header lines, body."""
    messages: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        messages.append(message)

    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http",
        "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "headers": [],
        "server": None, "client": None,
    }  # fmt: skip
    await app(scope, receive, send)
    lines = [b"%b: %b\r\n" % field for field in messages[0]["headers"] if field[0] != b"content-length"]
    return messages[0]["status"], lines, b"".join(message.get("body", b"") for message in messages[1:])
