"""Zeros that a recipe sets are held by its later stages, and told in report, card and logs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from recipe_files import STAGES, image_recipe
from transformers import AutoModelForImageClassification, PreTrainedModel

from hfslim import weight_sparsity
from hfslim.anatomy.weights import find_weights, sparse_modules
from hfslim.hub.card import write_card
from hfslim.pipeline.recipe import RecipeError, parse_recipe
from hfslim.pipeline.runner import run
from hfslim.reporting.report import Report

TRANSFER, _, _, MEASURE = STAGES
PATTERN = {"sparsify": {"pattern": "2:4", "max_examples": 8}}
LOUD = {"max_steps": 2, "learning_rate": 0.01, "weight_decay": 0.1}
LOUD |= {"allow_untrained_teacher": True}


def ran(folder: Path, *stages: dict[str, Any]) -> Path:
    recipe = parse_recipe({**image_recipe(folder), "stages": list(stages)})
    assert parse_recipe(yaml.safe_load(recipe.to_yaml())) == recipe
    run(recipe)
    return folder / "out"


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForImageClassification.from_pretrained(folder)


def zeros(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {path: module.weight == 0 for path, module in find_weights(model).items()}


def test_recovery_holds_the_zeros_and_the_report_tells_them(tmp_path: Path) -> None:
    out = ran(tmp_path, TRANSFER, PATTERN, {"recover": LOUD}, {"transfer": {}}, MEASURE)
    before, *later = (load(out / name) for name in ("02-sparsify", "03-recover", "04-transfer"))
    for after in later:
        assert weight_sparsity(after) == weight_sparsity(before)
        for path, zero in zeros(before).items():
            assert torch.equal(zeros(after)[path], zero)
    assert not torch.equal(
        before.vit.layers[0].mlp.fc1.weight, later[0].vit.layers[0].mlp.fc1.weight
    )
    report = Report.load(out / "05-measure")
    assert report.weight_sparsity[-1]["sparsity"] == 0.5
    assert {row["pattern"] for row in report.weight_sparsity} == {"2:4"}
    assert Report.from_dict(report.to_dict()) == report
    (out / "05-measure" / "report.json").rename(out / "04-transfer" / "report.json")
    card = write_card(out / "04-transfer").read_text()
    for text in (card, (out / "05-measure" / "report.md").read_text()):
        assert "| all | 4,096 | 50.0% | 2:4 |" in text
        assert "Dense kernels multiply zeros like any other number: they bring no speed" in text
    assert "50.0% of the weights of its encoder are zero in the pattern 2:4" in card
    assert "- pruned" in card
    stages = json.loads((out / "manifest.json").read_text())["stages"]
    assert stages[1]["settings"]["method"] == "sparsegpt"
    assert "accuracy" in stages[1]["metrics"]


def test_weights_go_little_by_little_and_more_in_a_later_stage(tmp_path: Path) -> None:
    first = {"sparsity": 0.5, "method": "wanda", "max_examples": 8, "target_modules": ["fc1"]}
    second = {"sparsity": 0.75, "method": "movement", "scope": "layer", "target_modules": ["fc1"]}
    second |= LOUD | {"max_steps": 4}
    out = ran(tmp_path, TRANSFER, {"sparsify": first}, {"sparsify": second}, {"recover": LOUD})
    for folder, sparsity in (("02-sparsify", 0.5), ("03-sparsify", 0.75), ("04-recover", 0.75)):
        model = load(out / folder)
        assert weight_sparsity(model, ["fc1"])[-1].sparsity == sparsity
        assert sparse_modules(model) == [f"vit.layers.{i}.mlp.fc1" for i in (0, 1)]


def test_zeros_of_weights_that_a_stage_does_not_prune_are_not_lost_silently(tmp_path: Path) -> None:
    first = {"sparsity": 0.5, "max_examples": 8, "target_modules": ["fc2"]}
    second = {"sparsity": 0.5, "target_modules": ["fc1"], **LOUD}
    with pytest.raises(ValueError, match=r"2 sparse weights, such as 'vit\.layers\.0\.mlp\.fc2'"):
        ran(tmp_path, TRANSFER, {"sparsify": first}, {"sparsify": second})


@pytest.mark.parametrize(
    "cut", [{}, {"schedule": "cubic", **LOUD, "max_steps": 4}], ids=["at once", "gradual"]
)
def test_a_later_structural_cut_keeps_the_zeros(tmp_path: Path, cut: dict[str, Any]) -> None:
    units = {"target": {"sparsity": {"neurons": 0.5}}, "units": ["neurons"]}
    sparse = {"sparsify": {"sparsity": 0.5, "max_examples": 8}}
    out = ran(tmp_path, TRANSFER, sparse, {"prune": units | cut})
    before, after = load(out / "02-sparsify"), load(out / "03-prune")
    changed = 0
    for index, (old, new) in enumerate(zip(before.vit.layers, after.vit.layers, strict=True)):
        # What a neuron gets tells which of them are left: reconstruction does not change it.
        rows = [
            next(i for i, row in enumerate(old.mlp.fc1.weight == 0) if torch.equal(row, one))
            for one in new.mlp.fc1.weight == 0
        ]
        assert torch.equal(new.mlp.fc2.weight == 0, old.mlp.fc2.weight[:, rows] == 0), index
        changed += int((new.mlp.fc2.weight != old.mlp.fc2.weight[:, rows]).sum())
    assert changed
    assert weight_sparsity(after)[-1].sparsity == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({}, "give either sparsity"),
        ({"sparsity": 0.5, "pattern": "2:4"}, "give either sparsity"),
        ({"sparsity": 0.5, "method": "movement"}, "method must be one of"),
        ({"sparsity": 0.5, "method": "wanda", "max_steps": 4}, "method must be one of"),
        ({"sparsity": 0.5, "method": "wando"}, "did you mean 'wanda'"),
        ({"sparsity": 0.5, "scope": "global"}, "scope of sparsegpt must be one of"),
        ({"sparsity": 0.5, "learning_rate": 1e-4}, "add num_train_epochs for gradual pruning"),
        ({"sparsity": 0.5, "max_examples": 0}, "max_examples must be at least 1"),
        ({"sparsity": 0.5, "start": 0.6, "max_steps": 1}, "start"),
    ],
)
def test_a_stage_that_cannot_be_is_refused(tmp_path: Path, stage, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_recipe({**image_recipe(tmp_path), "stages": [TRANSFER, {"sparsify": stage}]})


def test_a_module_that_there_is_not_is_refused_before_any_training(tmp_path: Path) -> None:
    stage = {"sparsify": {"sparsity": 0.5, "target_modules": ["query"]}}
    with pytest.raises(RecipeError, match="target_modules: no linear layer"):
        run(parse_recipe({**image_recipe(tmp_path), "stages": [TRANSFER, stage]}))
    assert not (tmp_path / "out").exists()
