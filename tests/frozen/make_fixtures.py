"""Writes tests/fixtures: what was saved by the package as it was before it was rebuilt.

    python tests/frozen/make_fixtures.py

They stand for the folders that people have; so make them anew only with the code of that time.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import transformers
import yaml
from datasets import Dataset
from models import auto_class, tiny
from record import command, farthest, inputs_of
from safetensors.torch import load_file, save_file
from structures import uneven
from transformers import TrainerCallback, TrainingArguments, set_seed
from zoo import auto_class as zoo_auto_class
from zoo import tiny as zoo_tiny

import hfslim

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
SAVED_AT = 4

# Pruned models, by the folder that each is saved to.
PRUNED = ("bert", "vit", "resnet", "wav2vec2", "whisper", "bert-narrowed")


def whole(name: str) -> Any:
    if name == "resnet":
        return zoo_tiny("image/resnet")
    return tiny(name.partition("-")[0])


def auto_class_of(name: str) -> Any:
    return zoo_auto_class("image/resnet") if name == "resnet" else auto_class(name.split("-")[0])


def narrowed(model: Any) -> hfslim.Structure:
    """Keep the first three quarters of everything but the layers, which a plain config can say."""
    sites: dict[Any, Any] = {"dimensions": {}, "heads": {}, "neurons": {}}
    for site in hfslim.find_units(model, dimensions=True).of(sites):
        sites[site.kind][site.path] = (range(site.size * 3 // 4), site.size)
    return hfslim.Structure.of(sites)


def pruned(name: str, folder: Path) -> None:
    """Save a cut model, with inputs and what it says to them."""
    model = whole(name)
    structure = narrowed(model) if name.endswith("narrowed") else uneven(model)
    hfslim.shrink(model, structure)
    model.save_pretrained(folder)
    inputs = inputs_of(model, 2, 7)
    if name == "resnet":
        inputs = {"pixel_values": inputs["pixel_values"][..., :32, :32].clone()}
    torch.save(inputs, folder / "inputs.pt")
    with torch.no_grad():
        logits = model.eval()(**inputs).logits
    said = {
        "auto_class": auto_class_of(name).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "structure": structure.to_dict(),
        "logits": logits.tolist(),
    }
    (folder / "expected.json").write_text(json.dumps(said) + "\n")


# Training that is interrupted.

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "intermediate_size": 24,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
TRAINING = {
    "output_dir": "run",
    "per_device_train_batch_size": 8,
    "max_steps": 8,
    "learning_rate": 1e-3,
    # Adam divides a gradient by its own size: below epsilon, rounding alone would set the sign.
    "adam_epsilon": 1e-3,
    "use_cpu": True,
    "disable_tqdm": True,
    "report_to": "none",
    "save_steps": SAVED_AT,
}


def texts() -> Dataset:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 60, (64, 12), generator=draw)
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": (ids[:, 0] % 3).tolist()})


def trainer_of(kind: str, *callbacks: TrainerCallback) -> tuple[Any, hfslim.PruningCallback]:
    """Build the Trainer that was interrupted: the stock one, or one that distils."""
    set_seed(0)
    pruning = hfslim.PruningCallback(
        {"sparsity": 0.5}, units=("heads", "neurons"), interval=2, end=0.75
    )
    given = {
        "model": tiny("bert", **SMALL),
        "train_dataset": texts(),
        "callbacks": [pruning, *callbacks],
    }
    if kind == "stock":
        return transformers.Trainer(args=TrainingArguments(**TRAINING), **given), pruning
    args = hfslim.DistillationConfig(**TRAINING, allow_untrained_teacher=True, temperature=2.0)
    teacher = tiny("bert", seed=1, **SMALL)
    return hfslim.DistillationTrainer(args=args, teacher=teacher, **given), pruning


def outcome(trainer: Any, pruning: hfslim.PruningCallback) -> dict[str, Any]:
    """Return the structure that training ended with, and how large each weight is."""
    model = trainer.model.eval()
    with torch.no_grad():
        logits = model(**inputs_of(model, 2, 7)).logits
    assert pruning.structure is not None
    return {
        "structure": pruning.structure.to_dict(),
        "norms": {name: p.norm().item() for name, p in model.named_parameters()},
        "logits": logits.flatten().tolist(),
    }


def checkpoint(kind: str, folder: Path) -> None:
    """Save the checkpoint of the middle, and what uninterrupted training came to."""
    with tempfile.TemporaryDirectory() as work, contextlib.chdir(work):
        trainer, pruning = trainer_of(kind)
        trainer.train()
        expected = outcome(trainer, pruning)
        saved = folder / f"checkpoint-{SAVED_AT}"
        shutil.copytree(f"run/checkpoint-{SAVED_AT}", saved)
        again, resumed = trainer_of(kind)
        # Rounding must not decide what is removed.
        weights = saved / "model.safetensors"
        exact = weights.read_bytes()
        state = load_file(weights)
        for one in state.values():
            one.mul_(1 + 1e-6 * torch.randn(one.shape, generator=torch.Generator().manual_seed(5)))
        save_file(state, weights, {"format": "pt"})
        again.train(resume_from_checkpoint=str(saved))
        weights.write_bytes(exact)
        found = outcome(again, resumed)
        assert found["structure"] == expected["structure"]
        assert farthest(expected["logits"], found["logits"]) < 1e-4
    (folder / "expected.json").write_text(json.dumps(expected) + "\n")


# A recipe that has run.

RECIPE = {
    "task": "image-classification",
    "model_config": {
        "model_type": "vit",
        "image_size": 8,
        "patch_size": 4,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 24,
    },
    "data": {"dataset_name": "digits", "max_train_samples": 256, "max_eval_samples": 100},
    "metric": "accuracy",
    "output_dir": "out",
    "training": {
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 100,
        "logging_steps": 4,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
    },
    "stages": [
        {"transfer": {"num_train_epochs": 1, "learning_rate": 3e-3}},
        {"prune": {"target": {"macs": 0.6}, "max_examples": 64}},
        {"measure": {"batch_sizes": [1]}},
    ],
}


def finished(folder: Path) -> None:
    """Run the recipe, and keep what a later run and `hfslim report` read."""
    folder.mkdir(parents=True)
    with contextlib.chdir(folder):
        Path("recipe.yaml").write_text(yaml.safe_dump(RECIPE, sort_keys=False))
        command("run", "recipe.yaml")
        shutil.rmtree("out/figures")
        for drawn in [*Path("out").rglob("*.html"), *Path("out").rglob("*.png")]:
            drawn.unlink()


def main() -> None:
    """Write all fixtures anew."""
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    shutil.rmtree(FIXTURES, ignore_errors=True)
    for name in PRUNED:
        pruned(name, FIXTURES / "pruned" / name)
    for kind in ("stock", "distillation"):
        checkpoint(kind, FIXTURES / "resume" / kind)
    finished(FIXTURES / "recipe")


if __name__ == "__main__":
    main()
