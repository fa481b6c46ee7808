"""Print the shape of the package: what is counted, how much there is, and the limit.

python tests/support/shape.py    exits with 1 where a limit is passed
"""

import ast
import collections
import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from places import ROOT

PACKAGE = ROOT / "hfslim"
MANY_FIELDS = ("Config", "Recipe", "Report", "Coverage")
"""Ends of the names of dataclasses that are configurations or tables."""


class Count(NamedTuple):
    """One property of the package."""

    what: str
    found: float
    limit: float
    where: str = ""

    @property
    def within(self) -> bool:
        return self.found <= self.limit


def trees() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")}


def entries(folder: Path) -> list[str]:
    """Return the rooms and files of a folder, but `__init__` and `__main__`."""
    return [
        path.name
        for path in sorted(folder.iterdir())
        if (path.suffix == ".py" and not path.stem.startswith("__"))
        or (path / "__init__.py").exists()
    ]


def files(folder: Path) -> int:
    return sum(path.is_file() and not path.stem.startswith("__") for path in folder.glob("*.py"))


def twice(names: dict[str, list[str]]) -> dict[str, list[str]]:
    return {name: places for name, places in names.items() if len(places) > 1}


def public_classes(parsed: dict[Path, ast.Module]) -> dict[str, list[str]]:
    names = collections.defaultdict(list)
    for path, tree in parsed.items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                names[node.name].append(str(path.relative_to(PACKAGE)))
    return names


def dataclasses(parsed: dict[Path, ast.Module]) -> dict[str, int]:
    """Return the number of fields of each dataclass that is no configuration or table."""
    return {
        node.name: sum(
            isinstance(line, ast.AnnAssign) and "ClassVar" not in ast.unparse(line.annotation)
            for line in node.body
        )
        for tree in parsed.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        and any("dataclass" in ast.unparse(one) for one in node.decorator_list)
        and not node.name.endswith(MANY_FIELDS)
    }


def double_lives() -> list[str]:
    """Return the dotted names that are a module and, in their package, something else."""
    importlib.import_module("hfslim")
    found = []
    for module in pkgutil.walk_packages([str(PACKAGE)], "hfslim."):
        if module.name.endswith("__main__"):
            continue
        importlib.import_module(module.name)
    for name, module in list(sys.modules.items()):
        parent, _, last = name.rpartition(".")
        if parent.split(".")[0] == "hfslim" and getattr(sys.modules[parent], last) is not module:
            found.append(name)
    return found


def import_seconds() -> tuple[float, bool]:
    """Return the least of five times that `import hfslim` takes, and whether it loads torch."""
    code = (
        "import time; t = time.perf_counter(); import hfslim, sys; "
        "print(time.perf_counter() - t, 'torch' in sys.modules)"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        for _ in range(5)
    ]
    times = [run.stdout.split() for run in runs]
    return min(float(seconds) for seconds, _ in times), any(torch == "True" for _, torch in times)


def counts() -> list[Count]:
    parsed = trees()
    text = {path: path.read_text(encoding="utf-8") for path in parsed}
    folders = [path.parent for path in parsed if path.name == "__init__.py"]
    widest = max((f for f in folders if f.name != "anatomy"), key=files)
    classes, fields = twice(public_classes(parsed)), dataclasses(parsed)
    broadest = max(fields, key=lambda name: fields[name])
    guards = [str(p.relative_to(PACKAGE)) for p, code in text.items() if "is_initialized(" in code]
    rooms = {"support", "fixtures", "frozen", "distributed", "faults", *entries(PACKAGE)}
    strangers = [
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").rglob("test_*.py")
        if len(parts := path.relative_to(ROOT / "tests").parts) > 1
        and (
            parts[0] not in rooms
            or (parts[0] in entries(PACKAGE) and not PACKAGE.joinpath(*parts[:-1]).is_dir())
        )
    ]
    from hfslim import prune

    doubles = double_lives()
    seconds, torch = import_seconds()
    staged = [p for p, code in text.items() if "isinstance(stage" in code]
    return [
        Count("rooms and files under hfslim/", len(entries(PACKAGE)), 12),
        Count("files in the widest room", files(widest), 12, str(widest.relative_to(ROOT))),
        Count("public class names used twice", len(classes), 0, ", ".join(classes)),
        Count("names that are a module and something else", len(doubles), 0, ", ".join(doubles)),
        Count("files with isinstance(stage", len(staged), 0),
        Count("files with is_initialized(", len(guards), 1, ", ".join(guards)),
        Count("parameters of prune", len(inspect.signature(prune).parameters), 11),
        Count("fields of the broadest dataclass", fields[broadest], 15, broadest),
        Count("test files outside of the rooms", len(strangers), 0, ", ".join(strangers)),
        Count("import hfslim, ms", round(1000 * seconds), 100),
        Count("import hfslim loads torch", torch, 0),
        Count("lines of hfslim/", sum(code.count("\n") for code in text.values()), LINES),
    ]


LINES = 31_000
"""A feature that needs more raises this in its own commit, and says what the lines are for.

The goal for the features of 0.1.0 was 27,000; the rebuilt package had 28,640 with them. The faults
from the field and FSDP2 took 2,140 more.
"""


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    found = counts()
    for one in found:
        mark = " " if one.within else "!"
        print(f"{mark} {one.what:45} {one.found:>8g}   at most {one.limit:>6g}   {one.where}")
    sys.exit(not all(one.within for one in found))
