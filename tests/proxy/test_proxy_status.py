"""The live status page, in a browser before the proxy and mock servers that are under load."""

from __future__ import annotations

import concurrent.futures
import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from browser import WIDTH, brightness, chromium, colours_in, page_of
from proxy_harness import DEADLINE_S, Stack, dead_port, stack, wait_until

from disagg_prefill_lmcache_v1.proxy.timing import PARTS

PREFILL = "delay=0.02;timing=queue=2.00,prefill=10.00,hold=5.00"
DECODE = "delay=0.02;chunks=5;gap=0.01;timing=queue=1.00,first-step=6.00,load=8.00;told=3"
KEY = "sesame"


@contextlib.contextmanager
def load(made: Stack, **headers: str) -> Iterator[None]:
    """Streamed requests, four at a time, until the block ends; every eighth is refused by the mock."""
    end = threading.Event()
    body = {"prompt": "hello", "stream": True, "stream_options": {"include_usage": True}}

    def ask(number: int) -> None:
        with httpx.Client(timeout=DEADLINE_S) as client:
            while not end.is_set():
                number += 1
                mock = {"x-mock": "decode.status=429"} if number % 8 == 0 else {}
                client.post(f"{made.url}/v1/completions", json=body, headers={**headers, **mock})

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        running = [pool.submit(ask, number) for number in range(4)]
        try:
            yield
        finally:
            end.set()
    for each in running:
        each.result()


@pytest.fixture(scope="module")
def browser():
    with chromium() as made:
        yield made


def number_in(page, name: str) -> float:
    return float(page.inner_text(f"#{name}").split()[0].replace(",", ""))


SHOWN = (
    "name => { const n = parseFloat(document.getElementById(name).textContent); return Number.isFinite(n) && n > 0; }"
)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_shows_a_load_as_it_runs(browser, scheme, tmp_path) -> None:
    with stack("--status-page", prefill=PREFILL, decode=DECODE) as made, load(made):
        with page_of(browser, scheme) as (page, complaints, asked):
            page.goto(made.url)
            for name in ("rate", "ttft", "itl", "reuse", "errors"):
                page.wait_for_function(SHOWN, arg=name)
            assert 25 <= number_in(page, "ttft") < 5000, "40 ms and more: in the bucket that begins at 25"
            assert number_in(page, "reuse") == 60, "3 of 5 tokens"
            parts = page.locator("#legend span").all_inner_texts()
            assert [part.split()[0] for part in parts] == [part for part in PARTS if part != "decode"]
            told = {part.split()[0]: float(part.split()[1]) for part in parts}
            assert (told["prefill"], told["load"], told["kv_visible"]) == (10, 8, 5)
            assert page.locator("#bar i").count() == len(parts)
            widths = page.locator("#bar i").evaluate_all("found => found.map(e => e.getBoundingClientRect().width)")
            assert sum(widths) == pytest.approx(page.locator("#bar").bounding_box()["width"], abs=3)
            rows = page.locator("#servers tr").all_inner_texts()
            assert [row.split()[1:3] for row in rows] == [["decode", "up"], ["prefill", "up"]]
            assert page.get_by_role("cell", name="decode, client_error").is_visible()
            before = page.inner_text("#total")  # it updates itself
            page.wait_for_function("text => document.getElementById('total').textContent !== text", arg=before)
            background, text = brightness(page, "body")
            assert (background > 200 and text < 80) if scheme == "light" else (background < 60 and text > 180)
            assert page.evaluate("document.documentElement.scrollWidth") == WIDTH
            assert colours_in(page, str(tmp_path / f"{scheme}.png")) > 30_000
        assert complaints == []
        assert {url.removeprefix(made.url) for url in asked} == {"/", "/status.json"}


def test_a_proxy_that_ends_is_told_and_a_server_that_is_away(browser) -> None:
    made = stack("--status-page", "--decoder", f"http://127.0.0.1:{dead_port()}")
    with made as started, page_of(browser, "light") as (page, _, _):
        page.goto(started.url)
        page.wait_for_selector("#servers .bad")
        assert page.locator("#servers .bad").all_inner_texts() == ["DOWN"]
        assert page.inner_text("#ttft") == "-", "nothing was asked"
        started.proxy.stop()
        page.wait_for_selector("#state.bad")
        assert "the proxy does not answer" in page.inner_text("#state")


def test_the_page_asks_for_the_key(browser) -> None:
    with stack("--status-page", env={"DISAGG_PROXY_API_KEY": KEY}) as made:
        assert httpx.get(f"{made.url}/status.json").status_code == 401
        with page_of(browser, "light") as (page, _, asked):
            page.goto(made.url)
            page.wait_for_selector("#ask:visible")
            assert not page.locator("#shown").is_visible()
            for key, selector in (("wrong", "#state:has-text('the key is wrong')"), (KEY, "#servers .good")):
                page.fill("#key", key)
                page.click("#ask button")
                page.wait_for_selector(selector)
            assert not page.locator("#ask").is_visible()
            assert not any(KEY in url for url in asked)


def test_the_policy_lets_nothing_else_run(browser) -> None:
    with stack("--status-page") as made:
        headers = httpx.get(made.url).headers
        assert headers["content-type"].startswith("text/html")
        assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'sha256-")
        assert "unsafe" not in headers["content-security-policy"]
        with page_of(browser, "light") as (page, complaints, _):
            page.goto(made.url)
            page.wait_for_selector("#servers .good")
            page.evaluate("() => { const s = document.createElement('script'); s.textContent = 'window.ran = 1';"
                          "document.body.append(s); }")  # fmt: skip
            assert page.evaluate("window.ran") is None
        assert any("Content Security Policy" in each for each in complaints)


def test_off_unless_asked_for() -> None:
    with stack() as made:
        for path in ("/", "/status.json"):
            assert httpx.get(made.url + path).headers["server"] == "mock", "as every path, it is the decode server's"


def test_the_numbers_of_all_workers_are_added() -> None:
    with stack("--status-page", "--workers", "2") as made:
        for _ in range(8):  # on new connections
            httpx.post(f"{made.url}/v1/completions", json={"prompt": "x"}, timeout=DEADLINE_S)

        def counted() -> dict[str, Any] | None:
            """Maybe after the answers: by another worker than the one that is asked."""
            found = httpx.get(f"{made.url}/status.json").json()
            return found if sum(found["e2e"]["counts"]) == found["requests"].get("decode ok") == 8 else None

        found = wait_until(counted, "all are counted")
        assert len(found["e2e"]["counts"]) == len(found["bounds"]) + 1
        assert found["tokens"] == {"prompt": 8, "reused": 0}
