"""Kubernetes objects of a stack, as plain data: a Deployment and a Service for each server, and who may reach whom."""

from __future__ import annotations

from typing import Any

from disagg_prefill_lmcache_v1.launch.export.stack import PASSWORD, SIDE_HOST, Server, Stack

Data = dict[str, Any]

USER = 10001  # made in both Containerfiles
SECRET = "disagg-prefill"
REQUIRED = ("REDIS_PASSWORD",)  # of what is in it
LABEL = "app.kubernetes.io/component"
PART_OF = {"app.kubernetes.io/part-of": "disagg-prefill"}
CACHE = "/cache"
MONITORING = "monitoring"  # namespace that Prometheus runs in
STOP_S = 30  # from the end of the drain to KILL


def manifests(stack: Stack) -> dict[str, list[Data]]:
    """All objects by the file that they go to."""
    files = {"namespace.yaml": [namespace(stack)]}
    for server in stack.servers.values():
        objects = [deployment(stack, server), service(stack, server)]
        files[f"{server.name}.yaml"] = objects + ([] if server.name == "kv-server" else [disruption(stack, server)])
    return {**files, "network-policies.yaml": policies(stack)}


def named(stack: Stack, kind: str, version: str, name: str, spec: Data) -> Data:
    """An object of the stack's namespace."""
    meta = {"name": name, "namespace": stack.settings.namespace, "labels": {**PART_OF, LABEL: name}}
    return {"apiVersion": version, "kind": kind, "metadata": meta, "spec": spec}


def namespace(stack: Stack) -> Data:
    """The namespace, which refuses pods that could do more than these need."""
    labels = {**PART_OF, "pod-security.kubernetes.io/enforce": "restricted"}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": stack.settings.namespace, "labels": labels}}


def chosen(*names: str) -> Data:
    """A selector of the pods of these servers."""
    if len(names) == 1:
        return {"matchLabels": {LABEL: names[0]}}
    return {"matchExpressions": [{"key": LABEL, "operator": "In", "values": list(names)}]}


# --- servers


def deployment(stack: Stack, server: Server) -> Data:
    """Restarts it where it fails; a new version comes up before the old one goes, where there is room for both."""
    keeps = server.name == "kv-server"  # two at once would each have half of the KV
    surge = {"maxSurge": 1, "maxUnavailable": 0} if server.name == "proxy" else {"maxSurge": 0, "maxUnavailable": 1}
    annotations = {"prometheus.io/scrape": "true", "prometheus.io/port": str(server.port)}
    meta: Data = {"labels": {**PART_OF, LABEL: server.name}}
    if server.health:
        meta["annotations"] = annotations
    spec = {
        "replicas": 2 if server.name == "proxy" else 1,
        "selector": chosen(server.name),
        "strategy": {"type": "Recreate"} if keeps else {"type": "RollingUpdate", "rollingUpdate": surge},
        "template": {"metadata": meta, "spec": pod(stack, server)},
    }
    return named(stack, "Deployment", "apps/v1", server.name, spec)


