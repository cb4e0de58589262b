"""A stack on several machines: real vLLM servers in network namespaces whose links are slow, lose packets and are cut.

Run by hand, as root: four vLLM servers share this machine's cores, which takes minutes.

    python tests/stack/machines_real.py [redis|lm]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / "helpers"), str(ROOT)]

from machine_stack import MACHINES, MachineStack, check_all
from machines import Network, why_not


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backend", nargs="?", default="redis", choices=("redis", "lm"))
    backend = parser.parse_args().backend
    if reason := why_not():
        raise SystemExit(reason)
    folder = Path(tempfile.mkdtemp(prefix="machines-"))
    builder = [sys.executable, "-m", "disagg_prefill_lmcache_v1.measure.tiny_model", "--output", str(folder / "model")]
    subprocess.run(builder, check=True, cwd=ROOT)
    print(f"logs: {folder}", flush=True)
    with Network(MACHINES) as network, MachineStack(network, backend, folder / "model", folder) as stack:
        check_all(stack, say=lambda text: print(text, flush=True))


if __name__ == "__main__":
    main()
