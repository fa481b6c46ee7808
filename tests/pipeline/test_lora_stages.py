"""LoRA students in the stages of a recipe: adapters train, and are folded in at the end."""

from pathlib import Path

import pytest
import torch
from models import tiny
from recipe_files import STEP, image_recipe
from transformers import AutoModelForImageClassification

import hfslim
from hfslim.anatomy.layer_modules import layer_modules
from hfslim.pipeline.recipe import RecipeError, parse_recipe
from hfslim.pipeline.runner import run
from hfslim.training.transfer import with_lora


def test_a_cut_model_recovers_by_lora_under_feature_losses(tmp_path: Path) -> None:
    recipe = image_recipe(tmp_path)
    recipe["training"] = {**STEP, "max_steps": 2, "learning_rate": 1e-2}
    recipe["stages"] = [
        {"transfer": {}},
        {"prune": {"target": {"macs": 0.5}, "units": ["heads", "layers"], "criterion": "fisher"}},
        {
            "recover": {
                "lora_rank": 2,
                "allow_untrained_teacher": True,
                "feature_losses": {"hidden_mse": 1.0},
            }
        },
    ]
    folder = run(parse_recipe(recipe))
    assert not list(folder.glob("adapter*"))
    cut, recovered = (
        AutoModelForImageClassification.from_pretrained(tmp_path / "out" / name)
        for name in ("02-prune", "03-recover")
    )
    before, after = cut.state_dict(), recovered.state_dict()
    assert {k: v.shape for k, v in before.items()} == {k: v.shape for k, v in after.items()}
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    linear = {f"{n}.weight" for n, m in cut.named_modules() if isinstance(m, torch.nn.Linear)}
    assert "classifier.bias" in moved and len(moved) > 2
    assert moved <= linear | {"classifier.bias"}


def test_a_student_is_distilled_by_lora(tmp_path: Path) -> None:
    recipe = image_recipe(tmp_path)
    recipe["training"] = STEP
    recipe["stages"] = [{"transfer": {}}]
    teacher = run(parse_recipe(recipe))
    recipe |= {"teacher": str(teacher), "output_dir": str(tmp_path / "taught")}
    recipe["stages"] = [{"distil": {"lora_rank": 2, "allow_untrained_teacher": True}}]
    folder = run(parse_recipe(recipe))
    _, info = AutoModelForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


@pytest.mark.parametrize("stage", ["distil", "recover"])
def test_a_rank_below_one_is_refused(stage: str, tmp_path: Path) -> None:
    recipe = image_recipe(tmp_path)
    recipe["stages"] = [{stage: {"lora_rank": 0}}]
    with pytest.raises(RecipeError, match="lora_rank must be at least 1, got 0"):
        parse_recipe(recipe)


def test_zeros_are_not_filled_and_adapters_not_sparsified() -> None:
    model = tiny("bert")
    hfslim.sparsify(model, [], 0.5, method="magnitude")
    with pytest.raises(ValueError, match="would fill their zeros: train without lora_rank"):
        with_lora(model, 2)
    adapted = with_lora(tiny("bert"), 2)
    with pytest.raises(ValueError, match="merge_adapters"):
        hfslim.sparsify(adapted, [], 0.5, method="magnitude")


def test_layers_of_an_adapted_model_are_those_that_are_left() -> None:
    model = tiny("bert")
    units = hfslim.find_units(model).of(["layers", "heads"])
    paths = [site.path for site in units.of(["layers"]).sites]
    heads = [site.path for site in units.of(["heads"]).sites]
    keep = {"layers": {paths[0]: ((1,), 3)}, "heads": {heads[1]: ((0, 2), 4)}}
    hfslim.shrink(model, hfslim.Structure.of(keep))
    layers = layer_modules(model)
    adapted = with_lora(model, 2)
    assert len(layers) == 1 and layer_modules(adapted.get_base_model()) == layers
