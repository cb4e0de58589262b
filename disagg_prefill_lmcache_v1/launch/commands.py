"""The command line and the environment of every process of the stack. Pure: a plan in, commands out."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from disagg_prefill_lmcache_v1.launch.backends.base import number_of, role_of
from disagg_prefill_lmcache_v1.launch.messages import mask_passwords
from disagg_prefill_lmcache_v1.launch.plan import ROLES, Plan
from disagg_prefill_lmcache_v1.launch.profiles import PACKAGE, REPOSITORY
from disagg_prefill_lmcache_v1.launch.settings import Settings
from disagg_prefill_lmcache_v1.settings import authority

VLLM_PROGRAMS = {"module": "{python} -m vllm.entrypoints.openai.api_server --model", "vllm": "vllm serve"}
PLAIN, PLAIN_PROXY = "plain", "plain-proxy"  # servers without a KV connector, and the proxy before them
COMPARE_STEPS = ("check", "plain", "pair", "result")
STATUS_PAGE = "DISAGG_PROXY_STATUS_PAGE"  # of the proxy's settings: whoever sets it decides
# What makes the two roles differ, besides their ports and cards.
KV_ROLES = {"prefiller": "kv_producer", "decoder": "kv_consumer"}
MIDDLEWARE = {
    "prefiller": ("kv.visibility.HoldUntilVisible", "kv.tell_layout.TellLayout"),
    "decoder": ("kv.reuse.TellReuse", "kv.tell_layout.TellLayout"),
}


@dataclass(frozen=True)
class Command:
    """A program, what its environment has beyond the caller's, and the variables that it must not inherit."""

    name: str
    words: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    clears: tuple[str, ...] = ()

    def full_environment(self, environ: Mapping[str, str]) -> dict[str, str]:
        """The environment it runs with."""
        kept = {name: value for name, value in environ.items() if name not in self.clears}
        return {**kept, **self.environment}

    def shell_line(self, environ: Mapping[str, str]) -> str:
        """One line to read and to paste, without passwords."""
        unset = [word for name in self.clears if name in environ for word in ("-u", name)]
        pairs = [f"{name}={shlex.quote(mask_passwords(value))}" for name, value in self.environment.items()]
        words = [shlex.quote(mask_passwords(word)) for word in self.words]
        return " ".join(["env", *unset, *pairs, *words])


def fill(words: Sequence[str], python: str) -> list[str]:
    """Words of a command with the interpreter and this package's folder filled in."""
    return [word.replace("{python}", python).replace("{package}", str(PACKAGE)) for word in words]


def build_command(plan: Plan[Settings], name: str) -> Command:
    """The command of a vLLM server by its name, ``proxy``, ``kv-server``, ``load``, ``calibration``, ``probe`` or
    ``model``; of a comparison also ``plain`` (a server), ``plain-proxy`` and ``compare-STEP``.
    """
    if role_of(name) in (*ROLES, PLAIN):
        return vllm_server(plan, name)
    words = {
        "proxy": _proxy,
        "kv-server": kv_server,
        "load": _load,
        "calibration": lambda plan: [*_load(plan), "--calibrate", "only"],
        "probe": lambda plan: [*_load(plan), "--num-prompts", "0"],
        "model": model_builder,
        PLAIN_PROXY: _plain_proxy,
        **{f"compare-{step}": partial(_compare, step=step) for step in COMPARE_STEPS},
    }[name](plan)
    return Command(name, tuple(words), common_environment(plan), ("PROMETHEUS_MULTIPROC_DIR",))


def common_environment(plan: Plan[Any]) -> dict[str, str]:
    """Of every process: where this package lies, and the device."""
    path = plan.environ.get("PYTHONPATH")
    return {
        "PYTHONPATH": f"{REPOSITORY}:{path}" if path else str(REPOSITORY),
        "DISAGG_DEVICE": plan.settings.device,
    }


# --- vLLM


