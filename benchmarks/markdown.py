"""What the tables of the benchmarks have in common."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, ["---"] * len(head), *rows))


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def spread(values: Sequence[float]) -> str:
    """Mean and sample standard deviation, in percent."""
    mean = percent(statistics.fmean(values))
    return f"{mean} ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else mean


def listed(values: Sequence[object]) -> str:
    *first, last = map(str, values)
    return f"{', '.join(first)} and {last}" if first else last


def circumstances(data: Row) -> str:
    """Seeds, dates, commits, hardware and versions of the runs that made the cells."""
    used = {cell["run"] for cell in data["cells"]}
    values: dict[str, dict[str, None]] = {}
    for number, run in enumerate(data["runs"]):
        if number in used:
            for key, value in run.items():
                values.setdefault(key, {})[str(value)] = None
    joined = {key: listed(sorted(found)) for key, found in values.items()}
    date, commit = joined.pop("date"), joined.pop("commit")
    seeds = sorted({cell["seed"] for cell in data["cells"]})
    versions = ", ".join(f"{key} {value}" for key, value in joined.items())
    return f"seeds {listed(seeds)}; {date}, commits {commit}; {versions}."
