"""Which Python the servers run with. Looks only; set-up comes later."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from disagg_prefill_lmcache_v1.launch.places import place
from disagg_prefill_lmcache_v1.launch.profiles import PACKAGE, Profile

PREFLIGHT = str(PACKAGE / "launch" / "preflight.py")


@dataclass(frozen=True)
class Interpreter:
    """A Python and how it was found.

    kind: ``given`` by DISAGG_PYTHON and used as it is; ``active``: the active virtual environment; ``system``: a
    python3 that has vLLM and LMCache, used as it is (containers); ``bundle``: the virtual environment that set-up
    makes, only for devices that have SETUP_EXTRA.
    """

    kind: str
    path: str

    @property
    def venv(self) -> Path:
        return Path(self.path).parent.parent

    @property
    def exists(self) -> bool:
        return shutil.which(self.path) is not None

    def ask(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Preflight's answer to a quick question about this Python's packages. Ctrl-C is for the launcher alone."""
        words = [self.path, PREFLIGHT, *arguments]
        try:
            return subprocess.run(
                words, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            return subprocess.CompletedProcess(words, 127, "", f"{self.path}: {error.strerror}")

    def has_servers(self, device: str) -> bool:
        """Whether it finds vLLM (on the cpu device: a CPU build) and LMCache. Imports neither."""
        return self.exists and self.ask("--has-servers", device).returncode == 0


def choose_interpreter(given: str, profile: Profile, environ: Mapping[str, str]) -> Interpreter:
    """See `Interpreter`."""
    if given:
        return Interpreter("given", given)
    active = os.path.join(environ.get("VIRTUAL_ENV", ""), "bin", "python")
    if environ.get("VIRTUAL_ENV") and os.access(active, os.X_OK):
        return Interpreter("active", active)
    system = Interpreter("system", shutil.which("python3") or "python3")
    if system.has_servers(profile.device):
        return system
    if profile.get("SETUP_EXTRA"):
        return Interpreter("bundle", str(place(".venv", environ) / "bin" / "python"))
    return Interpreter("system", "python3")
