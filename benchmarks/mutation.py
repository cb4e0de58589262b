"""Mutation test of the proxy's request path: small faults are put into it, one at a time; the tests must notice each.

    python benchmarks/mutation.py                              # a sample of 150
    python benchmarks/mutation.py --sample 5000 --jobs 8       # all there are

A development script, not part of the tests. All tests of tests/proxy that need no process of the proxy run once, and it
is noted which lines each runs. Then, for each fault (benchmarks/mutants.py), a forked copy of this process changes the
loaded code and runs the tests that run its line, the quick ones first, until one fails. A test that hangs counts as
one that fails. The sample is drawn at random, one fault for each place and kind, so the rate is an estimate. Prints it
and the survivors; those that change nothing that can be seen are in mutation_equivalent.txt, each with its reason.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
for folder in ("", "benchmarks", "tests/helpers"):
    sys.path.insert(0, str(REPOSITORY / folder))

from mutants import Mutant, mutants_of, put_in  # noqa: E402

PROXY = "disagg_prefill_lmcache_v1.proxy"
REQUEST_PATH = (
    "admission", "answers", "bodies", "client_connection", "client_parser", "client_request", "decode", "errors",
    "handler", "header_fields", "headers", "prefill", "relay", "request", "steering", "timing", "usage",
    "upstream.client", "upstream.connection", "upstream.parser", "upstream.response",
)  # fmt: skip
# Files that look at several processes, or at a busy proxy or page for seconds, are left out.
FILES = [f"tests/proxy/test_proxy_{name}.py" for name in (
    "adapters", "answer_parser", "app", "bodies", "edges", "hostile", "limits", "metrics", "openai_client", "pool",
    "routing", "servers", "settings", "stages", "timing", "units", "upkeep", "upstream",
)]  # fmt: skip
EQUIVALENT = REPOSITORY / "benchmarks" / "mutation_equivalent.txt"
QUICK_S = 0.1  # tests that take less come first
HANGS_S = 20.0  # a test may take so much longer than it does without a fault
Place = tuple[str, int]


@dataclass
class Baseline:
    """What the tests do without a fault: seconds and places (module, line) of each."""

    seconds: dict[str, float]
    places: dict[str, set[Place]]


class Lines:
    """Notes which lines of the request path run, for the test that runs at the time."""

    def __init__(self, files: dict[str, str]) -> None:
        self._files = files
        self.found: dict[str, set[Place]] = defaultdict(set)
        self.now: set[Place] = set()

    def start(self) -> None:
        """Trace this thread and all that come."""
        threading.settrace(self._call)
        sys.settrace(self._call)

    def of(self, test: str) -> None:
        """From now on it is this test."""
        self.now = self.found[test]

    def _call(self, frame: Any, _event: str, _argument: Any) -> Any:
        module = self._files.get(frame.f_code.co_filename)
        if module is None:
            return None
        self.now.add((module, frame.f_lineno))

        def line(frame: Any, _event: str, _argument: Any) -> Any:
            self.now.add((module, frame.f_lineno))
            return line

        return line


class Mutation:
    """A pytest plugin: instead of running the tests once, it runs them for each fault."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.arguments = arguments
        self.folder = folder
        self.modules = {f"{PROXY}.{name}": REPOSITORY / PROXY.replace(".", "/") / f"{name.replace('.', '/')}.py"
                        for name in REQUEST_PATH}  # fmt: skip
        self.lines: Lines | None = None
        self.outcome: list[Any] = []
        self.killers: Counter[tuple[str, str]] = Counter()  # of a module, file of tests
        self.status = 0

    # -- in a forked copy

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any, request: Any) -> Any:
        """What a fixture of a whole file runs belongs to all of its tests."""
        if self.lines is None or fixturedef.scope == "function":
            return (yield)
        now, self.lines.now = self.lines.now, self.lines.found[fixturedef.baseid]
        try:
            return (yield)
        finally:
            self.lines.now = now

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """The first failure decides."""
        if report.failed:
            self.outcome.append([report.nodeid, str(report.longrepr)[-3000:]])

    def _run(self, items: list[pytest.Item], seconds: dict[str, float] | None, tell: Any) -> dict[str, float]:
        """Run tests; with ``seconds`` until the first that fails or takes too long."""
        took = {}
        deadline = [float("inf")]

        def watch() -> None:
            while time.monotonic() < deadline[0]:
                time.sleep(0.2)
            tell(["hang", items[number].nodeid])
            os._exit(0)

        threading.Thread(target=watch, daemon=True).start()
        for number, item in enumerate(items):
            following = items[number + 1] if number + 1 < len(items) else None
            begin = time.monotonic()
            deadline[0] = begin + HANGS_S + 5 * (seconds or {}).get(item.nodeid, 60.0)
            if self.lines is not None:
                self.lines.of(item.nodeid)
            failed = len(self.outcome)
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if len(self.outcome) == failed:
                took[item.nodeid] = time.monotonic() - begin
            elif seconds is not None:  # once more: a busy machine is no fault
                self.outcome.clear()
                deadline[0] = time.monotonic() + HANGS_S + 5 * seconds[item.nodeid]
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
                if self.outcome:
                    break
        return took

    def _fork(self, work: Any) -> tuple[int, Path]:
        """Do ``work(tell)`` in a copy; what it tells comes in a file."""
        told = self.folder / f"{time.monotonic_ns()}.json"
        child = os.fork()
        if child:
            return child, told
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)

        def tell(what: Any) -> None:
            part = told.with_suffix(f".{threading.get_ident()}")
            part.write_text(json.dumps(what))
            part.rename(told)

        try:
            tell(work(tell))
        except BaseException as error:
            tell(["failed", f"{type(error).__name__}: {error}"])
        finally:
            os._exit(0)

    # -- in the process itself

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """All of it."""
        items = session.items
        baseline = self._baseline(items)
        lacking = [item.nodeid for item in items if item.nodeid not in baseline.seconds]
        print(f"{len(items)} tests take {sum(baseline.seconds.values()):.0f} s with tracing; "
              f"left out because they fail: {lacking}", flush=True)  # fmt: skip
        items = [item for item in items if item.nodeid in baseline.seconds]
        self._report(*self._try_all(self._sample(), items, baseline))
        return True

    def _baseline(self, items: list[pytest.Item]) -> Baseline:
        kept = self.arguments.baseline
        took, places, failed = json.loads(kept.read_text()) if kept and kept.exists() else ({}, {}, [])
        new = [item for item in items if item.nodeid not in took]

        def work(tell: Any) -> Any:
            self.lines = Lines({str(path): module for module, path in self.modules.items()})
            self.lines.start()
            seconds = self._run(new, None, tell)
            sys.settrace(None)
            return [seconds, {test: sorted(found) for test, found in self.lines.found.items()}, self.outcome]

        if new:
            child, told = self._fork(work)
            os.waitpid(child, 0)
            seconds, found, failed = json.loads(told.read_text())
            took, places = {**took, **seconds}, {**places, **found}
            if kept:
                kept.write_text(json.dumps([took, places, failed]))
        for test, text in failed:
            print(f"fails without a fault: {test}\n{text[-600:]}")
        return Baseline(took, {test: {(module, line) for module, line in found} for test, found in places.items()})

    def _sample(self) -> list[Mutant]:
        """One fault for each place and kind, in the order of the seed, without those that are equivalent."""
        rng = random.Random(self.arguments.seed)
        places: dict[tuple[Any, ...], list[Mutant]] = {}
        for module, path in self.modules.items():
            for mutant in mutants_of(path, module):
                places.setdefault((module, mutant.line, mutant.column, mutant.kind), []).append(mutant)
        drawn = [rng.choice(found) for found in places.values()]
        rng.shuffle(drawn)
        if self.arguments.only:
            drawn = [mutant for mutant in drawn if self.arguments.only in mutant.key]
        print(f"{len(drawn)} places; {min(self.arguments.sample, len(drawn))} are tried", flush=True)
        return drawn[: self.arguments.sample]

    def _tests_of(self, mutant: Mutant, items: list[pytest.Item], baseline: Baseline) -> list[pytest.Item]:
        """The tests that run the fault's line, quick ones first, then files that found other faults in the module."""
        wanted = self._places(mutant)
        running = []
        for item in items:
            files = baseline.places.get(item.nodeid.partition("::")[0], set())
            if not wanted.isdisjoint(baseline.places[item.nodeid] | files):
                running.append(item)
        seconds, killers = baseline.seconds, self.killers

        def rank(item: pytest.Item) -> tuple[bool, float, str, float]:
            file, took = item.nodeid.partition("::")[0], seconds[item.nodeid]
            return took > QUICK_S, -killers[mutant.module, file], file, took

        chosen, budget = [], self.arguments.budget
        for item in sorted(running, key=rank):
            budget -= seconds[item.nodeid]
            if budget > 0:
                chosen.append(item)
        return chosen

    def _places(self, mutant: Mutant) -> set[Place]:
        """The line; for a value outside functions the lines that name it."""
        path = self.modules[mutant.module]
        tree = ast.parse(path.read_text())
        if mutant.function:
            return {(mutant.module, line) for line in _lines_of(tree, mutant.line)}
        names = {
            node.id for statement in tree.body if statement.lineno <= mutant.line <= (statement.end_lineno or 0)
            for node in ast.walk(statement) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
        }  # fmt: skip
        for statement in tree.body:  # values that are made of it
            if isinstance(statement, ast.Assign) and names & {
                node.id for node in ast.walk(statement.value) if isinstance(node, ast.Name)
            }:
                names |= {node.id for node in statement.targets if isinstance(node, ast.Name)}
        return {
            (module, number) for module, path in self.modules.items()
            for number, text in enumerate(path.read_text().splitlines(), 1) if any(name in text for name in names)
        }  # fmt: skip

    def _try_all(
        self, mutants: list[Mutant], items: list[pytest.Item], baseline: Baseline
    ) -> tuple[Counter[str], list[Mutant]]:
        known = {line.rpartition(" # ")[0] for line in EQUIVALENT.read_text().splitlines()}
        counts: Counter[str] = Counter()
        survivors: list[Mutant] = []
        running: dict[int, tuple[Mutant, Path]] = {}
        deadline = time.monotonic() + 60 * self.arguments.minutes
        todo = mutants[::-1]
        while (todo and time.monotonic() < deadline) or running:
            while todo and len(running) < self.arguments.jobs and time.monotonic() < deadline:
                mutant = todo.pop()
                if mutant.key in known:
                    counts["equivalent"] += 1
                    continue
                tests = self._tests_of(mutant, items, baseline)

                def work(tell: Any, mutant: Mutant = mutant, tests: list[pytest.Item] = tests) -> Any:
                    if not self.arguments.nothing:
                        put_in(mutant)
                    self._run(tests, baseline.seconds, tell)
                    return ["failed", *self.outcome[0]] if self.outcome else ["survived", len(tests)]

                child, told = self._fork(work)
                running[child] = (mutant, told)
            if not running:
                break
            child, _ = os.waitpid(-1, 0)
            if child in running:
                self._note(*running.pop(child), child, counts, survivors)
        return counts, survivors

    def _note(self, mutant: Mutant, told: Path, child: int, counts: Counter[str], survivors: list[Mutant]) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        outcome, *more = json.loads(told.read_text()) if told.exists() else ["failed", "the process ended"]
        told.unlink(missing_ok=True)
        counts[outcome] += 1
        if outcome == "survived":
            survivors.append(mutant)
        else:
            self.killers[mutant.module, str(more[0]).partition("::")[0]] += 1
        where = f"{mutant.module.removeprefix(PROXY)[1:].replace('.', '/')}.py:{mutant.line}"
        print(
            f"{sum(counts.values()):4} {outcome:9} {where} {_change(mutant)}  [{more[0] if more else ''}]", flush=True
        )
        if self.arguments.verbose and outcome == "failed":
            print(more[-1][-1500:])

    def _report(self, counts: Counter[str], survivors: list[Mutant]) -> None:
        for mutant in sorted(survivors, key=lambda mutant: (mutant.module, mutant.line)):
            print(f"survived: {mutant.key}")
        noticed = counts["failed"] + counts["hang"]
        count = noticed + counts["survived"]
        print(f"\n{dict(counts)}, seed {self.arguments.seed}: "
              f"{100 * noticed / max(count, 1):.1f} % of {count} faults were noticed")  # fmt: skip


