"""Background work goes on whatever fails in it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import proxy_harness  # noqa: F401 (makes the package importable)
import pytest

from disagg_prefill_lmcache_v1.proxy.kv_layouts import LayoutWatch
from disagg_prefill_lmcache_v1.proxy.metrics import Metrics
from disagg_prefill_lmcache_v1.proxy.pool import DECODE, PREFILL, Pool
from disagg_prefill_lmcache_v1.proxy.settings import Settings
from disagg_prefill_lmcache_v1.proxy.upkeep import Upkeep

URL = "http://127.0.0.1:1"


async def until(condition: Any) -> None:
    deadline = asyncio.get_running_loop().time() + 20
    while not condition():
        assert asyncio.get_running_loop().time() < deadline
        await asyncio.sleep(0.01)


def test_timeouts_and_checks_go_on_after_a_failure(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    path = tmp_path / "upstreams.json"
    path.write_text("{}")
    done: list[str] = []

    async def run() -> None:
        settings = Settings(decode_timeout_s=0.1, health_interval_s=0.05, upstreams_file=str(path))
        pools = [Pool(role, [URL], settings, Metrics()) for role in (PREFILL, DECODE)]

        def fail(*_: Any) -> None:
            done.append("failed")
            raise RuntimeError("on purpose")

        monkeypatch.setattr(pools[0], "sweep", fail)
        monkeypatch.setattr(pools[1], "sweep", lambda seconds: done.append("swept"))
        monkeypatch.setattr(pools[1], "_publish", fail)
        upkeep = Upkeep(settings, *pools, finished=fail, in_flight=lambda: 0.0, stamp=(0, 0), layouts=LayoutWatch())
        monkeypatch.setattr(upkeep, "_read_upstreams_again", lambda: done.append("read"))
        upkeep.start()
        await until(lambda: done.count("swept") > 5 and done.count("read") > 5)
        await until(lambda: pools[1].upstreams[0].failures > 2)  # nothing listens there: it is checked again and again
        await upkeep.stop()

    asyncio.run(run())
    assert done.count("failed") > 5
    assert "it goes on" in caplog.text
