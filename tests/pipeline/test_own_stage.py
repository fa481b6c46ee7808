"""A stage that is defined outside of the package runs from a recipe by its name."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from recipe_files import STAGES, image_recipe
from transformers import AutoModelForImageClassification

from hfslim.cli import main
from hfslim.pipeline.recipe import RecipeError, parse_recipe
from hfslim.pipeline.runner import run
from hfslim.pipeline.stages import Stage


@dataclass(frozen=True)
class RoundWeights(Stage):
    """Round all weights to a number of decimals."""

    name = "round"
    decimals: int = 2

    def run(self, state: Any, record: Any, args: Any) -> None:
        model = state.load()
        with torch.no_grad():
            for weight in model.parameters():
                weight.copy_(weight.round(decimals=self.decimals))
        state.save_whole(model, record)


def test_a_stage_of_ones_own_runs_by_its_name(tmp_path: Path) -> None:
    raw = image_recipe(tmp_path)
    raw["stages"] = [STAGES[0], {"round": {"decimals": 1}}]
    recipe = parse_recipe(raw)
    assert "round: {decimals: 1}" in recipe.to_yaml()
    folder = run(recipe)
    assert folder == tmp_path / "out" / "02-round"
    model = AutoModelForImageClassification.from_pretrained(folder)
    for weight in model.parameters():
        torch.testing.assert_close(weight, weight.round(decimals=1), rtol=0, atol=1e-6)
    record = json.loads((tmp_path / "out" / "manifest.json").read_text())["stages"][1]
    assert (record["name"], record["settings"]) == ("round", {"decimals": 1})
    assert record["finished"] and 0 <= record["metrics"]["accuracy"] <= 1


def test_the_command_runs_it_and_sets_its_keys(tmp_path: Path, capsys: Any) -> None:
    raw = image_recipe(tmp_path)
    raw["stages"] = [STAGES[0], "round"]
    (tmp_path / "recipe.yaml").write_text(json.dumps(raw))
    with pytest.raises(SystemExit) as ended:
        main(["run", str(tmp_path / "recipe.yaml"), "--stages.round.decimals", "3", "--json"])
    assert not ended.value.code
    assert json.loads(capsys.readouterr().out)["stages"][1]["settings"] == {"decimals": 3}


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"round": {"decimal": 1}}, r"stages\[2\] round\.decimal: unknown key; .*'decimals'\?"),
        ({"round": {"decimals": 1.5}}, "decimals: expected a whole number, got 1.5"),
        ({"roun": {}}, r"unknown stage 'roun'; did you mean 'round'\?"),
    ],
)
def test_its_keys_are_checked(stage: dict, message: str, tmp_path: Path) -> None:
    raw = image_recipe(tmp_path)
    with pytest.raises(RecipeError, match=message):
        parse_recipe({**raw, "stages": [STAGES[0], stage]})


def test_a_name_belongs_to_one_stage() -> None:
    with pytest.raises(ValueError, match=r"'prune' belongs to .*stages\.prune\.Prune: choose"):
        type("Other", (Stage,), {"name": "prune"})
