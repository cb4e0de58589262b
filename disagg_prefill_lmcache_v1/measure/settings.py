"""Settings of the load and the probe: command line flags and environment variables are made from the fields."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from disagg_prefill_lmcache_v1.settings import SettingsError, load, setting

ENV_PREFIX = "DISAGG_LOAD_"
_URL = {"pattern": r"https?://\S+", "allowed": "a URL like http://127.0.0.1:8000"}


@dataclass(frozen=True)
class Settings:
    """Every setting once."""

    proxy_url: str = setting("http://127.0.0.1:8000", "proxy that the load goes through", **_URL)
    prefiller_url: str = setting("http://127.0.0.1:8100", "prefill server, asked directly for the reference", **_URL)
    decoder_url: tuple[str, ...] = setting(
        ("http://127.0.0.1:8200",), "decode server, asked for its reuse counters; repeat for several", **_URL
    )
    api_key: str = setting(
        "", "key that the proxy asks for (no flag, as argument lists can be read)", flag=False,
        env="DISAGG_PROXY_API_KEY",
    )  # fmt: skip
    model: str = setting("", "served model name", shown="the one that the prefiller serves")
    num_prompts: int = setting(24, "requests of the load; 0 runs the probe alone", low=0)
    input_len: int = setting(512, "prompt tokens of a load request", low=2)
    output_len: int = setting(16, "answer tokens of a load request", low=1)
    warm_up: int = setting(1, "requests like those of the load before it, not measured", low=0)
    request_rate: float = setting(4.0, "load requests started per second; 0 starts all at once", low=0)
    arrival: str = setting("poisson", "how the starts are spread", choices=("poisson", "fixed"))
    max_model_len: int = setting(0, "longest sequence the servers take", low=0, shown="what the prefiller says")
    run_dir: Path = setting(Path(), "directory for summary.json")
    device: str = setting("cpu", "device of the servers: hpu, cuda or cpu")
    backend: str = setting("lm", "KV server of the stack, for the summary")
    tensor_parallel_size: int = setting(1, "tensor parallel size of the servers, for the summary", low=1)
    min_reuse_ratio: float = setting(0.99, "least part of the reusable prompt tokens to be reused", low=0, high=1)
    reuse_block: int = setting(1, "prompt tokens that the KV server keeps together: only whole ones are reused", low=1)
    kv_load: str = setting(
        "always",
        "what the servers do with KV that the store has (their DISAGG_KV_LOAD)",
        choices=("auto", "always", "never"),
    )
    calibrate: str = setting(
        "on",
        "on: with --kv-load auto, the decoder computes a few prompts before the load, so that it knows how fast it "
        "is; only: nothing else is done",
        choices=("on", "off", "only"),
    )
    probe: str = setting("on", "the correctness probe", choices=("on", "off"))
    probe_output_len: int = setting(16, "answer tokens of a probe request", low=1)
    probe_concurrency: int = setting(4, "probe requests at a time", low=1)
    probe_compare: str = setting(
        "auto",
        "exact: equal tokens and close log-probabilities, for float32 servers; near-tie: a token may differ where "
        "the reference's two candidates are close, for lower precision; auto: exact on cpu, otherwise near-tie",
        choices=("auto", "exact", "near-tie"),
    )
    logprob_tolerance: float = setting(
        0.001, "exact: largest difference of a token's log-probability, and largest gap at a tie", low=0
    )
    near_tie_tolerance: float = setting(0.25, "near-tie: largest gap of the log-probabilities at a tie", low=0)
    request_timeout: float = setting(300.0, "deadline of a request, seconds", above=0)
    seed: int | None = setting(None, "seed of the prompts", kind="whole", low=0, shown="a new one every time, printed")
    ready_file: Path | None = setting(None, "file created when the first load request is sent", kind="path")

    def __post_init__(self) -> None:
        for name in ("proxy_url", "prefiller_url"):
            object.__setattr__(self, name, getattr(self, name).rstrip("/"))
        object.__setattr__(self, "decoder_url", tuple(url.rstrip("/") for url in self.decoder_url))

    @property
    def exact(self) -> bool:
        """Answers are compared token for token, with ties of ``logprob_tolerance`` alone."""
        return self.probe_compare == "exact" or (self.probe_compare == "auto" and self.device == "cpu")

    @property
    def proxy_headers(self) -> dict[str, str]:
        """What a request to the proxy carries; the servers behind it are not shown its key."""
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}


def parse_settings(arguments: Sequence[str], environ: Mapping[str, str]) -> Settings:
    """Settings from the command line and the environment.

    Raises:
        SettingsError: a value that is not allowed. SystemExit with status 2: an unknown flag; 0: --help.
    """
    settings = load(
        Settings,
        arguments,
        environ,
        prefix=ENV_PREFIX,
        prog="load_and_verify",
        description="Load a disaggregated stack and verify its answers.",
        epilog=f"Each flag is also an environment variable: {ENV_PREFIX}SEED for --seed. A flag wins.",
    )
    if settings.num_prompts == 0 and settings.probe == "off" and settings.calibrate != "only":
        raise SettingsError("--num-prompts 0 with --probe off leaves nothing to do")
    return settings
