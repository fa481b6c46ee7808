"""The tables of the comparison with other methods."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from benchmarks.markdown import Row, circumstances, percent, spread, table


def render(data: Row) -> str:
    """Return the Markdown of one benchmark: accuracy, cost, settings and circumstances."""
    parts = [_accuracy(data), _settings(data), _circumstances(data)]
    return "\n".join(part for part in parts if part)


def _accuracy(data: Row) -> str:
    groups = _groups(data)
    timed = {
        key: next((c["latency"] for c in cells if "latency" in c), ()) for key, cells in groups
    }
    batches = sorted({one["batch"] for latency in timed.values() for one in latency})
    head = ["MACs asked", "method", "MACs kept", "parameters", "right after the cut", "recovered"]
    head += [f"speedup, batch {batch}" for batch in batches] + ["time to cut"]
    teacher = data["teacher"]["accuracy"]
    rest = ["–"] * (len(head) - 5)
    rows = [["1", "teacher", "1", "1", percent(teacher), *rest]]
    for (budget, method), cells in groups:
        speed = {one["batch"]: one for one in timed[budget, method]}
        rows.append(
            [
                f"{budget:g}",
                method,
                _mean(cells, lambda cell: cell["macs"], "{:.3f}"),
                _mean(cells, lambda cell: cell["parameters"], "{:.3f}"),
                spread([cell["before"]["accuracy"] for cell in cells]),
                spread([cell["after"]["accuracy"] for cell in cells]),
                *(_speedup(speed.get(batch)) for batch in batches),
                _mean(cells, lambda cell: cell["cut_seconds"], "{:.0f} s"),
            ]
        )
    return table(head, rows)


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
    return (
        f"`{setting['recipe']}`; {setting['evaluation']:,} held-out examples, "
        f"{setting['calibration']:,} to cut by, {setting['train']:,} for a recovery of "
        f"{setting['epochs']:g} epoch{'s' if setting['epochs'] != 1 else ''} at a learning rate of "
        f"{recovery['learning_rate']:g}; teacher: {teacher['parameters'] / 1e6:.1f} M parameters, "
        f"{teacher['macs'] / 1e6:,.0f} M multiply-accumulates; "
        f"{circumstances(data)}"
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


def _mean(cells: Sequence[Row], read: Callable[[Row], float], form: str) -> str:
    return form.format(statistics.fmean(read(cell) for cell in cells))


def _speedup(one: Row | None) -> str:
    return "–" if one is None else f"{one['speedup']:.2f} ({one['low']:.2f}–{one['high']:.2f})"
