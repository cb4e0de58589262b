"""Servers that cannot share KV are told, and no prompt is prefilled for nothing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from proxy_harness import DEADLINE_S, ProxyProcess, Stack, stack, wait_until

from disagg_prefill_lmcache_v1.proxy.kv_layouts import mismatch

ONE = "ranks=1 reads=1 heads=8 head-size=64 dtype=float32 chunk=256"
TWO = ONE.replace("ranks=1 reads=1", "ranks=2 reads=2")
ONE_OF_TWO = ONE.replace("reads=1", "reads=2")


def server(layout: str, name: str = "http://there") -> Any:
    return SimpleNamespace(name=name, kv_layout=layout)


@pytest.mark.parametrize(
    ("prefill", "decode", "told"),
    [
        (ONE, ONE, ""),
        (TWO, TWO, ""),
        (TWO, ONE_OF_TWO, ""),
        ("", ONE, ""),
        (ONE, "", ""),
        (ONE, "ranks=1", ""),
        (TWO, ONE, "http://here has tensor parallel size 2, decode server http://there loads KV of servers of size 1"),
        (ONE, ONE_OF_TWO, "size 1, decode server http://there loads KV of servers of size 2"),
        (ONE, TWO, "size 1, decode server http://there loads KV of servers of size 2"),
        (ONE, ONE.replace("heads=8", "heads=4"), "KV heads 8, decode server http://there 4"),
        (ONE, ONE.replace("size=64", "size=128"), "head size 64, decode server http://there 128"),
        (ONE, ONE.replace("float32", "bfloat16"), "KV type float32, decode server http://there bfloat16"),
        (ONE, ONE.replace("256", "128"), "tokens a chunk 256, decode server http://there 128"),
        (ONE, "ranks=<script> reads=2\x00 nonsense", ""),
    ],
)
def test_what_is_compared(prefill: str, decode: str, told: str) -> None:
    found = mismatch(server(prefill, "http://here"), server(decode))
    assert told in found
    assert bool(found) == bool(told)


def ready(made: Stack) -> dict[str, Any]:
    return httpx.get(f"{made.url}/ready", timeout=DEADLINE_S).json()


def ask(made: Stack) -> httpx.Response:
    return httpx.post(f"{made.url}/v1/completions", json={"prompt": "x"}, timeout=DEADLINE_S)


def prefills(made: Stack) -> int:
    return sum(request["method"] == "POST" for request in made.prefill.requests)


def test_servers_of_different_sizes_are_told_everywhere_and_decode_answers_alone() -> None:
    with stack("--status-page", prefill=f"layout={TWO}", decode=f"layout={ONE}") as made:
        (problem,) = wait_until(lambda: ready(made).get("problems"), "both layouts are known")
        assert f"prefill server http://127.0.0.1:{made.prefill_port} has tensor parallel size 2" in problem
        assert f"decode server http://127.0.0.1:{made.decode_port} loads KV of servers of size 1" in problem
        assert ready(made)["ready"] is True
        for _ in range(3):
            assert ask(made).status_code == 200
        assert prefills(made) == 0
        assert httpx.get(f"{made.url}/status.json").json()["problems"] == [problem]
        wait_until(lambda: "\ndisagg_kv_degraded 1.0" in httpx.get(f"{made.url}/metrics").text, "the gauge shows it")
        assert sum(problem in line and "decoding without" not in line for line in made.proxy.messages) == 1

        made.decode.behaviour["layout"] = ONE_OF_TWO  # started anew
        wait_until(lambda: "problems" not in ready(made), "they fit")
        assert ask(made).status_code == 200
        assert prefills(made) == 1
        wait_until(lambda: "\ndisagg_kv_degraded 0.0" in httpx.get(f"{made.url}/metrics").text, "the gauge shows it")


def test_a_failed_prefill_that_is_to_fail_says_why() -> None:
    with stack("--prefill-failure", "fail", prefill=f"layout={TWO}", decode=f"layout={ONE}") as made:
        wait_until(lambda: ready(made).get("problems"), "both layouts are known")
        assert ask(made).status_code == 503
        assert prefills(made) == 0


def test_of_several_prefill_servers_those_that_fit_are_asked() -> None:
    with stack(prefill=f"layout={TWO}", decode=f"layout={ONE}") as made:
        wait_until(lambda: ready(made).get("problems"), "both layouts are known")
        port, other = made.mocks.add("prefill", f"layout={ONE}")
        flags = ("--prefiller", f"http://127.0.0.1:{made.prefill_port}", "--prefiller", f"http://127.0.0.1:{port}")
        proxy = ProxyProcess(*flags, "--decoder", f"http://127.0.0.1:{made.decode_port}")
        try:
            wait_until(lambda: httpx.get(f"{proxy.url}/ready").json().get("problems"), "all layouts are known")
            for _ in range(4):
                assert httpx.post(f"{proxy.url}/v1/completions", json={"prompt": "x"}).status_code == 200
            assert (prefills(made), sum(r["method"] == "POST" for r in other.requests)) == (0, 4)
        finally:
            proxy.stop()


def test_layouts_that_fit_or_are_not_told_change_nothing() -> None:
    for prefill, decode in ((ONE, ONE), ("", "")):
        with stack(prefill=f"layout={prefill}", decode=f"layout={decode}") as made:
            assert "problems" not in ready(made)
            assert ask(made).status_code == 200
            assert prefills(made) == 1
