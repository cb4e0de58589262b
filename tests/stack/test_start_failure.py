"""A vLLM server whose connector cannot start ends, and says why. Half a minute for each."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from launch_harness import PACKAGE, REPOSITORY, free_ports

pytest.importorskip("vllm", reason="vLLM is not installed: the real server is what is tested")
pytest.importorskip("lmcache", reason="LMCache is not installed: the real connector is what is tested")

from disagg_prefill_lmcache_v1.measure import tiny_model

MODEL = REPOSITORY / ".models" / "tiny-llama"
END_S = 240.0  # from the start; vLLM itself needs up to a minute of that until it comes to the connector


@pytest.mark.parametrize("case", ["nixl's library is missing", "no store answers"])
def test_a_server_whose_connector_cannot_start_ends(case, tmp_path):
    tiny_model.build(MODEL)
    port, nowhere = free_ports(2)
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "LMCACHE_TRACK_USAGE": "false",
        "LMCACHE_MAX_LOCAL_CPU_SIZE": "0.2", "PYTHONPATH": f"{tmp_path}:{REPOSITORY}",
    }  # fmt: skip
    if case == "no store answers":
        said = f"KV store lm://127.0.0.1:{nowhere}: [Errno 111] Connection refused"
        settings |= {
            "LMCACHE_CONFIG_FILE": str(PACKAGE / "configs/lmcache-config-lm.yaml"),
            "LMCACHE_REMOTE_URL": f"lm://127.0.0.1:{nowhere}",
        }
        connector = {
            "kv_connector": "LMCacheDisaggConnectorV1",
            "kv_connector_module_path": "disagg_prefill_lmcache_v1.kv.connector",
        }
    else:
        said = "NIXL cannot be used: libucp.so"
        for name in ("nixl", "nixl_cu12", "nixl_cu13"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "__init__.py").write_text("raise ImportError('libucp.so', name='libucp')\n")
        settings |= {
            "DISAGG_NIXL_CONFIG_FILE": str(PACKAGE / "configs/lmcache-prefiller-config.yaml"),
            "VLLM_NIXL_SIDE_CHANNEL_PORT": str(nowhere),
        }
        connector = {"kv_connector": "NixlConnector", "kv_connector_module_path": "disagg_prefill_lmcache_v1.kv.nixl"}
    connector["kv_role"] = "kv_producer"
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(MODEL), "--port", str(port),
        "--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager", "--max-model-len", "1024",
        "--kv-transfer-config", json.dumps(connector),
    ]  # fmt: skip
    log = tmp_path / "server.log"
    with log.open("w") as out:
        child = subprocess.Popen(
            command, env={**os.environ, **settings}, stdout=out, stderr=out, stdin=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
    try:
        status = child.wait(END_S)
    except subprocess.TimeoutExpired:
        status = "it runs on"
    finally:
        if child.poll() is None:
            os.killpg(child.pid, 9)
            child.wait()
    assert status not in (0, "it runs on"), log.read_text()[-3000:]
    assert said in log.read_text()
