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
PLUGIN_KEYS = {f"remote_storage_plugin.shm.{name}" for name in ("module_path", "class_name", "url")}


def test_there_are_configurations():
    assert {f"lmcache-config-{backend}.yaml" for backend in ("lm", "redis", "shm")} <= {path.name for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_every_key_is_known(path: Path):
    content = yaml.safe_load(path.read_text())
    assert set(content) <= set(config._CONFIG_DEFINITIONS)
    assert set(content.get("extra_config", {})) <= EXTRA_KEYS | (PLUGIN_KEYS if "shm" in path.name else set())
    engine = config.LMCacheEngineConfig.from_file(str(path))
    engine.validate()
    for key, value in content.items():
        assert getattr(engine, key) == value, key


def test_extra_keys_are_read_by_lmcache():
    import lmcache

    source = "".join(p.read_text() for p in (Path(lmcache.__file__).parent / "v1").rglob("*.py"))
    for key in EXTRA_KEYS:
        assert f'"{key}"' in source, key


@pytest.mark.parametrize("backend", ["lm", "redis", "shm"])
def test_part_filled_chunks_are_stored(backend):
    content = yaml.safe_load((PACKAGE / f"configs/lmcache-config-{backend}.yaml").read_text())
    assert content["save_unfull_chunk"] is True
    assert content["pre_caching_hash_algorithm"] == "sha256_cbor"
    url = content["extra_config"]["remote_storage_plugin.shm.url"] if backend == "shm" else content["remote_url"]
    assert url.startswith(f"{backend}://127.0.0.1:")


def test_the_stores_differ_in_the_address_only():
    contents = [yaml.safe_load(path.read_text()) for path in CONFIGS]
    assert set(contents[-1]["extra_config"]) >= PLUGIN_KEYS
    assert contents[-1].pop("remote_storage_plugins") == ["shm"]
    for key in PLUGIN_KEYS:
        contents[-1]["extra_config"].pop(key)
    for content in contents[:-1]:
        content.pop("remote_url")
    assert all(content == contents[0] for content in contents)
