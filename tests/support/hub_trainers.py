"""Train and push with each Trainer against the Hub that the environment names.

Arguments: a folder. Prints a line of JSON: what a wrong token was answered.
"""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from models import tiny
from structures import uneven
from transformers import Trainer, TrainingArguments

import hfslim
from hfslim import DistillationConfig, DistillationTrainer, SlimTrainer
from hfslim.anatomy.inputs import example_inputs
from hfslim.hub.push import PushError


def pruned():
    model = tiny("vit")
    hfslim.shrink(model, uneven(model))
    return model


def arguments(name: str, cls: type = TrainingArguments, **changes):
    given = {
        "output_dir": str(Path(sys.argv[1]) / name),
        "hub_model_id": f"lab/{name}",
        "push_to_hub": True,
        "hub_strategy": "every_save",
        "hub_always_push": True,
        "save_strategy": "steps",
        "save_steps": 1,
        "max_steps": 2,
        "eval_strategy": "steps",
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return cls(**{**given, **changes})


if __name__ == "__main__":
    torch.set_num_threads(1)
    pixels = example_inputs(tiny("vit"), batch_size=4, seed=3)["pixel_values"]
    rows = {"pixel_values": pixels.numpy(), "labels": [0, 1, 2, 0]}
    data = Dataset.from_dict(rows).with_format("torch")
    parts = {"train_dataset": data, "eval_dataset": data}
    trainers = [
        Trainer(pruned(), arguments("stock"), **parts),
        SlimTrainer(pruned(), arguments("slim"), **parts),
        DistillationTrainer(
            pruned(),
            arguments(
                "distilled",
                DistillationConfig,
                hub_strategy="checkpoint",
                hub_private_repo=True,
                hub_revision="dev",
                allow_untrained_teacher=True,
            ),
            teacher=tiny("vit"),
            **parts,
        ),
    ]
    for trainer in trainers:
        trainer.train()
        if trainer is trainers[-1]:
            trainer.save_model()  # pushes
        else:
            trainer.push_to_hub(language="en", dataset_tags="org/data")
        with torch.no_grad():
            logits = trainer.model.eval()(pixel_values=pixels).logits
        torch.save(logits, Path(trainer.args.output_dir) / "logits.pt")
    trainers[1].model.push_to_hub("lab/direct", tags=["mine"])
    try:
        SlimTrainer(pruned(), arguments("wrong", hub_token="hf_wrong"), **parts)
    except PushError as error:
        print(json.dumps(str(error)))
