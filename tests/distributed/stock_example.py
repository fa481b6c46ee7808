"""A script of the shape of transformers' `run_glue.py`, `run_image_classification.py` and
`run_audio_classification.py`, which takes the callback and the Trainer of hfslim by flags.

As these do, it gives `id2label` string keys and `label2id` strings.
"""

import argparse
import json
import os
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForAudioClassification,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hfslim import DistillationConfig, DistillationTrainer, PruningCallback

AUTO = {
    "text": AutoModelForSequenceClassification,
    "image": AutoModelForImageClassification,
    "audio": AutoModelForAudioClassification,
}
LABELS = ["bird", "cat", "owl"]


def examples(kind: str) -> Dataset:
    draw = np.random.default_rng(0)
    labels = [i % 3 for i in range(48)]
    if kind == "text":
        inputs = {"input_ids": [[1 + c, *draw.integers(4, 16, 5).tolist()] for c in labels]}
    elif kind == "image":
        noise = draw.normal(0, 0.1, (48, 3, 8, 8))
        inputs = {"pixel_values": list(noise + np.eye(3)[labels][:, :, None, None])}
    else:
        time = np.arange(1600) / 1600
        inputs = {"input_values": [np.sin(2 * np.pi * 40 * 4**c * time) for c in labels]}
    data = Dataset.from_dict({**inputs, "labels": labels})
    return data.with_format("torch")


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("kind", "model_name_or_path", "output_dir"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--teacher")
    for name in ("do_train", "do_eval", "prune"):
        parser.add_argument(f"--{name}", action="store_true")
    asked = parser.parse_args()
    set_seed(0)

    label2id, id2label = {}, {}
    for i, label in enumerate(LABELS):
        label2id[label] = str(i)
        id2label[str(i)] = label
    config = AutoConfig.from_pretrained(
        asked.model_name_or_path, num_labels=len(LABELS), label2id=label2id, id2label=id2label
    )
    model = AUTO[asked.kind].from_pretrained(asked.model_name_or_path, config=config)
    data = examples(asked.kind)
    settings = {
        "output_dir": asked.output_dir,
        "per_device_train_batch_size": 8 // int(os.environ.get("WORLD_SIZE", "1")),
        "num_train_epochs": 2,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "report_to": "none",
    }
    parts = {
        "model": model,
        "train_dataset": data if asked.do_train else None,
        "eval_dataset": data if asked.do_eval else None,
        "compute_metrics": lambda p: {"accuracy": float((p[0].argmax(-1) == p[1]).mean())},
        "callbacks": [PruningCallback(target={"macs": 0.7})] if asked.prune else [],
    }
    if asked.teacher:
        args = DistillationConfig(**settings, allow_untrained_teacher=True)
        trainer = DistillationTrainer(args=args, teacher=asked.teacher, **parts)
    else:
        trainer = Trainer(args=TrainingArguments(**settings), **parts)
    if asked.do_train:
        trainer.train()
        trainer.save_model()
    if asked.do_eval:
        metrics = trainer.evaluate()
        if trainer.is_world_process_zero():
            size = sum(p.numel() for p in trainer.model.parameters())
            found = {"accuracy": metrics["eval_accuracy"], "parameters": size}
            found["names"] = [str(name) for name in trainer.model.config.id2label.values()]
            Path(asked.output_dir, "metrics.json").write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
