"""Run a recipe with several seeds, and report the spread of its results."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Literal

from accelerate import PartialState

from hfslim.measuring.class_answers import HIDDEN, ClassAnswers, decimals
from hfslim.pipeline.manifest import FILE, OutputError
from hfslim.pipeline.recipe import Recipe, RecipeError
from hfslim.pipeline.runner import run
from hfslim.reporting.page import write_all
from hfslim.reporting.report import Quality, Report
from hfslim.reporting.seed_statistics import SeedStatistics

__all__ = ["over_seeds", "run_seeds"]

logger = logging.getLogger(__name__)


def run_seeds(recipe: Recipe, count: int) -> Path:
    """Run a recipe with its seed and the next ones, each in its own folder, and report on all.

    Finished runs are not repeated, so a later call can ask for more seeds. Every process calls
    this.

    Returns:
        The folder of the report, `output_dir`.

    Raises:
        RecipeError: The recipe pushes, or `count` is below 2.
        OutputError: `output_dir` holds the results of one run.
    """
    folder = Path(recipe.output_dir)
    if count < 2:
        raise RecipeError(f"seeds: got {count}, expected 2 or more; `seed` sets that of one run")
    if any(stage.uploads for stage in recipe.stages):
        raise RecipeError(
            "seeds: each run would push over the one before; leave out the `push` stage, and push "
            "the run that you choose by `hfslim push`"
        )
    if (folder / FILE).exists():
        raise OutputError(
            f"output_dir {str(folder)!r} holds the results of one run: set another output_dir"
        )
    seeds = range(recipe.seed, recipe.seed + count)
    for number, seed in enumerate(seeds, 1):
        logger.info("seed %d, %d of %d", seed, number, count)
        run(replace(recipe, seed=seed, output_dir=str(folder / f"seed-{seed}")))
    if PartialState().is_main_process:
        report = over_seeds({seed: Report.load(folder / f"seed-{seed}") for seed in seeds})
        write_all(report, folder, "tensorboard" in str(recipe.training.get("report_to")))
        report.print()
        for warning in report.warnings:
            logger.warning("warning: %s", warning)
    return folder


def over_seeds(reports: Mapping[int, Report]) -> Report:
    """Combine the reports of one recipe, given by seed.

    Metrics are means and answers sums; costs, kept units and losses are those of the first report.
    """
    seeds, runs = tuple(reports), list(reports.values())
    first, quality = runs[0], [one.quality[0] for one in runs]
    teachers = [one.teacher for one in quality if one.teacher is not None]
    sizes = {one.examples for one in quality}
    mean = Quality(
        metric=quality[0].metric,
        value=fmean(one.value for one in quality),
        teacher=fmean(teachers) if len(teachers) == len(runs) else None,
        data=f"mean of {len(runs)} seeds, {quality[0].data}",
        examples=quality[0].examples if len(sizes) == 1 else None,
        seeds=seeds,
    )
    answers = [one.answers for one in runs if one.answers]
    return replace(
        first,
        model=f"{first.model}, {len(seeds)} seeds",
        quality=[mean],
        answers=ClassAnswers.pooled(answers) if answers else None,
        stability=_stability(reports),
        warnings=_warnings(reports),
        curve=[{**point, "seed": seed} for seed, one in reports.items() for point in one.curve],
        history=[{**stage, "seed": seed} for seed, one in reports.items() for stage in one.history],
        provenance=replace(first.provenance, seeds=seeds),
    )


def _stability(reports: Mapping[int, Report]) -> list[SeedStatistics]:
    seeds, runs = tuple(reports), list(reports.values())
    spreads = []

    def add(
        figure: str,
        values: list[float | None],
        better: Literal["high", "low"],
        digits: int = decimals(runs[0].quality[0].examples),
    ) -> None:
        known = [value for value in values if value is not None and math.isfinite(value)]
        if len(known) == len(seeds):
            spreads.append(SeedStatistics(figure, tuple(known), seeds, better, digits))

    quality = [one.quality[0] for one in runs]
    metric = quality[0].metric
    add(metric, [one.value for one in quality], "high")
    add(f"{metric}, teacher", [one.teacher for one in quality], "high")
    add(f"{metric}, change", [one.difference for one in quality], "high")
    answers = [one.answers for one in runs if one.answers]
    if answers:
        add("calibration error (ECE)", [one.ece for one in answers], "low")
        add("calibration error (ECE), teacher", [one.teacher_ece for one in answers], "low")
        add("churn", [one.churn for one in answers], "low")
        changes = _class_changes(answers)
        if changes:
            worst = min(changes, key=lambda name: fmean(changes[name]))
            add(f"class {worst} (the worst), change", [*changes[worst]], "high")
        worst_lines = [one.worst() for one in answers]
        lowest = [line.change if line else None for line in worst_lines]
        add("worst class of each seed, change", lowest, "high")
    for comparisons in zip(*(one.comparisons for one in runs), strict=True):
        at = f"batch {comparisons[0].after.latency.batch_size}"
        kept = [one.after.macs / one.before.macs for one in comparisons]
        add(f"MACs kept, {at}", [*kept], "low", 4)
        add(f"speedup, {at}", [one.speedup for one in comparisons], "high", 2)
    return spreads


def _class_changes(answers: list[ClassAnswers]) -> dict[str, list[float]]:
    """Return the change of each class under each seed, for classes that all seeds have."""
    by_class: dict[str, list[float]] = {}
    for one in answers:
        for line in one.lines():
            if line.change is not None:
                by_class.setdefault(line.name, []).append(line.change)
    return {name: values for name, values in by_class.items() if len(values) == len(answers)}


def _warnings(reports: Mapping[int, Report]) -> list[str]:
    found = [f"seed {seed}: {one}" for seed, report in reports.items() for one in report.warnings]
    values = {seed: report.quality[0].value for seed, report in reports.items()}
    quality = next(iter(reports.values())).quality[0]
    metric, digits = quality.metric, decimals(quality.examples)
    for seed, value in values.items():
        others = fmean(other for key, other in values.items() if key != seed)
        if others - value >= HIDDEN:
            found.append(
                f"seed {seed}: {metric} {value:.{digits}f}, of the others {others:.{digits}f} on "
                "average, which hides it"
            )
    return found
