"""Run-time LoRA routes reach every server of both pools, or none."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from proxy_harness import DEADLINE_S, dead_port, stack

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
BODY = {"lora_name": "a", "lora_path": "/adapters/a"}


def post(made: Any, path: str, mock: str = "", body: Any = BODY) -> httpx.Response:
    headers = {"content-type": "application/json", **({"x-mock": mock} if mock else {})}
    return httpx.post(made.url + path, content=json.dumps(body), headers=headers, timeout=DEADLINE_S)


def asked(state: Any) -> list[tuple[str, Any]]:
    """Adapter routes that a mock was asked for, with their bodies."""
    return [(r["path"], json.loads(r["body"])) for r in list(state.requests) if r["path"] in (LOAD, UNLOAD)]


@pytest.mark.parametrize("path", [LOAD, UNLOAD])
def test_they_reach_both_pools(path: str) -> None:
    with stack() as made:
        assert post(made, path).status_code == 200
        assert asked(made.prefill) == asked(made.decode) == [(path, BODY)]


@pytest.mark.parametrize(("bad", "good"), [("prefill", "decode"), ("decode", "prefill")])
def test_what_one_refuses_no_other_keeps(bad: str, good: str) -> None:
    with stack() as made:
        response = post(made, LOAD, f"{bad}.status=400")
        assert (response.status_code, response.json()["error"]["message"]) == (400, "mock status 400")
        assert asked(getattr(made, good)) == [(LOAD, BODY), (UNLOAD, {"lora_name": "a"})]
        assert asked(getattr(made, bad)) == [(LOAD, BODY)]


def test_a_server_that_is_gone_is_told_and_the_others_are_as_before() -> None:
    with stack("--prefiller", f"http://127.0.0.1:{dead_port()}") as made:
        response = post(made, LOAD)
        assert response.status_code == 503
        assert "of 2 servers did not take the adapter" in response.json()["error"]["message"]
        assert asked(made.decode) == [(LOAD, BODY), (UNLOAD, {"lora_name": "a"})]


@pytest.mark.parametrize("body", [[], "a", 5])
def test_a_body_that_names_no_adapter_is_what_the_servers_say(body: Any) -> None:
    with stack() as made:
        assert post(made, LOAD, "decode.status=422", body).status_code == 422
