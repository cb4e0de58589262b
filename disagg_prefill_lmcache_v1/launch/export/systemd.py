"""systemd units of a stack on one machine: a service for each server, and a target for all of them."""

from __future__ import annotations

from disagg_prefill_lmcache_v1.launch.export.kubernetes import STOP_S
from disagg_prefill_lmcache_v1.launch.export.stack import Server, Stack

NAME = "disagg-prefill"
RUN_DIR = f"/run/{NAME}"
MADE = "Made by: python -m disagg_prefill_lmcache_v1.launch export systemd --device {device} --backend {backend}"
SAFE = (
    "NoNewPrivileges=yes", "ProtectSystem=strict", "ProtectHome=yes", "ProtectKernelTunables=yes", "PrivateTmp=yes",
    "ProtectControlGroups=yes", "RestrictSUIDSGID=yes", "LockPersonality=yes", "CapabilityBoundingSet=",
)  # fmt: skip


def units(stack: Stack) -> dict[str, str]:
    """Text of each unit by its file's name."""
    services = [f"{NAME}-{name}.service" for name in stack.servers]
    made = MADE.format(device=stack.settings.device, backend=stack.settings.backend)
    target = [
        f"# {made}", "[Unit]", "Description=Disaggregated prefill", f"Wants={' '.join(services)}", "",
        "[Install]", "WantedBy=multi-user.target",
    ]  # fmt: skip
    files = {f"{NAME}.target": "\n".join(target) + "\n"}
    for server in stack.servers.values():
        files[f"{NAME}-{server.name}.service"] = "\n".join([f"# {made}", *_unit(stack, server)]) + "\n"
    return files


def quoted(text: str) -> str:
    """A word of a unit file: systemd gives a meaning to %, $ and backslashes."""
    text = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{text}"'


def _unit(stack: Stack, server: Server) -> list[str]:
    settings = stack.settings
    # What a server needs is started before it and stopped after it: the proxy stops first and drains.
    before = [name for name in stack.servers if _rank(name) < _rank(server.name)]
    after = [f"{NAME}-{name}.service" for name in before]
    lines = ["[Unit]", f"Description=Disaggregated prefill: {server.name}", f"PartOf={NAME}.target"]
    lines += [f"{word}={' '.join(['network-online.target', *after])}" for word in ("After", "Wants")]
    path = f"{settings.root}/.venv/bin:/usr/local/bin:/usr/bin:/bin"
    lines += ["", "[Service]", f"User={NAME}", f"Environment={quoted(f'PATH={path}')}"]
    lines += [f"Environment={quoted(f'{name}={value}')}" for name, value in sorted(server.environment.items())]
    lines += [f"EnvironmentFile=-/etc/{NAME}/secrets.env"]  # HF_TOKEN, DISAGG_PROXY_API_KEY
    if server.secret_file:
        words = ("python3", "-m", "disagg_prefill_lmcache_v1.same_user", server.secret_file)
        lines += [f"ExecStartPre={_command(words)}"]
    if server.prepare:
        lines += [f"ExecStartPre={_command(server.prepare)}", f"ReadWritePaths=-{stack.models}"]
    # 2: a setting that is not allowed, which trying again does not change.
    lines += [f"ExecStart={_command(server.words)}", "Restart=on-failure", "RestartSec=5", "RestartPreventExitStatus=2"]
    lines += [f"TimeoutStopSec={(server.limit_s if server.name == 'proxy' else 0) + STOP_S}"]
    if server.runs_vllm or server.name == "kv-server":
        lines += [f"RuntimeDirectory={NAME}", "RuntimeDirectoryPreserve=yes"]
    if server.runs_vllm:
        lines += [f"CacheDirectory={NAME}", f"Environment={quoted(f'HOME=/var/cache/{NAME}')}"]
    return [*lines, *SAFE, "", "[Install]", f"WantedBy={NAME}.target"]


def _rank(name: str) -> int:
    return 2 if name == "proxy" else 0 if name == "kv-server" else 1


def _command(words: tuple[str, ...]) -> str:
    """env finds the program on PATH; $ has to be doubled in a command alone."""
    return " ".join(["/usr/bin/env", *(quoted(word).replace("$", "$$") for word in words)])
