"""Distil models of several families in turn under FSDP2, and write what each ends with.

Usage, under torchrun: fsdp2.py FOLDER CASE …
"""

import os
import sys
from pathlib import Path
from typing import Any

import fsdp2_on_cpu
import models
import torch
import zoo
from datasets import Dataset
from safetensors.torch import load_file
from structures import uneven
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import AutoConfig, PreTrainedModel, set_seed

import hfslim
from hfslim import DistillationConfig, DistillationTrainer
from hfslim.anatomy.inputs import example_inputs
from hfslim.training.ranks import rank

EXAMPLES = 21
WORLD = int(os.environ.get("WORLD_SIZE", "1"))
CASES = {
    "bert": "bert",
    "roberta": "roberta",
    "modernbert": "modernbert",
    "distilbert": "distilbert",
    "vit": "vit",
    "swin": "swin",
    "resnet": "resnet",
    "wav2vec2": "wav2vec2",
    "bert, headless and unequal": "bert",
    "bert, resumed": "bert",
}
"""Each case with its family."""
LOGITS_ALONE = ("swin", "resnet", "bert, headless and unequal")


def built(family: str, seed: int = 0) -> PreTrainedModel:
    """Build a model without dropout, and with batch norms that keep their statistics."""
    kept = {
        name: 0.0
        for name, value in vars(AutoConfig.for_model(family)).items()
        if "drop" in name and isinstance(value, float)
    }
    if family != "resnet":
        return models.tiny(family, seed=seed, **kept)
    model = zoo.tiny("image/resnet", seed=seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train = lambda mode=True, norm=module: norm  # type: ignore[method-assign]
    return model


def train(case: str, folder: Path) -> dict[str, Any]:
    """Distil for four steps; return the losses, the saved weights, and the names of the parts."""
    set_seed(0)
    family = CASES[case]
    student, teacher = built(family), built(family, seed=1)
    shape = {"length": 8} if student.main_input_name == "input_ids" else {}
    batch = example_inputs(student, EXAMPLES, **shape)
    columns = {name: values.tolist() for name, values in batch.items()}
    data = Dataset.from_dict({**columns, "labels": [i % 3 for i in range(EXAMPLES)]})
    if "unequal" in case:
        hfslim.shrink(student, uneven(student))

    def trainer(steps: int, student: PreTrainedModel) -> DistillationTrainer:
        arguments = DistillationConfig(
            output_dir=str(folder),
            per_device_train_batch_size=4 // WORLD,
            per_device_eval_batch_size=4 // WORLD,
            max_steps=steps,
            # Of SGD, torch cannot load the state, which has no tensors.
            optim="adamw_torch" if "resumed" in case else "sgd",
            adam_epsilon=1e-2,
            learning_rate=0.01 if "resumed" in case else 0.05,
            lr_scheduler_type="constant",
            feature_losses={} if case in LOGITS_ALONE else {"hidden_mse": 0.5},
            logging_steps=1,
            save_strategy="steps" if "resumed" in case else "no",
            save_steps=2,
            allow_untrained_teacher=True,
            use_cpu=True,
            disable_tqdm=True,
            report_to="none",
        )
        return DistillationTrainer(
            student, arguments, teacher=teacher, train_dataset=data, eval_dataset=data
        )

    first = trainer(2 if "resumed" in case else 4, student)
    first.train()
    if "resumed" in case:
        teacher = built(family, seed=1)
        first = trainer(4, built(family))
        first.train(resume_from_checkpoint=True)
    first.evaluate()
    first.save_model(str(folder / "saved"))
    if WORLD > 1:
        torch.distributed.barrier()
    losses = [v for log in first.state.log_history for k, v in log.items() if "loss" in k]
    parts = [name for name, m in first.model.named_modules() if isinstance(m, FSDPModule)]
    weights = load_file(folder / "saved" / "model.safetensors")
    return {"losses": losses, "weights": weights, "parts": parts}


if __name__ == "__main__":
    torch.set_num_threads(1)
    fsdp2_on_cpu.enable()
    target, found = Path(sys.argv[1]), {}
    for case in sys.argv[2:]:
        found[case] = train(case, target / case)
    if rank() == 0:
        torch.save(found, target / "found.pt")
    torch.distributed.destroy_process_group()
