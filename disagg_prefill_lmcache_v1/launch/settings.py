"""The launcher's settings, each declared once, and where their values come from.

A flag wins over the environment (``DISAGG_KV_PORT`` for ``--kv-port``), that over the block at the top of the script
(which sets the same variables where they are empty), that over profiles/<device>.env, that over profiles/common.env and
the defaults here. What only the environment sets has no flag. A backend's own settings stand in its file in backends/.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, TypeVar

from disagg_prefill_lmcache_v1.launch.backends import BACKENDS
from disagg_prefill_lmcache_v1.launch.devices import choose_device
from disagg_prefill_lmcache_v1.launch.messages import UsageError
from disagg_prefill_lmcache_v1.launch.profiles import DEVICES, Profile, ProfileError, load_profile
from disagg_prefill_lmcache_v1.settings import HOST, SettingsError, flag_of, parser_of, resolve, setting

PREFIX = "DISAGG_"
PORT = {"kind": "whole", "low": 1, "high": 65535}
URL = {"pattern": r"https?://[^\s/]+/?", "allowed": "http://HOST:PORT or https://HOST:PORT"}
WAYS = f"way of the KV cache ({', '.join(f'{name}: {kind.title}' for name, kind in BACKENDS.items())})"
OF_DEVICE = "the device's"


@dataclass(frozen=True)
class DeviceSetting:
    """Read first: the other values depend on the device."""

    device: str = setting("auto", "what the vLLM servers run on", choices=("auto", *DEVICES))


@dataclass(frozen=True)
class EngineSettings(DeviceSetting):
    """What every launcher of vLLM engines here takes."""

    backend: str = setting("lm", WAYS, choices=tuple(BACKENDS))
    tensor_parallel_size: int = setting(1, "ranks (cards) of each vLLM server", low=1, high=64)
    model: str = setting(
        "", "Hugging Face name or local directory; needs HF_TOKEN only if it is gated and not local", shown=OF_DEVICE
    )
    max_model_len: int = setting(
        None, "longest prompt plus answer, in tokens", kind="whole", low=16, high=10**7, shown=OF_DEVICE
    )
    kv_port: int | None = setting(
        None, "port of the KV server started here; nixl: of the first vLLM server, the next for each further", **PORT,
        shown=", ".join(f"{name} {kind.default_port}" for name, kind in BACKENDS.items() if kind.default_port),
    )  # fmt: skip
    kv_load: str = setting(
        "auto", "load KV from the store: auto where it is faster than computing it again",
        choices=("auto", "always", "never"),
    )  # fmt: skip
    graphs: str = setting(
        None, "on: vLLM's compiled graphs (warm-up on Gaudi), as people serve; off: --enforce-eager, starts sooner",
        choices=("on", "off"), shown=OF_DEVICE,
    )  # fmt: skip
    python: str = setting("", "Python to use as it is", flag=False)
    vllm_program: str = setting(
        "", "words that start vLLM, before the model; vllm: vllm serve, module: its API server's module", flag=False,
        env="VLLM_PROGRAM", shown=OF_DEVICE,
    )  # fmt: skip
    model_builder: str = setting(
        "{python} -m disagg_prefill_lmcache_v1.measure.tiny_model", "words that build the CPU's model", flag=False,
        env="MODEL_BUILDER",
    )  # fmt: skip


@dataclass(frozen=True)
class Settings(EngineSettings):
    """The example and its servers."""

    served_model_name: str = setting("", "name that clients use", shown="the model's")
    run_dir: Path | None = setting(None, "where logs and summary.json go", kind="path", shown="beside the script")
    proxy_port: int = setting(8000, "port of the proxy", **PORT)
    prefiller_port: int = setting(8100, "port of the prefill server", **PORT)
    decoder_port: int = setting(8200, "port of the decode server", **PORT)
    prefillers: int = setting(1, "prefill servers of the example, on ports in a row", low=1, high=64)
    decoders: int = setting(1, "decode servers of the example, on ports in a row", low=1, high=64)
    host: str = setting("127.0.0.1", "address that the servers started here listen on; 0.0.0.0: every one", **HOST)
    advertise_host: str = setting(
        "", "host by which other machines reach the servers started here", shown="that of --host", **HOST
    )
    prefiller_url: tuple[str, ...] = setting(
        (), "launcher: prefill server that the proxy asks; repeat for several (default: the one on this machine)", **URL
    )
    decoder_url: tuple[str, ...] = setting(
        (), "launcher: decode server that the proxy asks; repeat for several (default: the one on this machine)", **URL
    )
    kv_url: str = setting(
        "",
        "use this KV store (lm://HOST:PORT, redis://...) instead of one on this machine; with a password better by the "
        "environment",
    )
    redis_url: str = setting("", "the same as --kv-url, for --backend redis")
    save_decode_cache: bool = setting(
        False, "the decode server stores its answers' KV too, for the prompts of later turns; not with mp and nixl"
    )
    num_prompts: int = setting(
        None, "requests of the load; 0: only the correctness probe", kind="whole", low=0, high=10**6, shown=OF_DEVICE
    )
    input_len: int = setting(None, "prompt tokens of each request", kind="whole", low=2, high=10**7, shown=OF_DEVICE)
    output_len: int = setting(None, "answer tokens of each request", kind="whole", low=1, high=10**7, shown=OF_DEVICE)
    request_rate: tuple[float, ...] = setting(
        None, "requests per second; --compare takes several, with commas", kind="numbers", above=0, shown=OF_DEVICE
    )
    min_reuse_ratio: float = setting(0.99, "smallest share of prompt tokens that the decoder must reuse", low=0, high=1)
    ready_timeout: int = setting(
        None, "seconds that the vLLM servers get until they answer", kind="whole", low=1, high=86400, shown=OF_DEVICE
    )
    serve: bool = setting(False, "stay up when ready and print a request to try; Ctrl-C ends it")
    compare: bool = setting(
        False, "the same load on as many plain servers, then on the prefill and decode servers: which is better for it"
    )
    goodput: tuple[str, ...] = setting(
        (), "--compare: what a request must keep to, in milliseconds, as vLLM spells it: ttft:500 tpot:15 e2el:9000",
        kind="words", pattern=r"(ttft|tpot|e2el):[0-9]+(\.[0-9]+)?", allowed="ttft:MS, tpot:MS, e2el:MS",
    )  # fmt: skip
    workload: str = setting(
        "fixed", "--compare: the requests: fixed (--input-len and --output-len), multi-turn, mooncake-conversation, "
        "mooncake-synthetic, azure-conversation, azure-code, or a trace file of Mooncake's format",
    )  # fmt: skip
    burstiness: float | None = setting(
        None, "--compare: how even arrivals are, as vLLM has it: 1 is Poisson, more is more even", kind="number",
        above=0, shown="the workload's",
    )  # fmt: skip
    sweep: bool = setting(
        False, "--compare: rates between one request after the other and all at once, instead of --request-rate"
    )
    dry_run: bool = setting(False, "print every command with its environment, start nothing")
    proxy_program: str = setting(
        "{python} {package}/disagg_proxy_server.py", "words that start the proxy", flag=False, env="PROXY_PROGRAM"
    )
    load_program: str = setting(
        "{python} -m disagg_prefill_lmcache_v1.measure.load_and_verify", "words that start load and probe", flag=False,
        env="LOAD_PROGRAM",
    )  # fmt: skip
    compare_program: str = setting(
        "{python} -m disagg_prefill_lmcache_v1.measure.compare", "words that start the steps of --compare", flag=False,
        env="COMPARE_PROGRAM",
    )  # fmt: skip
    prepared: bool = setting(False, "a server's checks and set-up have been done", flag=False)


S = TypeVar("S", bound=EngineSettings)


@dataclass(frozen=True)
class Configuration(Generic[S]):
    """Settings with the device's profile, where each value came from, and what else the command line holds."""

    settings: S
    profile: Profile
    device_reason: str
    sources: Mapping[str, str]
    words: tuple[str, ...] = ()  # arguments that are no flags
    vllm_arguments: tuple[str, ...] = ()  # after --

    def source(self, name: str) -> str:
        """How a person sets a value, for messages: the variable that set it, else the flag."""
        source = self.sources.get(name, "")
        return source if source.startswith(PREFIX) else flag_of(name)

    def with_model(self, model: str) -> Configuration[S]:
        """The same for another model, as if its flag had been given."""
        return replace(
            self, settings=replace(self.settings, model=model), sources={**self.sources, "model": flag_of("model")}
        )

    def given(self, name: str) -> bool:
        """Whether flag or environment set a value."""
        return self.sources.get(name, "").startswith(("--", PREFIX))

    def check_kv_port(self) -> None:
        """Raises UsageError where a port was given for a backend that has none."""
        backend = self.settings.backend
        if not BACKENDS[backend].default_port and self.given("kv_port"):
            raise UsageError(
                f"{self.source('kv_port')}: --backend {backend} has no port: its server listens on a socket"
                " in the run directory"
            )


