"""A kustomize tree of all devices and ways of the KV cache: base, overlays and components, made by comparing stacks.

The base is what the stacks of all devices have in common. An overlay adds what one device has beyond that, a component
changes the way of the KV cache in any of them: both are strategic merge patches, the differences of two stacks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from disagg_prefill_lmcache_v1.launch.export.kubernetes import Data, autoscalers, manifests
from disagg_prefill_lmcache_v1.launch.export.stack import Stack
from disagg_prefill_lmcache_v1.launch.export.yaml_text import dump, dump_all

OVERLAYS = {"cpu": "cpu", "cuda": "cuda", "gaudi": "hpu"}
COMPONENTS = ("redis",)
# What tells the items of a list apart, by the name of the list; other lists are replaced as a whole.
KEYS = {"containers": "name", "initContainers": "name", "env": "name", "volumes": "name", "volumeMounts": "mountPath",
        "ports": "containerPort"}  # fmt: skip
MADE = "Made by: python -m disagg_prefill_lmcache_v1.launch export kustomize --output deploy/kubernetes"
_GROUP = "kustomize.config.k8s.io/"


def tree(stack_of: Callable[[str, str], Stack]) -> dict[str, str]:
    """Text of every file by its path; ``stack_of`` makes the stack of a device and a backend."""
    lm = {name: objects_of(stack_of(device, "lm")) for name, device in OVERLAYS.items()}
    first = lm["cpu"]
    common = {key: intersection([objects[key] for objects in lm.values()]) for key in first}
    stack = stack_of("cpu", "lm")
    files = {}
    by_file = {name: [common[identity(each)] for each in objects] for name, objects in manifests(stack).items()}
    for name, objects in by_file.items():
        files[f"base/{name}"] = dump_all(objects)
    files["base/kustomization.yaml"] = kustomization({"resources": sorted(by_file)})
    for name, objects in lm.items():
        files |= patched(f"overlays/{name}", common, objects, {"resources": ["../../base"]})
    for backend in COMPONENTS:
        device = OVERLAYS["cuda"]
        files |= patched(f"components/{backend}", lm["cuda"], objects_of(stack_of(device, backend)), {}, "Component")
        files[f"overlays/{backend}/kustomization.yaml"] = kustomization(
            {"resources": ["../cuda"], "components": [f"../../components/{backend}"]}
        )
    # No component: the servers' commands are others, with the device's own words in them.
    nixl = objects_of(stack_of(OVERLAYS["cuda"], "nixl"))
    files |= patched("overlays/nixl", lm["cuda"], nixl, {"resources": ["../cuda"]})
    files["components/autoscaling/autoscalers.yaml"] = dump_all(autoscalers(stack))
    # An autoscaler sets the number of replicas; a manifest that sets it too would reset it each time.
    target = {"target": {"kind": "Deployment", "name": "(proxy|prefiller|decoder)"}}
    remove = dump([{"op": "remove", "path": "/spec/replicas"}])
    files["components/autoscaling/kustomization.yaml"] = kustomization(
        {"resources": ["autoscalers.yaml"], "patches": [{**target, "patch": remove}]}, "Component"
    )
    return files


def identity(thing: Data) -> tuple[str, str]:
    """Kind and name."""
    return thing["kind"], thing["metadata"]["name"]


def objects_of(stack: Stack) -> dict[tuple[str, str], Data]:
    """All objects of a stack."""
    return {identity(each): each for objects in manifests(stack).values() for each in objects}


def kustomization(content: Data, kind: str = "Kustomization") -> str:
    """A kustomization.yaml."""
    version = "v1alpha1" if kind == "Component" else "v1beta1"
    return f"# {MADE}\n" + dump({"apiVersion": _GROUP + version, "kind": kind, **content})


def patched(folder: str, base: dict[Any, Data], wanted: dict[Any, Data], content: Data, kind: str = "Kustomization"):
    """The files of a folder that makes ``wanted`` of ``base``."""
    patches = {}
    for key, old in base.items():
        meta = {each: old["metadata"][each] for each in ("name", "namespace") if each in old["metadata"]}
        head = {"apiVersion": old["apiVersion"], "kind": old["kind"], "metadata": meta}
        if key not in wanted:
            patches[key] = {"$patch": "delete", **head}
        elif changes := difference(old, wanted[key]):
            patches[key] = {**head, **changes}
    added = [each for key, each in wanted.items() if key not in base]
    files = {f"{folder}/added.yaml": dump_all(added)} if added else {}
    names = []
    for (kind_of, name), patch in patches.items():
        names.append(f"{name}-{kind_of.lower()}.yaml")
        files[f"{folder}/{names[-1]}"] = dump(patch)
    content = {**content, **({"resources": ["added.yaml"]} if added else {})}
    files[f"{folder}/kustomization.yaml"] = kustomization(
        {**content, "patches": [{"path": name} for name in sorted(names)]}, kind
    )
    return files


def intersection(values: list[Any], name: str = "") -> Any:
    """What all have; None if that is nothing."""
    first, key = values[0], KEYS.get(name)
    if all(value == first for value in values):
        return first
    if all(isinstance(value, dict) for value in values):
        shared = {each: intersection([value[each] for value in values], each) for each in first
                  if all(each in value for value in values)}  # fmt: skip
        return {each: value for each, value in shared.items() if value is not None} or None
    if key and all(isinstance(value, list) and all(key in item for item in value) for value in values):
        tables = [keyed(value, key) for value in values]
        items = {each: intersection([table[each] for table in tables]) for each in tables[0]
                 if all(each in table for table in tables)}  # fmt: skip
        return [item for item in items.values() if len(item) > 1] or None
    return None


def difference(old: Any, new: Any, name: str = "") -> Any:
    """The strategic merge patch that makes ``new`` of ``old``; {} if they are equal."""
    if old == new:
        return {}
    if isinstance(old, dict) and isinstance(new, dict):
        changes: Data = {each: None for each in old if each not in new}
        for each, value in new.items():
            if each not in old:
                changes[each] = value
            elif old[each] != value:
                changes[each] = difference(old[each], value, each)
        return changes
    key = KEYS.get(name)
    if key and isinstance(old, list) and isinstance(new, list) and all(key in each for each in (*old, *new)):
        before, after = keyed(old, key), keyed(new, key)
        changed = [{key: each, **difference(before.get(each, {}), item)} for each, item in after.items()
                   if before.get(each) != item]  # fmt: skip
        return changed + [{key: each, "$patch": "delete"} for each in before if each not in after]
    return new


def keyed(items: list[Data], key: str) -> dict[Any, Data]:
    """The items by what tells them apart."""
    return {item[key]: item for item in items}
