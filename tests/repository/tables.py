"""The settings tables in docs/, which are made from the code.

    python tests/repository/tables.py [--write]

A place for one looks like ``<!-- table MODULE:CLASS PREFIX -->`` and ends with ``<!-- end -->``; instead of the class a
mapping of several classes may stand there. Without --write it is only told which page is out of date (exit status 1).
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PLACE = re.compile(r"<!-- table (?P<module>\S+):(?P<name>\w+) (?P<prefix>\w*) -->\n.*?<!-- end -->", re.DOTALL)


def fill(text: str) -> str:
    """The text of a page with its tables as the code has them."""
    from disagg_prefill_lmcache_v1.settings import table

    def made(place: re.Match[str]) -> str:
        value = getattr(importlib.import_module(f"disagg_prefill_lmcache_v1.{place['module']}"), place["name"])
        classes = value.values() if isinstance(value, Mapping) else [value]
        lines = [line for each in classes for line in table(each, prefix=place["prefix"]).splitlines()]
        return "\n".join([place[0].splitlines()[0], *dict.fromkeys(lines), "<!-- end -->"])

    return PLACE.sub(made, text)


def main(arguments: list[str]) -> int:
    sys.path.insert(0, str(ROOT))
    status = 0
    for page in sorted(ROOT.glob("docs/*.md")):
        old = page.read_text(encoding="utf-8")
        new = fill(old)
        if new != old and "--write" in arguments:
            page.write_text(new, encoding="utf-8")
        elif new != old:
            print(f"{page.relative_to(ROOT)} is not what the code says: python tests/repository/tables.py --write")
            status = 1
    return status


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