def _change(mutant: Mutant) -> str:
    """What was changed, in short."""
    before, after = (" ".join(text.split()) for text in (mutant.before, mutant.after))
    return f"({mutant.kind}) {before[:70]} -> {after[:70]}"


def _lines_of(tree: ast.AST, line: int) -> range:
    """All lines of the smallest statement there: a long one runs line by line."""
    found = [node for node in ast.walk(tree) if isinstance(node, ast.stmt) and node.lineno <= line <= node.end_lineno]
    smallest = min(found, key=lambda node: node.end_lineno - node.lineno)
    body = getattr(smallest, "body", None)
    return range(smallest.lineno, body[0].lineno if body else smallest.end_lineno + 1)


def main() -> int:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0, help="time box (default: 60)")
    parser.add_argument("--sample", type=int, default=150, help="most faults that are tried (default: 150)")
    parser.add_argument("--jobs", type=int, default=2, help="copies that work side by side (default: 2)")
    parser.add_argument("--seed", type=int, default=1, help="of the sample (default: 1)")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds of tests for a fault (default: 60)")
    parser.add_argument("--only", default="", help="only faults whose line has this text")
    parser.add_argument("--nothing", action="store_true", help="leave the code as it is: shows tests that are not sure")
    parser.add_argument("--verbose", action="store_true", help="show how the tests fail")
    parser.add_argument(
        "--baseline",
        type=Path,
        help="file that keeps what the tests do without a fault; to be deleted when the proxy changes",
    )
    arguments = parser.parse_args()
    os.nice(10)
    os.chdir(REPOSITORY)
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        plugin = Mutation(arguments, Path(folder))
        words = ["-s", "-p", "no:cacheprovider", "-p", "no:terminal", "-p", "mutation_plugin", *FILES]
        return int(pytest.main(words, plugins=[plugin]))


if __name__ == "__main__":
    sys.exit(main())
