"""Mutation test of the proxy's request path: small faults are put into it, one at a time; the tests must notice each.

    python benchmarks/mutation.py                                  # a sample, for 20 minutes
    python benchmarks/mutation.py --minutes 600 --sample 5000      # all there are

A development script, not part of the tests. cosmic-ray makes the mutants, in copies of the repository under the
temporary folder; it is installed from PyPI into .venv-mutation/ at the top of the repository. The sample is drawn at
random, one mutant for each place and kind, so the rate is an estimate. Mutants that were not reached in time do not
count. Prints the rate, and the survivors to read one by one: some are equivalent, they change nothing that can be seen.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import venv
from collections import Counter
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
TOOLS = REPOSITORY / ".venv-mutation"
TOOL = "cosmic-ray==8.7.0"
PROXY = "disagg_prefill_lmcache_v1/proxy"
REQUEST_PATH = (
    "admission", "answers", "bodies", "client_connection", "client_parser", "client_request", "decode", "errors",
    "handler", "header_fields", "prefill", "relay", "steering", "usage",
)  # fmt: skip
TESTS = ("units", "bodies", "limits", "app", "hostile")  # the quick ones first, as the first failure counts
# Types are not looked at when the code runs, and they are where `|` stands.
LEFT_OUT = ("BitOr", "_Is", "Decorator")
TEST_LIMIT_S = 150


def main() -> int:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0, help="time box (default: 20)")
    parser.add_argument("--sample", type=int, default=400, help="most mutants that are tried (default: 400)")
    parser.add_argument("--jobs", type=int, default=2, help="copies that work side by side (default: 2)")
    parser.add_argument("--seed", type=int, default=1, help="of the sample (default: 1)")
    parser.add_argument("--run-tests", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run_tests:
        return run_tests()
    cosmic_ray = tool()
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        copies = [copy(Path(folder) / str(number)) for number in range(arguments.jobs)]
        prepare(copies[0], cosmic_ray)
        if subprocess.run(["bash", "-c", test_command()], cwd=copies[0], check=False).returncode:
            print("the tests fail without any mutant", file=sys.stderr)
            return 1
        share(copies, arguments)
        deadline = time.monotonic() + 60 * arguments.minutes
        running = [subprocess.Popen([cosmic_ray, "exec", "config.toml", "session.sqlite"], cwd=path) for path in copies]
        try:
            while time.monotonic() < deadline and any(process.poll() is None for process in running):
                time.sleep(10)
                print(f"{sum(sum(outcomes(path).values()) for path in copies)} mutants done", flush=True)
        finally:
            for process in running:
                process.terminate()
                process.wait()
        report(copies)
    return 0


def tool() -> str:
    """The program cosmic-ray, installed if needed."""
    program = TOOLS / "bin" / "cosmic-ray"
    if not program.exists():
        venv.create(TOOLS, with_pip=True)
        subprocess.run([str(TOOLS / "bin" / "python"), "-m", "pip", "install", "--quiet", TOOL], check=True)
    return str(program)


def copy(path: Path) -> Path:
    """The repository as it is now, files that are not committed too."""
    names = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=REPOSITORY, capture_output=True,
                           check=True, text=True).stdout.split("\n")  # fmt: skip
    for name in filter(None, names):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        if (REPOSITORY / name).is_file():
            shutil.copy(REPOSITORY / name, path / name)
    modules = json.dumps([f"{PROXY}/{name}.py" for name in REQUEST_PATH])
    (path / "config.toml").write_text(
        f"[cosmic-ray]\nmodule-path = {modules}\ntimeout = {TEST_LIMIT_S + 60}.0\nexcluded-modules = []\n"
        f'test-command = "{test_command()}"\n[cosmic-ray.distributor]\nname = "local"\n'
    )
    return path


def test_command() -> str:
    """How the tests are run in a copy."""
    return f"{sys.executable} benchmarks/mutation.py --run-tests"


def run_tests() -> int:
    """The tests, in a group of processes that ends with them, whatever the mutant does."""
    files = [f"tests/proxy/test_proxy_{name}.py" for name in TESTS]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "mutation_plugin", *files]
    paths = os.pathsep.join(("benchmarks", "tests/helpers", "."))
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": paths}
    process = subprocess.Popen(command, start_new_session=True, env=environment)
    try:
        return process.wait(TEST_LIMIT_S)
    except subprocess.TimeoutExpired:
        return 1
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def prepare(path: Path, cosmic_ray: str) -> None:
    """List all mutants in a session file."""
    subprocess.run([cosmic_ray, "init", "config.toml", "session.sqlite"], cwd=path, check=True)


def share(copies: list[Path], arguments: argparse.Namespace) -> None:
    """Draw the sample and give each copy its part."""
    rng = random.Random(arguments.seed)
    with sqlite3.connect(copies[0] / "session.sqlite") as session:
        rows = session.execute(
            "select job_id, module_path, operator_name, start_pos_row, start_pos_col from mutation_specs"
        ).fetchall()
    places: dict[tuple[object, ...], list[str]] = {}
    for job, module, operator, row, column in rows:
        if not any(text in operator for text in LEFT_OUT):
            places.setdefault((module, row, column, operator.split("_")[0]), []).append(job)
    jobs = [rng.choice(found) for found in places.values()]
    rng.shuffle(jobs)
    print(f"{len(rows)} mutants in {len(places)} places; {min(arguments.sample, len(jobs))} are tried", flush=True)
    jobs = jobs[: arguments.sample]
    for number, path in enumerate(copies):
        if number:
            shutil.copy(copies[0] / "session.sqlite", path)
    for number, path in enumerate(copies):
        with sqlite3.connect(path / "session.sqlite") as session:
            session.execute("create temp table wanted (job_id)")
            session.executemany("insert into wanted values (?)", [(job,) for job in jobs[number :: len(copies)]])
            for table in ("mutation_specs", "work_items"):
                session.execute(f"delete from {table} where job_id not in (select job_id from wanted)")
            for place, job in enumerate(jobs[number :: len(copies)]):  # cosmic-ray goes by the order of the rows
                session.execute("update work_items set rowid = ? where job_id = ?", (10_000_000 + place, job))


def outcomes(path: Path) -> Counter[str]:
    """How many mutants ended in which way."""
    with sqlite3.connect(path / "session.sqlite") as session:
        return Counter(row[0] for row in session.execute("select test_outcome from work_results"))


def report(copies: list[Path]) -> None:
    """Print the rate and the survivors."""
    total = sum((outcomes(path) for path in copies), Counter())
    for path in copies:
        with sqlite3.connect(path / "session.sqlite") as session:
            for (diff,) in session.execute("select diff from work_results where test_outcome = 'SURVIVED'"):
                print("\n" + "\n".join(line for line in diff.splitlines() if line[:1] in "+-@"))
    count = sum(total.values())
    print(f"\n{dict(total)}: {100 * total['KILLED'] / max(count, 1):.1f} % of {count} mutants were noticed")


if __name__ == "__main__":
    sys.exit(main())
