"""A compose file of a stack: one machine, a container for each server, networks that keep the store to the servers."""

from __future__ import annotations

from typing import Any

from disagg_prefill_lmcache_v1.launch.export.kubernetes import CACHE, REQUIRED, STOP_S
from disagg_prefill_lmcache_v1.launch.export.stack import PASSWORD, Server, Stack
from disagg_prefill_lmcache_v1.launch.export.yaml_text import dump

Data = dict[str, Any]

MADE = "Made by: python -m disagg_prefill_lmcache_v1.launch export compose --device {device} --backend {backend}"
NETWORKS = {"proxy": ("front", "servers"), "kv-server": ("store",)}
ASKED = ":?in a file .env beside this one"  # for what must be there
PROBE = "import urllib.request as r; r.urlopen('http://127.0.0.1:{port}{path}', timeout=5)"
CONNECT = "import socket; socket.create_connection(('127.0.0.1', {port}), 5)"


def compose(stack: Stack) -> dict[str, str]:
    """The file's text by its name."""
    services: Data = {}
    for server in stack.servers.values():
        if server.prepare and "model" not in services:
            services["model"] = _model(stack, server)
        services[server.name] = _service(stack, server)
    volumes = {"cache": {}, **({"models": {}} if "model" in services else {})}
    networks = {"front": {}, "servers": {}, "store": {"internal": True}}
    content = {"name": stack.settings.namespace, "services": services, "volumes": volumes, "networks": networks}
    made = MADE.format(device=stack.settings.device, backend=stack.settings.backend)
    return {"compose.yaml": f"# {made}\n" + dump(content)}


def _text(text: str) -> str:
    """Compose fills in ${NAME}."""
    return text.replace("$", "$$").replace(PASSWORD, f"${{REDIS_PASSWORD{ASKED}}}")


def _common(stack: Stack, server: Server) -> Data:
    """What every container has: no rights, a root file system that is only read."""
    volumes = ([f"cache:{CACHE}"] if server.runs_vllm else []) + ([f"models:{stack.models}"] if server.prepare else [])
    environment = {name: _text(value) for name, value in sorted(server.environment.items())}
    if server.runs_vllm:
        environment |= {"HOME": CACHE, "HF_HOME": f"{CACHE}/huggingface"}
    found: Data = {"image": server.image}
    if server.image != stack.settings.redis_image:
        file = "proxy" if server.name == "proxy" else f"server{'-cpu' if stack.settings.device == 'cpu' else ''}"
        found["build"] = {"context": "../..", "dockerfile": f"deploy/containers/{file}.Containerfile"}
    return found | {
        "read_only": True, "cap_drop": ["ALL"], "security_opt": ["no-new-privileges:true"], "tmpfs": ["/tmp"],
        "environment": environment, **({"volumes": volumes} if volumes else {}),
    }  # fmt: skip


def _model(stack: Stack, server: Server) -> Data:
    """Builds the model once, before the servers start."""
    found = {**_common(stack, server), "entrypoint": list(server.prepare), "network_mode": "none"}
    return {**found, "environment": {**dict(sorted(server.prepare_environment.items())), "HOME": CACHE}}


def _service(stack: Stack, server: Server) -> Data:
    found = _common(stack, server)
    found["entrypoint"] = [_text(word) for word in server.words]
    found["networks"] = list(NETWORKS.get(server.name, ("servers", "store")))
    for name in server.secrets:
        if name != "REDIS_PASSWORD":
            found["environment"][name] = f"${{{name}{ASKED if name in REQUIRED else ':-'}}}"
    before = {"proxy": stack.vllm_servers, "kv-server": ()}.get(server.name, ("kv-server",))
    waits: Data = {name: {"condition": "service_healthy"} for name in before if name in stack.servers}
    if server.prepare:
        waits["model"] = {"condition": "service_completed_successfully"}
    if waits:
        found["depends_on"] = waits
    if server.name == "proxy":  # this machine alone; the key and TLS come first where others are to reach it
        found["ports"] = [f"127.0.0.1:{server.port}:{server.port}"]
    test = ["CMD", "python3", "-c", (PROBE if server.health else CONNECT).format(port=server.port, path=server.health)]
    if server.image == stack.settings.redis_image:
        test = ["CMD-SHELL", f"redis-cli -p {server.port} ping | grep -E 'PONG|NOAUTH'"]
    found["healthcheck"] = {
        "test": test, "interval": "5s", "timeout": "10s", "retries": 3, "start_period": f"{server.ready_s}s",
    }  # fmt: skip
    # It is stopped in the order of depends_on, the proxy first: nothing is left to drain in the servers after it.
    found["stop_grace_period"] = f"{(server.limit_s if server.name == 'proxy' else 0) + STOP_S}s"
    found["restart"] = "unless-stopped"
    found |= _cards(stack, server)
    if stack.settings.device == "hpu" and server.cards:
        found["environment"]["HABANA_VISIBLE_DEVICES"] = ",".join(_numbers(stack, server))
    return found


def _numbers(stack: Stack, server: Server) -> list[str]:
    """The first cards for the first server, the next ones for the second."""
    first = stack.vllm_servers.index(server.name) * server.cards
    return [str(first + index) for index in range(server.cards)]


def _cards(stack: Stack, server: Server) -> Data:
    """What gives a container its cards, and shared memory for its ranks."""
    if not server.cards:
        return {"shm_size": "2gb"} if server.runs_vllm else {}
    if stack.settings.device == "hpu":
        return {"shm_size": "8gb", "runtime": "habana", "cap_add": ["SYS_NICE"]}
    device = {"driver": "nvidia", "device_ids": _numbers(stack, server), "capabilities": ["gpu"]}
    return {"shm_size": "8gb", "deploy": {"resources": {"reservations": {"devices": [device]}}}}
