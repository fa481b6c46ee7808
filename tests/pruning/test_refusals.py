"""What a recipe cannot use is refused in words before any stage runs; nothing is written."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from models import tiny
from places import ROOT

from hfslim.pipeline.recipe import RecipeError, parse_recipe
from hfslim.pipeline.runner import run

VIT = {"model_type": "vit", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
VIT |= {"intermediate_size": 16, "image_size": 8, "patch_size": 4}
RESNET = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8], "depths": [1]}


def refusal(folder: Path, **changes: Any) -> str:
    raw = {
        "task": "image-classification",
        "model_config": VIT,
        "data": {"dataset_name": "digits", "max_train_samples": 32, "max_eval_samples": 32},
        "training": {"max_steps": 1, "use_cpu": True, "disable_tqdm": True},
        "stages": ["transfer", {"prune": {"target": {"macs": 0.6}}}],
        "output_dir": str(folder / "out"),
    }
    raw = {key: value for key, value in (raw | changes).items() if value is not None}
    with pytest.raises(RecipeError) as error:
        run(parse_recipe(raw))
    assert not (folder / "out").exists()
    return str(error.value)


def test_a_model_without_the_units_asked_for(tmp_path: Path) -> None:
    vit = tmp_path / "vit"
    tiny("vit", image_size=8).save_pretrained(vit)
    (vit / "preprocessor_config.json").write_text('{"image_processor_type": "ViTImageProcessor"}')
    message = refusal(tmp_path, model_config=RESNET, processor=str(vit))
    assert "has no heads that can be removed (found no module with projections" in message
    assert "it has ['channels']" in message


def test_a_model_whose_config_does_not_tell_the_size_of_an_image(tmp_path: Path) -> None:
    message = refusal(tmp_path, model_config=RESNET)
    assert "'resnet' does not state the size of an image" in message
    assert "set `processor`" in message


@pytest.mark.parametrize("key", ["model", "teacher"])
def test_a_model_that_cannot_be_found(tmp_path: Path, key: str) -> None:
    config = None if key == "model" else VIT
    stages = ["transfer" if key == "model" else "distil"]
    changes = {key: "nobody/nothing", "model_config": config, "stages": stages}
    message = refusal(tmp_path, **changes)
    assert message.startswith(f"{key} 'nobody/nothing' cannot be read: ")
    assert "\n" not in message


@pytest.mark.parametrize("stage", ["distil", "recover", "prune"])
def test_a_teacher_of_other_labels(tmp_path: Path, stage: str) -> None:
    tiny("vit", num_labels=2, image_size=8).save_pretrained(tmp_path / "teacher")
    own = {"max_steps": 1, "teacher": str(tmp_path / "teacher")}
    if stage == "prune":
        own["target"] = {"macs": 0.6}
    message = refusal(tmp_path, stages=["transfer", {stage: own}])
    assert "labels of teacher and student do not match" in message
    assert "LABEL_1" in message


def test_the_launcher_tells_of_weights_that_are_not_finite_without_a_traceback(
    tmp_path: Path,
) -> None:
    model = tiny("vit", image_size=8, num_labels=10)
    with torch.no_grad():
        model.vit.layers[1].mlp.fc1.weight[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "vit")
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}}
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(processor))
    recipe = {
        "task": "image-classification",
        "model": str(tmp_path / "vit"),
        "data": {"dataset_name": "digits", "max_train_samples": 32, "max_eval_samples": 32},
        "training": {"use_cpu": True, "disable_tqdm": True},
        "stages": [{"prune": {"target": {"macs": 0.6}}}],
        "output_dir": str(tmp_path / "out"),
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    launcher = ROOT / "recipes" / "compress.py"
    done = subprocess.run(
        [sys.executable, str(launcher), str(tmp_path / "recipe.yaml")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "'vit.layers.1.mlp.fc1' is not finite: check" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
