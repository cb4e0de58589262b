"""What a server tells of how its KV is stored."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("lmcache", reason="LMCache is not installed: its configuration is what is told")

from disagg_prefill_lmcache_v1.kv import tell_layout
from disagg_prefill_lmcache_v1.kv.tell_layout import HEADER, IN_PROCESS, MULTI_PROCESS, TellLayout, layout_of


def config(connector=IN_PROCESS, ranks=2, cache_dtype="auto"):
    return SimpleNamespace(
        kv_transfer_config=SimpleNamespace(kv_connector=connector) if connector else None,
        model_config=SimpleNamespace(
            get_total_num_kv_heads=lambda: 8, get_head_size=lambda: 64, dtype=torch.bfloat16
        ),
        cache_config=SimpleNamespace(cache_dtype=cache_dtype, block_size=32),
        parallel_config=SimpleNamespace(tensor_parallel_size=ranks),
    )  # fmt: skip


async def engine(scope, receive, send):
    headers = [(b"server", b"mock")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"ok"})


def ask(path, vllm_config, kind="http"):
    sent = []

    async def send(message):
        sent.append(message)

    app = SimpleNamespace(state=SimpleNamespace(vllm_config=vllm_config) if vllm_config else SimpleNamespace())
    scope = {"type": kind, "path": path, "app": app}
    asyncio.run(TellLayout(engine)(scope, None, send))
    return dict(sent[0]["headers"]).get(HEADER, b"").decode(), sent


@pytest.fixture(autouse=True)
def chunk(monkeypatch):
    monkeypatch.setattr(tell_layout, "_chunk_size", lambda: 256)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (config(), "ranks=2 reads=2 heads=8 head-size=64 dtype=bfloat16 chunk=256"),
        (config(ranks=1, cache_dtype="fp8"), "ranks=1 reads=1 heads=8 head-size=64 dtype=fp8 chunk=256"),
        (config(MULTI_PROCESS), "ranks=2 reads=2 heads=8 head-size=64 dtype=bfloat16 chunk=32"),
        (config("NixlConnector"), ""),
        (config(None), ""),
    ],
)
def test_what_is_told(given, told):
    assert layout_of(given) == told
    assert ask("/health", given)[0] == told


def test_with_health_alone():
    assert ask("/v1/completions", config())[0] == ""
    assert ask("/health", config(), kind="websocket")[0] == ""


def test_health_is_answered_whatever_cannot_be_told():
    told, sent = ask("/health", None)
    assert told == ""
    assert (sent[0]["status"], sent[1]["body"]) == (200, b"ok")


def test_the_names_are_those_of_the_connectors():
    pytest.importorskip("vllm", reason="vLLM is not installed: the connectors cannot be imported")
    from disagg_prefill_lmcache_v1.kv import connector, mp

    assert (connector.LMCacheDisaggConnectorV1.__name__, mp.LMCacheDisaggMPConnector.__name__) == (
        IN_PROCESS, MULTI_PROCESS,
    )  # fmt: skip