def read_configuration(
    cls: type[S],
    argv: Sequence[str],
    environ: Mapping[str, str],
    *,
    prog: str,
    description: str,
    words: bool = False,
    lead: str = "[disagg] usage",
) -> Configuration[S]:
    """The settings of a command line; ``words``: arguments that are no flags are taken too.

    Raises:
        UsageError: a value that is not allowed. SystemExit: 0 after --help, 2 for a wrong command line.
    """
    split = argv.index("--") if "--" in argv else len(argv)
    parser = parser_of(cls, prefix=PREFIX, prog=prog, description=description, epilog=_epilog())
    parser.usage = f"{prog} [flags] [-- arguments of both vLLM servers]"
    parser.lead = lead
    if words:
        parser.add_argument("words", nargs="*", metavar="WORD")
        given = vars(parser.parse_intermixed_args(list(argv[:split])))
    else:
        given = vars(parser.parse_args(list(argv[:split])))
    extra_words = given.pop("words", None) or ()
    for name, value in given.items():
        if value == "":
            raise UsageError(f"{flag_of(name)} needs a value that is not empty")
    try:
        device = resolve(DeviceSetting, given, environ, prefix=PREFIX).values["device"]
        device, reason = choose_device(device)
        profile = load_profile(device)
        found = resolve(cls, given, environ, prefix=PREFIX, fallback=profile.settings, fallback_name="profile ")
    except (SettingsError, ProfileError) as error:
        raise UsageError(str(error)) from error
    settings = replace(cls(**found.values), device=device)
    return Configuration(settings, profile, reason, found.sources, tuple(extra_words), tuple(argv[split + 1 :]))


def _epilog() -> str:
    return (
        "Each flag is also an environment variable: --kv-port is DISAGG_KV_PORT. A flag wins over the environment, the "
        "environment over the settings at the top of the script, those over the profile of the device (profiles/hpu.env"
        ", cuda.env, cpu.env). DISAGG_PYTHON names the Python to use as it is; VLLM_PROGRAM the words that start vLLM, "
        "before the model."
    )
