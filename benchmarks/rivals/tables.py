"""The tables of the comparison with other methods."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

from benchmarks.markdown import Row, circumstances, percent, spread, table

TITLES = {
    "text": "MiniLM-L6, tweets in 3 classes",
    "image": "ViT of 1.2 M parameters, Fashion-MNIST",
    "resnet": "ResNet of 0.7 M parameters, Fashion-MNIST",
    "speech": "Whisper tiny.en encoder, voice prompts in 5 languages",
}


def headline(files: Sequence[Row], budgets: Sequence[float] = (0.5, 0.25)) -> str:
    """Return a table of what hfslim saves and keeps: one row a model and budget.

    Accuracies are means over seeds; the speedup is that of batch 32; the last column is the best of
    the other methods after the same recovery.
    """
    rows = []
    for data in files:
        groups = dict(_groups(data))
        for budget in budgets:
            own = groups[budget, "hfslim"]
            fast = [one for cell in own for one in cell.get("latency", ()) if one["batch"] == 32]
            cut, recovered = (_accuracy_of(own, when) for when in ("before", "after"))
            others = {
                method: _accuracy_of(c, "after") for (b, method), c in groups.items() if b == budget
            }
            best = max((m for m in others if m != "hfslim"), key=lambda m: others[m])
            rows.append(
                [
                    TITLES[data["name"]] if budget == budgets[0] else "",
                    f"{budget:.0%}".replace("%", " %"),
                    f"**{fast[0]['speedup']:.2f} ×**" if fast else "–",
                    percent(data["teacher"]["accuracy"]),
                    percent(cut),
                    f"**{percent(recovered)}**",
                    f"{percent(others[best])} ({best})",
                ]
            )
    head = ["model and data", "operations kept", "times as fast", "whole model"]
    head += ["right after the cut", "recovered", "best other method, recovered"]
    return table(head, rows)


def _accuracy_of(cells: Sequence[Row], when: str) -> float:
    return statistics.fmean(cell[when]["accuracy"] for cell in cells)


def leads(files: Sequence[Row]) -> str:
    """Return by how much hfslim is ahead of the best other method, beside the spread over seeds."""
    rows = []
    for data in files:
        title = TITLES[data["name"]]
        groups = dict(_groups(data))
        for budget in sorted({budget for budget, _ in groups}, reverse=True):
            own = groups.get((budget, "hfslim"), [])
            others = {m: c for (b, m), c in groups.items() if b == budget and m != "hfslim"}
            cells = (_lead(own, others, when) for when in ("before", "after"))
            rows.append([title, f"{budget:g}", *cells])
            title = ""
    return table(["model and data", "MACs asked", "right after the cut", "recovered"], rows)


def _lead(own: Sequence[Row], others: Mapping[str, Sequence[Row]], when: str) -> str:
    """Tell the lead over the best of the others in points, in italics where the spread covers it.

    The spread is the greater of the two standard deviations.
    """
    if not own or not others:
        return "–"

    def points(cells: Sequence[Row]) -> list[float]:
        return [100 * cell[when]["accuracy"] for cell in cells]

    best = max(others, key=lambda method: statistics.fmean(points(others[method])))
    sides = points(own), points(others[best])
    lead = statistics.fmean(sides[0]) - statistics.fmean(sides[1])
    if min(map(len, sides)) < 2:
        return f"{lead:+z.1f}, {best}"
    spread = max(map(statistics.stdev, sides))
    text = f"{lead:+z.1f} (spread {spread:.1f}), {best}"
    return f"*{text}*" if abs(lead) <= spread else text


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
    head += [f"speedup, batch {batch}" for batch in batches] + ["time to cut", "memory to cut"]
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
                _memory(cells),
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


def _memory(cells: Sequence[Row]) -> str:
    """Give the greatest of the seeds, where it was taken."""
    taken = [cell["cut_bytes"] for cell in cells if cell.get("cut_bytes") is not None]
    return f"{max(taken) / 2**20:.0f} MiB" if taken else "–"


def _speedup(one: Row | None) -> str:
    return "–" if one is None else f"{one['speedup']:.2f} ({one['low']:.2f}–{one['high']:.2f})"
