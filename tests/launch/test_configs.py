"""LMCache configurations: every key is one that the pinned LMCache knows, and a launcher uses every file."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from launch_harness import PACKAGE

config = pytest.importorskip("lmcache.v1.config", reason="LMCache is not installed: its list of keys is what counts")
constants = pytest.importorskip("lmcache.v1.health_monitor.constants")

# LMCache's multi-process server has settings of another kind: tests/kv/test_mp.py.
PEERS = {
    "prefiller": "lmcache-prefiller-config.yaml",
    "decoder": "lmcache-decoder-config.yaml",
}  # tests/kv/test_nixl.py
OTHERS = {"lmcache-config-mp.yaml", *PEERS.values()}
CONFIGS = sorted(path for path in (PACKAGE / "configs").iterdir() if path.name not in OTHERS)
EXTRA_KEYS = {
    "force_store_wait",
    constants.PING_INTERVAL_CONFIG_KEY,
    constants.PING_TIMEOUT_CONFIG_KEY,
    constants.WAITING_TIME_FOR_RECOVERY_CONFIG_KEY,
}
STORES = {backend: f"lmcache-config-{backend}.yaml" for backend in ("lm", "redis", "shm")}


def is_plugin_key(key: str) -> bool:
    _, plugin, name = [*key.split(".", 2), "", ""][:3]
    return plugin == "shm" and name in ("module_path", "class_name", "url")


def test_there_are_configurations():
    assert {path.name for path in CONFIGS} == {*STORES.values()}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_every_key_is_known(path: Path):
    content = yaml.safe_load(path.read_text())
    assert set(content) <= set(config._CONFIG_DEFINITIONS)
    assert {key for key in content.get("extra_config", {}) if not is_plugin_key(key)} <= EXTRA_KEYS
    engine = config.LMCacheEngineConfig.from_file(str(path))
    engine.validate()
    for key, value in content.items():
        assert getattr(engine, key) == value, key


def test_extra_keys_are_read_by_lmcache():
    import lmcache

    source = "".join(p.read_text() for p in (Path(lmcache.__file__).parent / "v1").rglob("*.py"))
    for key in EXTRA_KEYS:
        assert f'"{key}"' in source, key


@pytest.mark.parametrize("name", [*STORES.values()])
def test_part_filled_chunks_are_stored(name):
    content = yaml.safe_load((PACKAGE / "configs" / name).read_text())
    assert content["save_unfull_chunk"] is True
    assert content["pre_caching_hash_algorithm"] == "sha256_cbor"


def test_they_differ_in_the_address_only():
    contents = {path.name: yaml.safe_load(path.read_text()) for path in CONFIGS}
    for backend in ("lm", "redis"):
        assert contents[STORES[backend]].pop("remote_url").startswith(f"{backend}://127.0.0.1:")
    shm = contents[STORES["shm"]]
    assert shm.pop("remote_storage_plugins") == ["shm"]
    plugin = {
        key.rpartition(".")[2]: shm["extra_config"].pop(key) for key in list(shm["extra_config"]) if is_plugin_key(key)
    }
    assert plugin.pop("url").startswith("shm:///")
    assert plugin == {"module_path": "disagg_prefill_lmcache_v1.kv.stores.shm", "class_name": "ShmConnectorAdapter"}
    assert all(content == contents[STORES["lm"]] for content in contents.values())
