"""Write the tables of docs/benchmarks.md and README.md from the results.

    python -m benchmarks.tables [--check] [--print FILE]

A table stands between `<!-- results: FILE -->` and `<!-- end -->`; FILE is a JSON file of
`benchmarks/results`. `<!-- headline: FILE FILE … -->` begins one of what hfslim saves and keeps,
`<!-- leads: FILE FILE … -->` one of its leads over the best other method. With --check
nothing is written, and a page that differs is an error.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from benchmarks import class_subsets, overhead
from benchmarks.markdown import Row
from benchmarks.rivals import tables as rivals

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "docs" / "benchmarks.md", ROOT / "README.md")
RESULTS = ROOT / "benchmarks" / "results"
PLACE = re.compile(r"(<!-- (results|headline|leads): (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)
RENDER = {class_subsets.NAME: class_subsets.render, overhead.NAME: overhead.render}
"""What makes the tables of a file, by the `name` in it; of others, `rivals.render`."""

SEVERAL = {"headline": rivals.headline, "leads": rivals.leads}
"""What makes one table of several files."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], prog="python -m benchmarks.tables"
    )
    parser.add_argument("--check", action="store_true", help="write nothing, tell if it differs")
    parser.add_argument("--print", metavar="FILE", type=Path, help="print the tables of a file")
    options = parser.parse_args()
    if options.print:
        print(render(json.loads(options.print.read_text(encoding="utf-8"))))
        return
    for path in PAGES:
        page = path.read_text(encoding="utf-8")
        fresh = fill(page)
        if options.check and page != fresh:
            sys.exit(f"error: {path} differs from {RESULTS}: run python -m benchmarks.tables")
        path.write_text(fresh, encoding="utf-8")


def fill(page: str) -> str:
    """Return a page with every table made anew."""

    def table(place: re.Match[str]) -> str:
        files = [read(name) for name in place[3].split()]
        several = SEVERAL.get(place[2])
        text = several(files) if several else render(files[0])
        return f"{place[1]}{text}\n{place[4]}"

    return PLACE.sub(table, page)


def read(name: str) -> Row:
    """Return the results of a file, or none."""
    file = RESULTS / name
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"cells": []}


def render(data: Row) -> str:
    """Return the Markdown of one file of results."""
    if not data["cells"]:
        return "Not run yet."
    return RENDER.get(data["name"], rivals.render)(data)


if __name__ == "__main__":
    main()
