"""A headless Chromium of the system for tests that look at pages; they are skipped where there is none."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

PROGRAMS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
DEADLINE_MS = 60_000
WIDTH = 1280


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """A Playwright browser."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: it drives the browser")
    program = next((found for name in PROGRAMS if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip(f"no Chromium on this machine (any of {', '.join(PROGRAMS)}): pages are looked at in one")
    with api.sync_playwright() as driver:
        # Root in a container has no sandbox; the pages are ours.
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"], timeout=DEADLINE_MS)
        yield browser
        browser.close()


@contextlib.contextmanager
def page_of(browser: Any, scheme: str) -> Iterator[tuple[Any, list[str], list[str]]]:
    """A page in a colour scheme; what it complains of on its console; what it asks for."""
    page = browser.new_page(viewport={"width": WIDTH, "height": 900}, color_scheme=scheme)
    page.set_default_timeout(DEADLINE_MS)
    complaints: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    yield page, complaints, asked
    page.close()


def brightness(page: Any, selector: str) -> tuple[float, float]:
    """Of an element's background and of its text, 0 to 255."""
    script = """(element) => {
        const style = getComputedStyle(element);
        return [style.backgroundColor, style.color].map((colour) => {
            const [r, g, b] = colour.match(/[0-9.]+/g).map(Number);
            return 0.299 * r + 0.587 * g + 0.114 * b;
        });
    }"""
    background, text = page.eval_on_selector(selector, script)
    return background, text


def colours_in(page: Any, path: str) -> int:
    """Take a picture of the whole page; how many bytes it has tells whether anything was drawn."""
    return len(page.screenshot(path=path, full_page=True))