def vllm_server(plan: Plan[Settings], name: str) -> Command:
    """A vLLM server of the example, or a plain one that takes the place of one of those."""
    plain, name = name in plain_servers(plan), plain_servers(plan).get(name, name)
    role, port = role_of(name), server_address(plan, name)
    text = plan.settings.vllm_program
    words = fill(VLLM_PROGRAMS.get(text, text).split(), plan.interpreter.path)
    words += [plan.model.name, "--host", plan.host, "--port", str(port), "--served-model-name", plan.model.served_name]
    words += ["--enable-prompt-tokens-details", *engine_arguments(plan, role, "" if plain else f"{role}-{port}")]
    for each in () if plain else MIDDLEWARE[role]:
        words += ["--middleware", f"disagg_prefill_lmcache_v1.{each}"]
    words += plan.configuration.vllm_arguments
    environment = engine_environment(plan, name)
    if plain:
        of_backend = plan.backend.environment(name, plan.environ)
        environment = {key: value for key, value in environment.items() if key not in of_backend}
    else:
        environment["DISAGG_KV_VISIBILITY"] = f"@disagg-kv-{port}-{plan.run_id}"
        if plan.settings.save_decode_cache and role == "decoder":
            environment["LMCACHE_SAVE_DECODE_CACHE"] = "True"
    # Servers that share this directory (a process that imported LMCache has it set) would each report the sum of all.
    return Command(name, tuple(words), environment, ("PROMETHEUS_MULTIPROC_DIR", *plan.backend.clears))


def engine_arguments(plan: Plan[Any], role: str, name: str) -> list[str]:
    """What vLLM's engine of a role is given, in a server or by itself; ``name`` is unique to it ("": no connector)."""
    words = ["--tensor-parallel-size", str(plan.settings.tensor_parallel_size)]
    words += ["--max-model-len", str(plan.settings.max_model_len)]
    if name:
        transfer = plan.backend.transfer_config(KV_ROLES[role], name)
        words += ["--kv-transfer-config", json.dumps(transfer, separators=(",", ":"))]
    words += plan.profile.words("VLLM_ARGS")
    words += ["--enforce-eager"] if plan.settings.graphs == "off" else []
    words += plan.backend.vllm_arguments()
    memory = plan.profile.get("SHARED_GPU_MEMORY_UTILIZATION" if plan.cards.shared else "GPU_MEMORY_UTILIZATION")
    return words + (["--gpu-memory-utilization", memory] if memory else [])


def engine_environment(plan: Plan[Any], name: str) -> dict[str, str]:
    """The environment of the engine of a vLLM server, or of a role by itself."""
    values = common_environment(plan) | plan.profile.child_environment(
        plan.environ, graphs=plan.settings.graphs == "on"
    )
    values |= plan.backend.environment(name, plan.environ)
    values["DISAGG_KV_LOAD"] = plan.settings.kv_load
    if plan.model.is_local:
        values["HF_HUB_OFFLINE"] = "1"
    return values | plan.cards.environment(name)


# --- the others


def server_address(plan: Plan[Settings], name: str) -> int | str:
    """Port of a server by its name; the KV server may have a Unix socket instead."""
    if name == "kv-server":
        return plan.backend.address
    name = "proxy" if name == PLAIN_PROXY else plain_servers(plan).get(name, name)
    return getattr(plan.settings, f"{role_of(name)}_port") + number_of(name)


def plain_servers(plan: Plan[Settings]) -> dict[str, str]:
    """Names of the plain servers of a comparison, each with the server whose port and cards it takes."""
    return {PLAIN + (str(number) if number > 1 else ""): name for number, name in enumerate(plan.servers, start=1)}


def server_urls(plan: Plan[Settings], role: str) -> tuple[str, ...]:
    """The vLLM servers of a role: those on other machines that were named, else those on this one."""
    here = [name for name in plan.servers if role_of(name) == role]
    return getattr(plan.settings, f"{role}_url") or tuple(
        f"http://{authority(plan.reach, server_address(plan, name))}" for name in here
    )


