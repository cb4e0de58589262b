"""Settings of a comparison's steps: command line flags and environment variables are made from the fields."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from disagg_prefill_lmcache_v1.settings import load, setting

ENV_PREFIX = "DISAGG_COMPARE_"
ARMS = ("plain", "pair")


@dataclass(frozen=True)
class CompareSettings:
    """Every setting once."""

    step: str = setting(
        "check", "check: the load alone, before servers run; plain, pair: measure an arm; result: say what they did",
        choices=("check", *ARMS, "result"),
    )  # fmt: skip
    proxy_url: str = setting(
        "http://127.0.0.1:8000", "proxy of the arm", pattern=r"https?://\S+", allowed="a URL like http://127.0.0.1:8000"
    )
    api_key: str = setting(
        "", "key that the proxy asks for (no flag, as argument lists can be read)", flag=False,
        env="DISAGG_PROXY_API_KEY",
    )  # fmt: skip
    run_dir: Path = setting(Path(), "directory of the proxies' logs, for compare.json and report.html")
    model: str = setting("", "served model name")
    tokenizer: str = setting("", "the model's name or directory, for its tokenizer", shown="--model")
    max_model_len: int = setting(8192, "longest prompt plus answer: a workload is scaled down to it", low=2)
    workload: str = setting("fixed", "the requests; measure/workloads.py tells which")
    num_prompts: int = setting(24, "requests at each rate", low=1)
    input_len: int = setting(512, "prompt tokens of the fixed and of the multi-turn workload", low=2)
    output_len: int = setting(16, "answer tokens of the fixed and of the multi-turn workload", low=1)
    request_rate: tuple[float, ...] = setting(
        (1.0,), "requests per second, one after the other", kind="numbers", above=0, shown="1.0"
    )
    sweep: bool = setting(False, "rates between one request after the other and all at once instead")
    burstiness: float | None = setting(
        None, "how even arrivals are: 1 is Poisson, more is more even", kind="number", above=0, shown="the workload's"
    )
    goodput: tuple[str, ...] = setting(
        (), "what a request must keep to, in milliseconds", kind="words", pattern=r"(ttft|tpot|e2el):[0-9]+(\.[0-9]+)?",
        allowed="ttft:MS, tpot:MS, e2el:MS",
    )  # fmt: skip
    seed: int = setting(0, "decides lengths and times of a workload that is made", low=0)
    first_block: int = setting(
        0, "decides the prompts' tokens; must be another one for each run against a KV store that stays", low=0
    )
    timeout: float = setting(600.0, "seconds that the requests of a rate get after the last one was sent", above=0)
    device: str = setting("cpu", "device of the servers; cpu: the answers of both arms must be equal")
    backend: str = setting("lm", "KV server of the pair, for the result")
    kv_load: str = setting("auto", "what the pair does with KV that the store has, for the result")
    graphs: str = setting("off", "vLLM's compiled graphs, for the result")
    tensor_parallel_size: int = setting(1, "cards of each server", low=1)
    prefillers: int = setting(1, "prefill servers of the pair", low=1)
    decoders: int = setting(1, "decode servers of the pair", low=1)

    @property
    def folder(self) -> Path:
        """Of what the steps hand to each other."""
        return self.run_dir / "compare"

    @property
    def targets(self) -> dict[str, float]:
        """Milliseconds by metric."""
        return {name: float(value) for name, _, value in (each.partition(":") for each in self.goodput)}

    @property
    def servers(self) -> int:
        """Of each arm."""
        return self.prefillers + self.decoders


def parse_settings(arguments: Sequence[str], environ: Mapping[str, str]) -> CompareSettings:
    """Raises SettingsError for a value that is not allowed, SystemExit for a wrong command line (2) or --help (0)."""
    return load(
        CompareSettings, arguments, environ, prefix=ENV_PREFIX, prog="compare",
        description="The same load on plain servers and on prefill and decode servers, step by step.",
    )  # fmt: skip
