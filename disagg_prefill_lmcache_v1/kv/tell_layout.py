"""Tells the proxy how a vLLM server's KV is stored, so that servers that cannot share it are noticed at once.

An ASGI middleware (``vllm serve --middleware``) of both servers. ``GET /health``, which the proxy asks anyway, gets

    x-kv-layout: ranks=2 reads=2 heads=8 head-size=64 dtype=float32 chunk=256

``ranks`` is the tensor parallel size, ``reads`` that of the servers whose KV this one loads, ``heads`` are KV heads of
the model, ``chunk`` tokens are stored together. All of them go into the keys of KV chunks: where they differ nothing is
ever found, and every prompt is computed twice without an error. Servers with another connector say nothing.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from lmcache.logging import init_logger

logger = init_logger(__name__)

PATH = "/health"
HEADER = b"x-kv-layout"
IN_PROCESS, MULTI_PROCESS = "LMCacheDisaggConnectorV1", "LMCacheDisaggMPConnector"

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
Receive = Callable[[], Awaitable[Message]]


class TellLayout:
    """See the module's text."""

    def __init__(self, app: Callable[[Message, Receive, Send], Awaitable[None]]) -> None:
        self._app = app
        self._line: list[tuple[bytes, bytes]] | None = None

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != PATH:
            await self._app(scope, receive, send)
            return
        if self._line is None:
            self._line = self._make_line(scope)

        async def tell(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *self._line]}
            await send(message)

        await self._app(scope, receive, tell)

    @staticmethod
    def _make_line(scope: Message) -> list[tuple[bytes, bytes]]:
        try:
            # vLLM leaves it there for its own routes
            text = layout_of(scope["app"].state.vllm_config)
        except Exception as error:  # whatever has moved in vLLM must not take its health check along
            logger.warning("The proxy is not told how KV is stored: %s: %s", type(error).__name__, error)
            text = ""
        return [(HEADER, text.encode())] if text else []


def layout_of(vllm_config: Any) -> str:
    """The header's value, "" for a server without one of this project's connectors."""
    transfer = vllm_config.kv_transfer_config
    name = transfer.kv_connector if transfer is not None else ""
    if name not in (IN_PROCESS, MULTI_PROCESS):
        return ""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    ranks = vllm_config.parallel_config.tensor_parallel_size
    dtype = str(cache.cache_dtype)
    fields = {
        "ranks": ranks,
        "reads": ranks,
        "heads": model.get_total_num_kv_heads(),
        "head-size": model.get_head_size(),
        "dtype": str(model.dtype).removeprefix("torch.") if dtype == "auto" else dtype,
        "chunk": cache.block_size if name == MULTI_PROCESS else _chunk_size(),
    }
    return " ".join(f"{key}={value}" for key, value in fields.items())


def _chunk_size() -> int:
    from lmcache.integration.vllm.utils import lmcache_get_or_create_config

    return lmcache_get_or_create_config().chunk_size