def _proxy_program(plan: Plan[Settings]) -> list[str]:
    words = fill(plan.settings.proxy_program.split(), plan.interpreter.path)
    return [*words, "--host", plan.host, "--port", str(plan.settings.proxy_port)]


def _plain_proxy(plan: Plan[Settings]) -> list[str]:
    urls = [f"http://{authority(plan.reach, server_address(plan, name))}" for name in plain_servers(plan)]
    return [*_proxy_program(plan), "--decode-only", *(word for url in urls for word in ("--decoder", url))]


def _proxy(plan: Plan[Settings]) -> list[str]:
    words = _proxy_program(plan)
    if plan.settings.serve and STATUS_PAGE not in plan.environ:
        words.append("--status-page")
    words += ["--kv-hand-over", "params"] if plan.backend.hands_over else []
    return words + [word for role in ROLES for url in server_urls(plan, role) for word in (f"--{role}", url)]


def _load(plan: Plan[Settings]) -> list[str]:
    settings = plan.settings
    words = fill(settings.load_program.split(), plan.interpreter.path)
    words += ["--proxy-url", f"http://{authority(plan.reach, settings.proxy_port)}"]
    # Any prefiller gives the reference; each decoder counts its own reuse.
    words += ["--prefiller-url", server_urls(plan, "prefiller")[0]]
    words += [word for url in server_urls(plan, "decoder") for word in ("--decoder-url", url)]
    values = {
        "model": plan.model.served_name,
        "num-prompts": settings.num_prompts,
        "input-len": settings.input_len,
        "output-len": settings.output_len,
        "request-rate": f"{settings.request_rate[0]:g}",
        "max-model-len": settings.max_model_len,
        "run-dir": plan.run_dir,
        "device": settings.device,
        "backend": settings.backend,
        "tensor-parallel-size": settings.tensor_parallel_size,
        "reuse-block": plan.backend.reuse_block,
        "min-reuse-ratio": f"{settings.min_reuse_ratio:g}",
        "kv-load": settings.kv_load,
    }
    return words + [word for name, value in values.items() for word in (f"--{name}", str(value))]


def _compare(plan: Plan[Settings], step: str) -> list[str]:
    settings = plan.settings
    words = [*fill(settings.compare_program.split(), plan.interpreter.path), "--step", step]
    values = {
        "proxy-url": f"http://{authority(plan.reach, settings.proxy_port)}",
        "run-dir": plan.run_dir,
        "model": plan.model.served_name,
        "tokenizer": plan.model.name,
        "max-model-len": settings.max_model_len,
        "workload": settings.workload,
        "num-prompts": settings.num_prompts,
        "input-len": settings.input_len,
        "output-len": settings.output_len,
        "request-rate": ",".join(f"{rate:g}" for rate in settings.request_rate),
        "first-block": int(plan.run_id) << 20,
        "device": settings.device,
        "backend": settings.backend,
        "kv-load": settings.kv_load,
        "graphs": settings.graphs,
        "tensor-parallel-size": settings.tensor_parallel_size,
        "prefillers": settings.prefillers,
        "decoders": settings.decoders,
    }
    values |= {"burstiness": f"{settings.burstiness:g}"} if settings.burstiness else {}
    words += [word for name, value in values.items() for word in (f"--{name}", str(value))]
    words += ["--sweep"] if settings.sweep else []
    return words + (["--goodput", *settings.goodput] if settings.goodput else [])


def model_builder(plan: Plan[Any]) -> list[str]:
    """Builds the small model that the CPU serves."""
    return [*fill(plan.settings.model_builder.split(), plan.interpreter.path), "--output", plan.model.name]


def kv_server(plan: Plan[Any]) -> list[str]:
    """The backend's server."""
    return fill(plan.backend.server(), plan.interpreter.path)
