"""Compare hfslim with other methods: same teacher, data, multiply-accumulates and recovery.

    python -m benchmarks.rivals text [--teacher FOLDER] [--data FOLDER] [--recipe.key value …]

Without a teacher, the recipe's is trained first. Cells that are already in the results are not run
again, so an interrupted run goes on; several processes with other seeds, budgets or methods may
share a file. The tables: `python -m benchmarks.tables`.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import yaml
from transformers.utils import logging as transformers_logging

from benchmarks.rivals.cells import choose_setting, describe_teacher, run_cell
from benchmarks.rivals.data import SETTINGS, Setting, Task, train_teacher
from benchmarks.rivals.methods import METHODS
from benchmarks.rivals.results import Results
from hfslim.pipeline.recipe import Recipe, load_recipe

RESULTS = Path("benchmarks/results")
FIRST_SEED = 0
"""Seed at which settings are chosen and latency is taken."""


def main(arguments: Sequence[str] | None = None) -> None:
    options, overrides = parse(arguments)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("hfslim").setLevel(logging.INFO)
    given = {f.name: getattr(options, f.name) for f in fields(Setting) if f.name != "recipe"}
    setting = replace(SETTINGS[options.name], **{k: v for k, v in given.items() if v is not None})
    recipe = recipe_of(setting, options, overrides)
    task = Task.prepare(options.name, setting, recipe, options.teacher or train_teacher(recipe))
    logging.getLogger("hfslim").setLevel(logging.WARNING)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    results = Results(options.output or RESULTS / f"{options.name}.json")
    run = results.begin(
        {
            "name": options.name,
            "setting": asdict(setting),
            "recovery": dict(task.arguments),
            "teacher": describe_teacher(task),
        }
    )
    runner = Runner(task, results, run, options.budgets, FIRST_SEED, options.settings)
    for seed in options.seeds:
        for budget in options.budgets:
            for method in options.methods:
                runner.cell(method, budget, seed)


@dataclass(frozen=True)
class Runner:
    """Runs the cells that a file of results still lacks."""

    task: Task
    results: Results
    run: int
    budgets: Sequence[float]
    first_seed: int
    settings: str

    def cell(self, method: str, budget: float, seed: int) -> None:
        """Run a cell, add it to the results and say so."""
        key = {"method": method, "budget": budget, "seed": seed}
        if self.results.find("cells", **key):
            return
        setting = self.setting(method, budget)
        timed = seed == self.first_seed
        cell = {**key, "setting": setting, "run": self.run}
        cell |= run_cell(self.task, method, setting, budget, seed, timed)
        self.results.add("cells", cell)
        before, after = cell["before"]["accuracy"], cell["after"]["accuracy"]
        print(
            f"{self.task.name} {method} ({setting}) at {budget:g}, seed {seed}: MACs "
            f"{cell['macs']:.3f}, accuracy {before:.4f} before and {after:.4f} after recovery, "
            f"{cell['cut_seconds']:.0f} s and {cell['recovery_seconds']:.0f} s",
            flush=True,
        )

    def setting(self, method: str, budget: float) -> str:
        """Return a method's best setting: of all at the middle budget, of its best at others."""
        every = list(METHODS[method])
        candidates = [name for name in every if self.settings in name] or every
        if len(candidates) == 1:
            return candidates[0]
        key = {"method": method, "budget": budget}
        choice = self.results.find("choices", **key)
        if choice is None:
            middle = sorted(self.budgets)[len(self.budgets) // 2]
            if budget != middle:
                self.setting(method, middle)
                tried = (self.results.find("choices", method=method, budget=middle) or {})["tried"]
                candidates = [row["setting"] for row in tried if "accuracy" in row]
            start = time.perf_counter()
            choice = {**key, "run": self.run}
            choice |= choose_setting(self.task, method, candidates, budget, self.first_seed)
            choice["seconds"] = time.perf_counter() - start
            self.results.add("choices", choice)
        return choice["setting"]


def parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], allow_abbrev=False, prog="python -m benchmarks.rivals"
    )
    parser.add_argument("name", choices=SETTINGS)
    parser.add_argument("--teacher", help="trained model, Hub id or folder; trained if not given")
    parser.add_argument("--data", help="folder of the data, in place of the recipe's")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.75, 0.5, 0.33, 0.25])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--settings", metavar="TEXT", default="", help="try only the settings whose name holds it"
    )
    parser.add_argument("--output", type=Path, help=f"file of the results, in {RESULTS} by default")
    for field in fields(Setting):
        if field.name != "recipe":
            number = float if field.name == "epochs" else int
            parser.add_argument(f"--{field.name}", type=number)
    return parser.parse_known_args(arguments)


def recipe_of(setting: Setting, options: argparse.Namespace, overrides: list[str]) -> Recipe:
    """Read the recipe with the data where they are, and a folder of its own for the teacher."""
    raw = yaml.safe_load(Path(setting.recipe).read_text(encoding="utf-8"))
    moved = []
    if options.data:
        for key, value in raw["data"].items():
            if str(value).startswith("data/"):
                rest = Path(*Path(value).parts[2:])
                moved += [f"--data.{key}", str(Path(options.data) / rest)]
    folder = ["--output_dir", f"outputs/bench_{options.name}"]
    return load_recipe(setting.recipe, [*folder, *moved, *overrides])


if __name__ == "__main__":
    main()
