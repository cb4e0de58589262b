"""LMCache configurations: every key is one that the pinned LMCache knows, and a launcher uses every file."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from launch_harness import PACKAGE

config = pytest.importorskip("lmcache.v1.config", reason="LMCache is not installed: its list of keys is what counts")
constants = pytest.importorskip("lmcache.v1.health_monitor.constants")

CONFIGS = sorted((PACKAGE / "configs").iterdir())
EXTRA_KEYS = {
    "force_store_wait",
    constants.PING_INTERVAL_CONFIG_KEY,
    constants.PING_TIMEOUT_CONFIG_KEY,
    constants.WAITING_TIME_FOR_RECOVERY_CONFIG_KEY,
}


def test_there_are_configurations():
    assert {"lmcache-config-lm.yaml", "lmcache-config-redis.yaml"} <= {path.name for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_every_key_is_known(path: Path):
    content = yaml.safe_load(path.read_text())
    assert set(content) <= set(config._CONFIG_DEFINITIONS)
    assert set(content.get("extra_config", {})) <= EXTRA_KEYS
    engine = config.LMCacheEngineConfig.from_file(str(path))
    engine.validate()
    for key, value in content.items():
        assert getattr(engine, key) == value, key


def test_extra_keys_are_read_by_lmcache():
    import lmcache

    source = "".join(p.read_text() for p in (Path(lmcache.__file__).parent / "v1").rglob("*.py"))
    for key in EXTRA_KEYS:
        assert f'"{key}"' in source, key


@pytest.mark.parametrize("backend", ["lm", "redis"])
def test_part_filled_chunks_are_stored(backend):
    content = yaml.safe_load((PACKAGE / f"configs/lmcache-config-{backend}.yaml").read_text())
    assert content["save_unfull_chunk"] is True
    assert content["pre_caching_hash_algorithm"] == "sha256_cbor"
    assert content["remote_url"].startswith(f"{backend}://127.0.0.1:")


def test_the_two_stores_differ_in_the_address_only():
    contents = [yaml.safe_load((PACKAGE / f"configs/lmcache-config-{b}.yaml").read_text()) for b in ("lm", "redis")]
    for content in contents:
        content.pop("remote_url")
    assert contents[0] == contents[1]
