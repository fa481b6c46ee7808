"""Several seeds of a recipe: each once, in a folder of its own, and one table over all."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from comparisons import comparison
from recipe_files import STAGES, image_recipe

from hfslim.cli import main
from hfslim.measuring.class_answers import ClassAnswers
from hfslim.pipeline.manifest import OutputError
from hfslim.pipeline.recipe import RecipeError, parse_recipe
from hfslim.pipeline.seeds import over_seeds, run_seeds
from hfslim.reporting.report import Quality, Report


def report_of(value: float, right: list[tuple[int, int, int, int]], **rest) -> Report:
    answers = ClassAnswers(("a", "b"), 20, tuple(right), None, None, 0.1, 0.02, 0.25)
    quality = Quality("accuracy", value, 0.9, "evaluation, 20 examples", 20)
    return Report("m", [comparison(1)], [quality], answers=answers, **rest)


def test_mean_spread_and_worst_seed_by_hand() -> None:
    reports = {
        42: report_of(0.8, [(9, 1, 0, 0), (7, 2, 0, 1)]),
        43: report_of(0.9, [(8, 2, 0, 0), (10, 0, 0, 0)]),
        44: report_of(0.7, [(10, 0, 0, 0), (5, 5, 0, 0)], warnings=["class b: gone"]),
    }
    report = over_seeds(reports)
    rows = {one.figure: one for one in report.stability}
    accuracy = rows["accuracy"]
    assert (accuracy.mean, accuracy.std) == (pytest.approx(0.8), pytest.approx(0.1))
    assert (accuracy.worst, accuracy.worst_seed) == (0.7, 44)
    worst = rows["class b (the worst), change"]  # a: −0.1, −0.2, 0; b: −0.2, 0, −0.5
    assert worst.values == pytest.approx((-0.2, 0.0, -0.5))
    assert worst.worst_seed == 44
    assert rows["worst class of each seed, change"].values == pytest.approx((-0.2, -0.2, -0.5))
    assert rows["churn"].mean == 0.25
    assert rows["calibration error (ECE)"].better == "low"
    assert rows["speedup, batch 1"].mean == 2.0
    assert report.quality[0].seeds == (42, 43, 44)
    assert report.answers is not None and report.answers.right[1] == (22, 7, 0, 1)
    assert report.warnings == [
        "seed 44: class b: gone",
        "seed 44: accuracy 0.70, of the others 0.85 on average, which hides it",
    ]
    assert Report.from_dict(report.to_dict()).to_dict() == report.to_dict()
    text = report.to_markdown()
    assert "| accuracy | 0.80 | 0.10 | 0.70 | 44 | 0.80 | 0.90 | 0.70 |" in text
    assert "Warning: seed 44: class b: gone." in text


def test_what_one_seed_does_not_know_is_not_summed_up() -> None:
    one = report_of(0.8, [(10, 0, 0, 0), (0, 0, 0, 0)])
    other = report_of(0.8, [(10, 0, 0, 0), (10, 0, 0, 0)])
    blind = replace(other, quality=[replace(other.quality[0], teacher=None)])
    figures = [row.figure for row in over_seeds({1: one, 2: blind}).stability]
    assert "class a (the worst), change" in figures
    assert "accuracy, teacher" not in figures and "accuracy, change" not in figures


def test_finished_seeds_are_not_run_again(tmp_path: Path, capsys) -> None:
    raw = image_recipe(tmp_path)
    out = tmp_path / "out"
    run_seeds(parse_recipe(raw), 2)
    kept = {p: p.stat().st_mtime_ns for p in out.glob("seed-*/**/*") if p.is_file()}
    first = (out / "report.json").read_text()
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(raw))
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["run", str(path), "--seeds", "3", "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
    assert sorted(p.name for p in out.glob("seed-*")) == [f"seed-{n}" for n in (42, 43, 44)]
    assert shown["quality"][0]["seeds"] == [42, 43, 44]
    assert json.loads(first)["quality"][0]["seeds"] == [42, 43]
    single = [json.loads((out / f"seed-{n}" / "report.json").read_text()) for n in (42, 43, 44)]
    assert shown["stability"][0]["values"] == [one["quality"][0]["value"] for one in single]


def test_seeds_that_would_overwrite_are_refused(tmp_path: Path) -> None:
    raw = image_recipe(tmp_path)
    pushing = [*STAGES, {"push": {"hub_model_id": "me/small"}}]
    with pytest.raises(RecipeError, match=r"push over the one before.*hfslim push"):
        run_seeds(parse_recipe({**raw, "stages": pushing}), 2)
    with pytest.raises(RecipeError, match="expected 2 or more"):
        run_seeds(parse_recipe(raw), 1)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_text("{}")
    with pytest.raises(OutputError, match="results of one run"):
        run_seeds(parse_recipe(raw), 2)
