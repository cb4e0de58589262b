"""Device profiles: the KEY=VALUE files in profiles/, read as data and never executed.

What a person may set has a field in settings.py too, for which the profile's value is the fallback. ``ENV_<NAME>``
entries are the environment of the device's vLLM processes, ``GRAPHS_ENV_<NAME>`` what differs with ``--graphs on``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
REPOSITORY = PACKAGE.parent
FOLDER = PACKAGE / "profiles"
DEVICES = ("hpu", "cuda", "cpu")


class ProfileError(ValueError):
    """A profile that cannot be read, or a device that has none; the text says which and what is allowed."""


@dataclass(frozen=True)
class Profile:
    """What is known about a device: ``settings`` by key, and the ``environment`` its vLLM processes need."""

    device: str
    settings: Mapping[str, str]
    environment: Mapping[str, str]

    def get(self, key: str) -> str:
        """A setting, "" where the device has none."""
        return self.settings.get(key, "")

    def words(self, key: str) -> list[str]:
        """A setting that is several words."""
        return self.get(key).split()

    def child_environment(self, environ: Mapping[str, str], *, graphs: bool) -> dict[str, str]:
        """The environment of a vLLM process, in which the caller's own values win."""
        values = dict(self.environment)
        if graphs:
            begin = "GRAPHS_ENV_"
            values |= {key[len(begin) :]: value for key, value in self.settings.items() if key.startswith(begin)}
        return {name: environ.get(name) or value for name, value in sorted(values.items())}


def read_file(path: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Settings and environment of one profile file.

    Raises:
        ProfileError: a line that is not KEY=VALUE, or no such file.
    """
    settings: dict[str, str] = {}
    environment: dict[str, str] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ProfileError(f"cannot read the profile {path}: {error.strerror}") from error
    for raw in lines:
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        match = re.fullmatch(r"([A-Z][A-Za-z0-9_]*)=(.*)", line)
        if match is None:
            raise ProfileError(f"{path}: this line is not KEY=VALUE: {line}")
        key, value = match.groups()
        if len(value) >= 2 and value[0] == value[-1] and value[0] in "\"'":
            value = value[1:-1]
        if key.startswith("ENV_"):
            environment[key[len("ENV_") :]] = value
        else:
            settings[key] = value
    return settings, environment


def load_profile(device: str) -> Profile:
    """The profile of ``hpu``, ``cuda`` or ``cpu``, on top of the common one. Raises ProfileError."""
    if device not in DEVICES:
        raise ProfileError(f"device {device!r}: allowed: {', '.join(DEVICES)}")
    settings, environment = read_file(FOLDER / "common.env")
    own_settings, own_environment = read_file(FOLDER / f"{device}.env")
    return Profile(device, {**settings, **own_settings}, {**environment, **own_environment})
