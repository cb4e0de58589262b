"""Renders the kustomizations in deploy/ as ``kubectl kustomize`` does, as far as they need it.

Resources, components, strategic merge patches by file with ``$patch: delete`` and null, JSON patches that remove.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import yaml

Objects = dict[tuple[str, str], dict[str, Any]]
KEYS = {"containers": "name", "initContainers": "name", "env": "name", "volumes": "name", "volumeMounts": "mountPath"}
KNOWN = {"apiVersion", "kind", "resources", "components", "patches"}


def key_of(thing: dict[str, Any]) -> tuple[str, str]:
    return thing["kind"], thing["metadata"]["name"]


def render(folder: Path, objects: Objects | None = None) -> Objects:
    """Objects by kind and name; a component changes ``objects``."""
    content = yaml.safe_load((folder / "kustomization.yaml").read_text())
    assert set(content) <= KNOWN, f"{folder}: {set(content) - KNOWN}"
    found: Objects = {} if objects is None else objects
    for name in content.get("resources", ()):
        path = (folder / name).resolve()
        more = render(path) if path.is_dir() else read(path)
        assert not set(more) & set(found), f"{name} in {folder}: there already"
        found |= more
    for name in content.get("components", ()):
        render((folder / name).resolve(), found)
    for patch in content.get("patches", ()):
        if "path" in patch:
            apply(found, yaml.safe_load((folder / patch["path"]).read_text()))
        else:
            remove(found, patch)
    return found


def read(path: Path) -> Objects:
    return {key_of(each): each for each in yaml.safe_load_all(path.read_text())}


def apply(objects: Objects, patch: dict[str, Any]) -> None:
    key = key_of(patch)
    assert key in objects, f"a patch of what is not there: {key}"
    assert patch["metadata"]["namespace"] == objects[key]["metadata"]["namespace"]
    if patch.get("$patch") == "delete":
        del objects[key]
    else:
        objects[key] = merge(objects[key], patch)


def remove(objects: Objects, patch: dict[str, Any]) -> None:
    target = patch["target"]
    chosen = [each for (kind, name), each in objects.items()
              if kind == target["kind"] and re.fullmatch(target["name"], name)]  # fmt: skip
    assert chosen, target
    for thing in chosen:
        for step in yaml.safe_load(patch["patch"]):
            *path, last = step["path"].strip("/").split("/")
            place = thing
            for part in path:
                place = place[part]
            assert step["op"] == "remove"
            del place[last]


def merge(old: Any, new: Any, name: str = "") -> Any:
    if isinstance(old, dict) and isinstance(new, dict):
        out = copy.deepcopy(old)
        for key, value in new.items():
            if value is None:
                out.pop(key, None)
            else:
                out[key] = merge(out[key], value, key) if key in out else value
        return out
    key = KEYS.get(name) or (
        "containerPort" if name == "ports" and any("containerPort" in each for each in new) else ""
    )
    if key and isinstance(old, list):
        items = {each[key]: each for each in old}
        for each in new:
            if each.get("$patch") == "delete":
                del items[each[key]]
            else:
                items[each[key]] = merge(items.get(each[key], {}), each)
        before = {each[key] for each in old}  # what is new comes first
        return sorted(items.values(), key=lambda each: each[key] in before)
    return new
