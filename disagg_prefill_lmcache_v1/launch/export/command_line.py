"""``python -m disagg_prefill_lmcache_v1.launch export kubernetes|kustomize|compose|systemd --output DIR``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from disagg_prefill_lmcache_v1.launch.export.compose import compose
from disagg_prefill_lmcache_v1.launch.export.kubernetes import manifests
from disagg_prefill_lmcache_v1.launch.export.kustomize import kustomization, tree
from disagg_prefill_lmcache_v1.launch.export.settings import ExportSettings
from disagg_prefill_lmcache_v1.launch.export.stack import Stack, describe
from disagg_prefill_lmcache_v1.launch.export.systemd import RUN_DIR, units
from disagg_prefill_lmcache_v1.launch.export.yaml_text import dump_all
from disagg_prefill_lmcache_v1.launch.messages import Failure, UsageError, exit_status
from disagg_prefill_lmcache_v1.launch.settings import Configuration, read_configuration

FORMATS = ("kubernetes", "kustomize", "compose", "systemd")
PROG = "python -m disagg_prefill_lmcache_v1.launch export"
STORE_PORT = 8300  # one for all ways of the KV cache, so that a component need not change it


def main(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """The exit status."""
    return exit_status(lambda: run(argv, environ))


def run(argv: Sequence[str], environ: Mapping[str, str]) -> None:
    """Raises Failure."""
    configuration = read(argv, environ)
    output, words = configuration.settings.output, configuration.words
    if len(words) != 1 or words[0] not in FORMATS:
        raise UsageError(f"name what to write: allowed: {', '.join(FORMATS)}")
    if output is None:
        raise UsageError("--output is needed: the folder that the files are written to")
    for name, text in render(words[0], argv, configuration, environ).items():
        path = output / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise Failure(f"cannot write {path}: {error.strerror}") from error
        print(path)


def read(argv: Sequence[str], environ: Mapping[str, str]) -> Configuration[ExportSettings]:
    """The settings; the interpreter is the target's. Raises UsageError."""
    return read_configuration(
        ExportSettings, argv, environ, prog=f"{PROG} {'|'.join(FORMATS)}",
        description="Writes the stack as files for Kubernetes, compose or systemd.", words=True,
    )  # fmt: skip


def render(
    form: str, argv: Sequence[str], configuration: Configuration[ExportSettings], environ: Mapping[str, str]
) -> dict[str, str]:
    """Text of each file by its path. Raises UsageError."""
    if form == "kustomize":
        for name in ("device", "backend", "kv_port"):
            if configuration.given(name):
                raise UsageError(f"{configuration.source(name)}: kustomize writes all of them; for one: kubernetes")

        def stack_of(device: str, backend: str) -> Stack:
            flags = ["--device", device, "--backend", backend]
            port = [] if backend == "nixl" else ["--kv-port", str(STORE_PORT)]
            return _describe(read([*flags, *port, *argv], environ), environ, apart=True)

        return tree(stack_of)
    stack = _describe(configuration, environ, apart=form != "systemd")
    if form == "compose":
        return compose(stack)
    if form == "systemd":
        return units(stack)
    files = manifests(stack)
    texts = {name: dump_all(objects) for name, objects in files.items()}
    return {**texts, "kustomization.yaml": kustomization({"resources": sorted(files)})}


def _describe(configuration: Configuration[ExportSettings], environ: Mapping[str, str], *, apart: bool) -> Stack:
    settings = configuration.settings
    python = settings.python or ("python3" if apart else f"{settings.root}/.venv/bin/python")
    settings = replace(settings, python=python, run_dir=settings.run_dir or (None if apart else Path(RUN_DIR)))
    return describe(replace(configuration, settings=settings), environ, apart=apart)