def pod(stack: Stack, server: Server) -> Data:
    """A pod that needs no rights: not root, nothing of the root file system is written."""
    volumes: list[Data] = [{"name": "tmp", "emptyDir": {}}]
    if server.runs_vllm:
        volumes += [{"name": "cache", "emptyDir": {}}, {"name": "shm", "emptyDir": {"medium": "Memory"}}]
    if server.prepare:
        volumes += [{"name": "models", "emptyDir": {}}]
    found: Data = {
        # Service links would set DISAGG_..._PORT and the like, which are settings here.
        "enableServiceLinks": False,
        "automountServiceAccountToken": False,
        "securityContext": {
            "runAsNonRoot": True, "runAsUser": USER, "runAsGroup": USER, "fsGroup": USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "terminationGracePeriodSeconds": server.settle_s + server.limit_s + STOP_S,
        "containers": [container(stack, server)],
        "volumes": volumes,
    }  # fmt: skip
    if server.prepare:
        kept = ("image", "resources", "securityContext", "volumeMounts")
        values = [{"name": name, "value": value} for name, value in sorted(server.prepare_environment.items())]
        first = {key: value for key, value in found["containers"][0].items() if key in kept}
        found["initContainers"] = [{"name": "model", "command": list(server.prepare), "env": values, **first}]
    if server.name == "proxy":
        found["topologySpreadConstraints"] = [
            {"maxSkew": 1, "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "ScheduleAnyway",
             "labelSelector": chosen("proxy")}
        ]  # fmt: skip
    return found


def container(stack: Stack, server: Server) -> Data:
    """The server itself."""
    mounts = [{"name": "tmp", "mountPath": "/tmp"}]
    if server.runs_vllm:
        mounts += [{"name": "cache", "mountPath": CACHE}, {"name": "shm", "mountPath": "/dev/shm"}]
    if server.prepare:
        mounts += [{"name": "models", "mountPath": stack.models}]
    ports = [{"name": "main", "containerPort": server.port}]
    ports += [{"name": f"kv-{index}", "containerPort": port} for index, port in enumerate(server.more_ports)]
    found: Data = {
        "name": "main",
        "image": server.image,
        "command": [expanded(word) for word in server.words],
        "env": environment(server),
        "ports": ports,
        "resources": resources(stack, server),
        "securityContext": {
            "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": mounts,
    }  # fmt: skip
    if drain := drain_command(server):
        found["lifecycle"] = {"preStop": {"exec": {"command": drain}}}
    return found | probes(server)


def expanded(text: str) -> str:
    """Kubernetes fills in $(NAME) from the environment."""
    return text.replace("$(", "$$(").replace(PASSWORD, "$(REDIS_PASSWORD)")


def environment(server: Server) -> list[Data]:
    """Secrets first: what follows may refer to them."""
    found: list[Data] = []
    for name, key in server.secrets.items():
        optional = {} if name in REQUIRED else {"optional": True}
        found.append({"name": name, "valueFrom": {"secretKeyRef": {"name": SECRET, "key": key, **optional}}})
    values = {name: expanded(value) for name, value in server.environment.items()}
    if server.runs_vllm:  # the models of Hugging Face, compiled graphs and kernels
        values |= {"HOME": CACHE, "HF_HOME": f"{CACHE}/huggingface"}
    if values.pop(SIDE_HOST, None):
        found.append({"name": SIDE_HOST, "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}})
    return found + [{"name": name, "value": value} for name, value in sorted(values.items())]


def resources(stack: Stack, server: Server) -> Data:
    """What it asks for; its cards, where the device has any."""
    limits: Data = {"memory": server.memory_limit}
    if server.cards:
        limits[stack.profile.get("CARD_RESOURCE")] = server.cards
    return {"requests": {"cpu": server.cpu, "memory": server.memory}, "limits": limits}


def drain_command(server: Server) -> list[str]:
    """What runs before TERM: the server serves on while others learn that it goes, then until it is idle."""
    if not server.settle_s and not server.limit_s:
        return []
    words = ["python3", "-m", "disagg_prefill_lmcache_v1.launch.drain", "--settle", str(server.settle_s)]
    if not server.runs_vllm:  # the proxy lets its requests end after TERM
        return words
    return [*words, "--limit", str(server.limit_s), "--url", f"http://127.0.0.1:{server.port}"]


def probes(server: Server) -> Data:
    """Startup waits for the model, readiness is quick, liveness gives up on a server that is stuck for a minute."""
    port: Data = {"port": "main"}
    asked: Data = {"httpGet": {"path": server.health, **port}} if server.health else {"tcpSocket": port}
    return {
        "startupProbe": {**asked, "periodSeconds": 5, "timeoutSeconds": 5, "failureThreshold": -(-server.ready_s // 5)},
        "readinessProbe": {**asked, "periodSeconds": 5, "timeoutSeconds": 5, "failureThreshold": 3},
        "livenessProbe": {**asked, "periodSeconds": 10, "timeoutSeconds": 10, "failureThreshold": 6},
    }


def service(stack: Stack, server: Server) -> Data:
    """A name for its pods; headless for vLLM servers, so that the proxy sees each."""
    spec: Data = {"clusterIP": "None"} if server.runs_vllm else {"type": "ClusterIP"}
    spec |= {"selector": {LABEL: server.name}, "ports": [{"name": "main", "port": server.port, "targetPort": "main"}]}
    return named(stack, "Service", "v1", server.name, spec)


def disruption(stack: Stack, server: Server) -> Data:
    """Nodes are emptied one pod of a server at a time."""
    spec = {"maxUnavailable": 1, "selector": chosen(server.name)}
    return named(stack, "PodDisruptionBudget", "policy/v1", server.name, spec)


# --- who may reach whom


def policies(stack: Stack) -> list[Data]:
    """Nobody reaches a pod but those who need it: clients the proxy, it the servers, these the store."""
    kind, version = "NetworkPolicy", "networking.k8s.io/v1"
    found = [named(stack, kind, version, "all", {"podSelector": {}, "policyTypes": ["Ingress"]})]
    scrapers = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": MONITORING}}}
    for server in stack.servers.values():
        port = [{"protocol": "TCP", "port": server.port}]
        rules: list[Data] = [{"ports": port}]
        if server.name == "kv-server":
            rules = [{"from": [{"podSelector": chosen(*stack.vllm_servers)}], "ports": port}]
        elif server.runs_vllm:
            rules = [{"from": [{"podSelector": chosen("proxy")}, scrapers], "ports": port}]
            if stack.settings.backend == "nixl":  # NIXL's transport takes ports as it likes
                rules += [{"from": [{"podSelector": chosen(*stack.vllm_servers)}]}]
        spec = {"podSelector": chosen(server.name), "policyTypes": ["Ingress"], "ingress": rules}
        found.append(named(stack, kind, version, server.name, spec))
    return found


def autoscalers(stack: Stack) -> list[Data]:
    """More servers where requests wait. The numbers are vLLM's, by prometheus-adapter (monitoring/)."""

    def on(name: str, value: str) -> Data:
        target = {"type": "AverageValue", "averageValue": value}
        return {"type": "Pods", "pods": {"metric": {"name": name}, "target": target}}

    load = {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 70}}
    wanted = {
        "proxy": (2, 8, [{"type": "Resource", "resource": load}]),
        "prefiller": (1, 8, [on("vllm_num_requests_waiting", "2")]),
        "decoder": (1, 8, [on("vllm_num_requests_waiting", "2"), on("vllm_kv_cache_usage_perc", "800m")]),
    }
    found = []
    for name, (low, high, metrics) in wanted.items():
        slow = {"scaleDown": {"stabilizationWindowSeconds": 600, "policies": [
            {"type": "Pods", "value": 1, "periodSeconds": 300}]}}  # fmt: skip
        spec = {
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": name},
            "minReplicas": low, "maxReplicas": high, "metrics": metrics, "behavior": slow,
        }  # fmt: skip
        found.append(named(stack, "HorizontalPodAutoscaler", "autoscaling/v2", name, spec))
    return found
