"""Dashboard, alert rules and the page about them name metrics that exist; Prometheus' own checker reads the files."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from disagg_prefill_lmcache_v1.proxy.metrics import FAMILIES

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "monitoring"
SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",), "max": ("",)}


def expressions() -> list[str]:
    rules = yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"]
    dashboard = json.loads((FOLDER / "grafana-dashboard.json").read_text())
    found = [rule["expr"] for group in rules for rule in group["rules"]]
    return found + [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


def known_metrics() -> set[str]:
    meter = pytest.importorskip("disagg_prefill_lmcache_v1.kv.meter", reason="vLLM is not installed")
    loggers = pytest.importorskip("vllm.v1.metrics.loggers", reason="vLLM is not installed")
    names = {name + suffix for name, (kind, *_) in FAMILIES.items() for suffix in SUFFIXES[kind]}
    names |= {name + "_total" for name in meter.TEXTS}
    own = re.findall(r'"(vllm:\w+)"', Path(loggers.__file__).read_text())
    return names | {name + suffix for name in own for suffix in ("", "_total", "_bucket")}


def test_expressions_name_metrics_that_exist() -> None:
    known, texts = known_metrics(), expressions()
    assert len(texts) > 20
    page = (ROOT / "docs" / "monitoring.md").read_text()
    for text in texts + re.findall(r"`((?:disagg_|vllm:)\w+(?:\{[^`]*\})?)`", page):
        for name in re.findall(r"\b(?:vllm:|disagg_)\w+", text):
            assert name in known or name in FAMILIES, f"{name} in {text}"


def test_labels_exist() -> None:
    labels = {name: set(names) | {"job", "le"} for name, (_, _, names) in FAMILIES.items()}
    for text in expressions():
        for name, inside in re.findall(r"\b(disagg_\w+)\{([^}]*)\}", text):
            family = re.sub(r"_(total|bucket|sum|count)$", "", name)
            used = set(re.findall(r"(\w+)\s*[=!]", inside))
            assert used <= labels.get(family, {"job", "choice"}), text


def test_promtool_takes_the_files() -> None:
    promtool = shutil.which("promtool")
    if not promtool:
        pytest.skip("promtool is not installed (Debian package prometheus)")
    done = subprocess.run([promtool, "check", "config", str(FOLDER / "prometheus.yml")],
                          capture_output=True, text=True, timeout=60, check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 rules found" in done.stdout + done.stderr
