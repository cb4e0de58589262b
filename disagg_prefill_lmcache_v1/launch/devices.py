"""The machine's accelerator cards: which device is there, and which cards each vLLM process gets."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from disagg_prefill_lmcache_v1.launch.messages import Progress
from disagg_prefill_lmcache_v1.launch.profiles import DEVICES, Profile, load_profile

TOOL_TIMEOUT_S = 30
TICK_S = 0.2


def list_rows(words: Sequence[str], pattern: str) -> list[str]:
    """The lines of a tool's output that match; none if the tool is missing, fails or hangs."""
    if not words or shutil.which(words[0]) is None:
        return []
    listed = ""
    with contextlib.suppress(OSError), Progress() as progress, subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, errors="replace",
    ) as process:  # fmt: skip
        while progress.elapsed_s < TOOL_TIMEOUT_S:
            with contextlib.suppress(subprocess.TimeoutExpired):
                listed = process.communicate(timeout=TICK_S)[0]
                break
            progress.show(f"waiting for {words[0]} (at most {TOOL_TIMEOUT_S} s)")
        else:
            process.kill()
    return [line.strip() for line in listed.splitlines() if re.search(pattern, line.strip())]


def count_cards(profile: Profile) -> int:
    """How many cards the device's own tool lists: rows that look like a card, as a header or "none found" do not."""
    return len(list_rows(profile.words("LIST_CARDS"), profile.get("CARD_ROW")))


def choose_device(asked: str) -> tuple[str, str]:
    """The device and why: the one that was asked for, else the first accelerator of which a card is listed."""
    if asked != "auto":
        return asked, "as asked"
    for device in DEVICES:
        if count_cards(load_profile(device)):
            return device, "a card was found"
    return "cpu", "hl-smi and nvidia-smi list no card"


@dataclass(frozen=True)
class Cards:
    """The cards of each role ("" on a device without any), how many there are, whether all roles share the only one."""

    variable: str
    of: Mapping[str, str]
    found: int = 0
    needed: int = 0
    shared: bool = False

    def environment(self, role: str) -> dict[str, str]:
        """The variable that gives a role its cards."""
        return {self.variable: self.of[role]} if self.variable else {}

    @property
    def too_few(self) -> bool:
        return self.found < self.needed and not self.shared


def assign_cards(profile: Profile, ranks: int, roles: Sequence[str], environ: Mapping[str, str]) -> Cards:
    """The first cards for the first role, the next ones for the second, of those that the caller can see.

    Numbers are those that the tool tells where it tells any (a Gaudi module's id may differ from its index), else they
    count from 0. A single card is shared where the device's profile says how.
    """
    variable = profile.get("VISIBLE_DEVICES_VARIABLE")
    if not variable:
        return Cards("", dict.fromkeys(roles, ""))
    each = ranks * int(profile.get("CARDS_PER_RANK"))
    needed = each * len(roles)
    visible = environ.get(variable, "")
    listed = visible not in ("", "all")
    numbers = [part.strip() for part in visible.split(",")] if listed else []
    found = len(numbers) if listed else count_cards(profile)
    shared = found == 1 and each == 1 and len(roles) == 2 and profile.get("SHARED_GPU_MEMORY_UTILIZATION") != ""
    if not listed:
        numbers = sorted(list_rows(profile.words("LIST_CARD_NUMBERS"), r"^\d+$"), key=int)
        if len(numbers) < (1 if shared else needed):
            numbers = [str(number) for number in range(needed)]
    if shared:
        numbers = [numbers[0]] * needed
    of = {role: ",".join(numbers[each * index : each * (index + 1)]) for index, role in enumerate(roles)}
    return Cards(variable, of, found, needed, shared)
