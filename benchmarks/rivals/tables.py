"""Write the tables of docs/benchmarks.md from the results.

    python -m benchmarks.rivals.tables [--check]

A table stands between `<!-- results: FILE -->` and `<!-- end -->`; FILE is a JSON file of
`benchmarks/results`. With --check nothing is written, and a page that differs is an error.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "benchmarks.md"
RESULTS = ROOT / "benchmarks" / "results"
PLACE = re.compile(r"(<!-- results: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
Row = Mapping[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], prog="python -m benchmarks.rivals.tables"
    )
    parser.add_argument("--check", action="store_true", help="write nothing, tell if it differs")
    parser.add_argument("--print", metavar="FILE", type=Path, help="print the tables of a file")
    options = parser.parse_args()
    if options.print:
        print(render(json.loads(options.print.read_text(encoding="utf-8"))))
        return
    page = PAGE.read_text(encoding="utf-8")
    fresh = fill(page)
    if options.check and page != fresh:
        sys.exit(f"error: {PAGE} differs from {RESULTS}: run python -m benchmarks.rivals.tables")
    PAGE.write_text(fresh, encoding="utf-8")


def fill(page: str) -> str:
    """Return a page with every table made anew."""

    def table(place: re.Match[str]) -> str:
        file = RESULTS / place[2]
        data = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"cells": []}
        return f"{place[1]}{render(data)}\n{place[3]}"

    return PLACE.sub(table, page)


def render(data: Row) -> str:
    """Return the Markdown of one benchmark: accuracy, cost, settings and circumstances."""
    parts = [_accuracy(data), _settings(data), _circumstances(data)] if data["cells"] else []
    return "\n".join(part for part in parts if part) or "Not run yet."


def _accuracy(data: Row) -> str:
    groups = _groups(data)
    timed = {
        key: next((c["latency"] for c in cells if "latency" in c), ()) for key, cells in groups
    }
    batches = sorted({one["batch"] for latency in timed.values() for one in latency})
    head = ["MACs asked", "method", "MACs kept", "parameters", "right after the cut", "recovered"]
    head += [f"speedup, batch {batch}" for batch in batches] + ["time to cut"]
    teacher = data["teacher"]["accuracy"]
    lines = [_line(head), _line(["---"] * len(head))]
    rest = ["–"] * (len(head) - 5)
    lines.append(_line(["1", "teacher", "1", "1", _percent(teacher), *rest]))
    for (budget, method), cells in groups:
        speed = {one["batch"]: one for one in timed[budget, method]}
        lines.append(
            _line(
                [
                    f"{budget:g}",
                    method,
                    _mean(cells, lambda cell: cell["macs"], "{:.3f}"),
                    _mean(cells, lambda cell: cell["parameters"], "{:.3f}"),
                    _spread([cell["before"]["accuracy"] for cell in cells]),
                    _spread([cell["after"]["accuracy"] for cell in cells]),
                    *(_speedup(speed.get(batch)) for batch in batches),
                    _mean(cells, lambda cell: cell["cut_seconds"], "{:.0f} s"),
                ]
            )
        )
    return "\n".join(lines) + "\n"


def _settings(data: Row) -> str:
    chosen: dict[str, list[str]] = {}
    for choice in sorted(data["choices"], key=lambda c: -c["budget"]):
        tried = len(choice["tried"])
        failed = sum("error" in one for one in choice["tried"])
        counts = f"best of {tried}" + (f", {failed} of which did not run" if failed else "")
        text = f"at {choice['budget']:g} {choice['setting']} ({counts})"
        chosen.setdefault(choice["method"], []).append(text)
    lines = [f"- {method}: {'; '.join(texts)}." for method, texts in chosen.items()]
    return "Settings, chosen on training examples:\n\n" + "\n".join(lines) + "\n" if lines else ""


def _circumstances(data: Row) -> str:
    setting, teacher, recovery = data["setting"], data["teacher"], data["recovery"]
    seeds = sorted({cell["seed"] for cell in data["cells"]})
    used = {cell["run"] for cell in data["cells"]}
    runs = [run for number, run in enumerate(data["runs"]) if number in used]
    versions = ", ".join(
        f"{key} {value}" for key, value in _joined(runs).items() if key not in ("date", "commit")
    )
    dates = _joined(runs)
    return (
        f"`{setting['recipe']}`; {setting['evaluation']:,} held-out examples, "
        f"{setting['calibration']:,} to cut by, {setting['train']:,} for a recovery of "
        f"{setting['epochs']:g} epoch{'s' if setting['epochs'] != 1 else ''} at a learning rate of "
        f"{recovery['learning_rate']:g}; teacher: {teacher['parameters'] / 1e6:.1f} M parameters, "
        f"{teacher['macs'] / 1e6:,.0f} M multiply-accumulates; seeds {_list(seeds)}; "
        f"{dates['date']}, commits {dates['commit']}; {versions}."
    )


def _groups(data: Row) -> list[tuple[tuple[float, str], list[Row]]]:
    """Collect the seeds of each budget and method, large budgets first, methods as they came."""
    groups: dict[tuple[float, str], list[Row]] = {}
    methods = list(dict.fromkeys(cell["method"] for cell in data["cells"]))
    # hfslim first, whichever process wrote its cells first.
    methods.sort(key=lambda method: method != "hfslim")
    for cell in data["cells"]:
        groups.setdefault((cell["budget"], cell["method"]), []).append(cell)
    return sorted(groups.items(), key=lambda g: (-g[0][0], methods.index(g[0][1])))


def _joined(runs: Iterable[Row]) -> dict[str, str]:
    values: dict[str, dict[str, None]] = {}
    for run in runs:
        for key, value in run.items():
            values.setdefault(key, {})[str(value)] = None
    return {key: " and ".join(sorted(found)) for key, found in values.items()}


def _spread(values: Sequence[float]) -> str:
    mean = _percent(statistics.fmean(values))
    return f"{mean} ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else mean


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _mean(cells: Sequence[Row], read: Callable[[Row], float], form: str) -> str:
    return form.format(statistics.fmean(read(cell) for cell in cells))


def _speedup(one: Row | None) -> str:
    return "–" if one is None else f"{one['speedup']:.2f} ({one['low']:.2f}–{one['high']:.2f})"


def _list(values: Sequence[object]) -> str:
    *first, last = map(str, values)
    return f"{', '.join(first)} and {last}" if first else last


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
