"""README and docs: links and paths exist, tables are those of the code, shell commands run as far as they can here."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tables

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "disagg_prefill_lmcache_v1"
PAGES = [path for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")) if path.is_file()]
MADE_BY_A_RUN = {
    "compare.json",
    "summary.json",
    "report.html",
    "prefiller.log",
    "decoder.log",
    "proxy.log",
    "kv_server.log",
    ".models",
    ".venv",
}


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#\s]*)(?:#[^)]*)?\)", text):
        if target and not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), target
    for target, anchor in re.findall(r"\]\(([^)#\s:]*)#([^)]*)\)", text):
        titles = re.findall(r"^#+ (.*)$", ((page.parent / target) if target else page).read_text(), re.MULTILINE)
        anchors = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
        assert anchor in anchors, f"{target}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_path_that_is_named_exists(page: Path) -> None:
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for path in re.findall(r"`([\w./-]+)`", prose):
        looks_like_one = re.search(r"\.(py|sh|md|yaml|env|toml|json|log)$", path) or re.fullmatch(r"[\w.-]+/", path)
        if looks_like_one and path not in MADE_BY_A_RUN:
            assert any((folder / path).exists() for folder in (ROOT, PACKAGE, PACKAGE / "configs", page.parent)), path


def test_the_readme_names_every_script_and_configuration() -> None:
    readme = (ROOT / "README.md").read_text()
    for path in (
        *PACKAGE.glob("disagg_*"),
        *PACKAGE.glob("configs/*"),
        *ROOT.glob("kv_cache*.py"),
        *ROOT.glob("docs/*"),
    ):
        assert path.name in readme, name(path)


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent.name == "docs"], ids=name)
def test_tables_are_those_of_the_code(page: Path) -> None:
    assert tables.fill(page.read_text()) == page.read_text(), "python tests/repository/tables.py --write"


def test_every_module_with_settings_has_its_table() -> None:
    page = (ROOT / "docs/settings.md").read_text()
    there = {module for module, _, _ in tables.PLACE.findall(page)}
    with_settings = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        for path in PACKAGE.rglob("*.py")
        if re.search(r"^    \w+: [^=]+ = setting\(", path.read_text(), re.MULTILINE)
    }
    assert len(with_settings) >= 3
    assert {module for module in with_settings if not module.startswith("launch.backends.")} <= there
    assert "launch.backends" in there
    assert tables.fill("<!-- table measure.settings:Settings X_ -->\n<!-- end -->").count("`X_SEED`") == 1


def test_every_message_of_troubleshooting_can_be_said() -> None:
    """All parts between the dots stand in the code, except for what others say."""
    others = {"HTTP 401", "operator torchvision::nms does not exist"}
    source = "".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    messages = re.findall(r"^\| `([^`]+)`", (ROOT / "docs/troubleshooting.md").read_text(), re.MULTILINE)
    assert len(messages) > 8
    parts = [part.strip() for message in messages if message not in others for part in re.split("…", message)]
    assert [part for part in parts if part not in source] == []


def test_every_function_on_the_way_of_a_request_is_there() -> None:
    page = (ROOT / "docs/how-a-request-travels.md").read_text()
    hops = re.findall(r"^\| (\d+) \| `(\S+)` \| `(\S+)` \|", page, re.MULTILINE)
    assert [int(number) for number, _, _ in hops] == list(range(1, len(hops) + 1))
    assert len(hops) > 10
    for _, file, function in hops:
        scope = ast.parse((PACKAGE / file).read_text()).body
        for part in function.split("."):
            found = [node for node in scope if getattr(node, "name", "") == part]
            assert found, f"{file}: {function}"
            scope = getattr(found[0], "body", [])


# --- commands


def commands() -> list[tuple[str, str]]:
    """Page and command of every line of a bash block; continued lines in one."""
    found = []
    for page in PAGES:
        for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            lines = block.replace("\\\n", " ").splitlines()
            found += [(page.name, line.split(" #")[0].strip()) for line in lines if line.strip() and line[0] != "#"]
    return found


def bash(command: str, folder: Path) -> str:
    """What a command prints to stdout; it must succeed and leave nothing in its run directory."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "DISAGG_DEVICE": "cpu",
        "DISAGG_RUN_DIR": str(folder),
    }
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert list(folder.iterdir()) == []
    return done.stdout


def dry_run(command: str, folder: Path) -> None:
    """A command of the launcher only prints what it would start."""
    words, dashes, extra = command.partition(" -- ")
    printed = bash(f"{words} --dry-run{dashes}{extra}", folder)
    assert re.search(r"vllm|kv|proxy", printed)


def known_flags(command: str, folder: Path) -> None:
    """All flags of the command are in the program's help."""
    program = re.match(r"python (\S+\.py\b|-m \S+)", command)[0]
    known = re.findall(r"--[a-z0-9][a-z0-9-]*", bash(f"{program} --help", folder))
    assert set(re.findall(r"--[a-z0-9][a-z0-9-]*", command)) <= set(known)


def make(command: str, folder: Path) -> None:
    bash(command.replace("make", "make --dry-run"), folder)


# How a command is tried, or None and why it is not.
WAYS = [
    (r"(\w+=\S+ +)*bash disagg_prefill_lmcache_v1/disagg_example_gaudi_lm(_tp2)?\.sh\b.*", dry_run),
    (r"(\w+=\S+ )*bash disagg_prefill_lmcache_v1/disagg_vllm_launcher_gaudi_lm(_tp2)?\.sh \S+.*", dry_run),
    (r"python (\S+\.py|-m disagg_prefill_lmcache_v1\.\S+)( .*)?", known_flags),
    (r"make (check|fix|test)", make),
    (r"bash tests/run\.sh( .*)?", None),  # runs this test
    (r"lmcache server .*", None),  # faults of LMCache's, to reproduce by hand
    (r"curl .*", None),  # needs a stack that runs; tests/stack asks the same of one
    (r"pip (un)?install .*", None),  # changes the environment
    (r"(docker|kind|kubectl) .*", None),  # needs a container engine or a cluster
]


def way(command: str) -> Callable[[str, Path], None] | None:
    matching = [how for pattern, how in WAYS if re.fullmatch(pattern, command)]
    assert len(matching) == 1, f"{command}: {len(matching)} ways in WAYS"
    return matching[0]


def test_every_command_is_tried_or_excused() -> None:
    assert sum(way(command) is not None for _, command in commands()) >= 10


@pytest.mark.parametrize(("page", "command"), dict.fromkeys(commands()))
def test_command(page: str, command: str, tmp_path: Path) -> None:
    if (try_it := way(command)) is not None:
        try_it(command, tmp_path)


BY_HAND = [path for folder in ("benchmarks", "tests/stack") for path in sorted(ROOT.glob(f"{folder}/*.py"))]
BY_HAND = [path for path in BY_HAND if not path.name.startswith("test_") and "ArgumentParser(" in path.read_text()]


@pytest.mark.parametrize("script", BY_HAND, ids=name)
def test_what_is_run_by_hand_starts(script: Path, tmp_path: Path) -> None:
    """Outside pytest, from anywhere: with what the script itself finds."""
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    words = [sys.executable, str(script), "--help"]
    done = subprocess.run(words, cwd=tmp_path, env=kept, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")
