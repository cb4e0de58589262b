"""Device profiles for Python: the files in profiles/ that the launch scripts read too.

``load_profile("cpu")`` gives the settings, the environment and vLLM's arguments of a device; reading never executes.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "profiles"
DEVICES = ("hpu", "cuda", "cpu")


class ProfileError(ValueError):
    """A profile that cannot be read, or a device that has none; the text says which and what is allowed."""


@dataclass(frozen=True)
class Profile:
    """What is known about a device: ``settings`` by key, and the ``environment`` its vLLM processes need."""

    device: str
    settings: Mapping[str, str]
    environment: Mapping[str, str]

    def vllm_arguments(self) -> list[str]:
        """The words that the profile adds to vLLM's command line."""
        return self.settings.get("VLLM_ARGS", "").split()

    def child_environment(self, environ: Mapping[str, str] | None = None) -> dict[str, str]:
        """The profile's environment, in which the caller's own values win. Changes nothing."""
        environ = os.environ if environ is None else environ
        return {name: environ.get(name) or value for name, value in self.environment.items()}

    def card_sets(
        self, ranks: int, processes: int = 2, *, environ: Mapping[str, str] | None = None, shared: bool = False
    ) -> list[dict[str, str]]:
        """For each process the variable that gives it its own cards; empty on a device without such a variable.

        With ``shared`` all processes get the first cards. Cards come from the variable in the caller's environment if
        it is set. Raises ProfileError if that one lists too few.
        """
        variable = self.settings.get("VISIBLE_DEVICES_VARIABLE", "")
        if not variable:
            return [{} for _ in range(processes)]
        environ = os.environ if environ is None else environ
        each = ranks * int(self.settings["CARDS_PER_RANK"])
        needed = each if shared else each * processes
        visible = environ.get(variable, "")
        cards = [str(card) for card in range(needed)] if visible in ("", "all") else visible.split(",")
        if len(cards) < needed:
            raise ProfileError(f"{variable}={visible} lists {len(cards)} card(s), {needed} needed")
        starts = [0 if shared else index * each for index in range(processes)]
        return [{variable: ",".join(cards[start : start + each])} for start in starts]


def read_file(path: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Settings and environment of one profile file. Raises ProfileError for a line that is not KEY=VALUE."""
    settings: dict[str, str] = {}
    environment: dict[str, str] = {}
    for raw in path.read_text().splitlines():
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
    """The profile of ``hpu``, ``cuda`` or ``cpu``, on top of the common one. Raises ProfileError for another name."""
    if device not in DEVICES:
        raise ProfileError(f"device {device!r}: allowed: {', '.join(DEVICES)}")
    settings, environment = read_file(FOLDER / "common.env")
    own_settings, own_environment = read_file(FOLDER / f"{device}.env")
    return Profile(device, {**settings, **own_settings}, {**environment, **own_environment})


def count_cards(device: str) -> int:
    """How many cards the device's own tool lists; 0 if the tool is missing or finds none."""
    settings, _ = read_file(FOLDER / f"{device}.env")
    command = settings.get("LIST_CARDS", "").split()
    if not command or shutil.which(command[0]) is None:
        return 0
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(bool(re.search(settings["CARD_ROW"], line)) for line in listed.splitlines())


def detect_device() -> str:
    """The first accelerator of which a card is listed, else ``cpu``."""
    return next((device for device in DEVICES if count_cards(device)), "cpu")
