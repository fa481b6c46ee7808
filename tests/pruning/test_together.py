"""Accumulation, gradient checkpointing and bf16 together with pruning in training."""

import pytest
import torch
from datasets import Dataset
from models import tiny
from transformers import set_seed

from hfslim import DistillationConfig, DistillationTrainer, PruningCallback

PLAIN = {"per_device_train_batch_size": 8}
PARTS = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "activation_checkpointing": True,
}


def run(folder, criterion, **settings):
    set_seed(0)
    texts = torch.randint(64, (32, 12), generator=torch.Generator().manual_seed(0))
    calm = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    callback = PruningCallback({"sparsity": 0.5}, ["heads"], criterion, interval=4, end=0.6)
    trainer = DistillationTrainer(
        model=tiny("bert", **calm),
        args=DistillationConfig(
            output_dir=str(folder),
            max_steps=7,
            optim="sgd",
            learning_rate=0.01,
            feature_losses={"hidden_mse": 0.5},
            save_strategy="no",
            allow_untrained_teacher=True,
            use_cpu=True,
            disable_tqdm=True,
            **settings,
        ),
        teacher=tiny("bert", seed=1, **calm),
        train_dataset=Dataset.from_dict(
            {"input_ids": texts.tolist(), "labels": (texts[:, 0] % 3).tolist()}
        ),
        callbacks=[callback],
    )
    trainer.train()
    return callback.structure, trainer.model.state_dict()


@pytest.mark.parametrize("criterion", ["fisher", "activation"])
def test_accumulation_checkpointing_and_bf16_change_no_decision(tmp_path, criterion):
    structure, weights = run(tmp_path, criterion, **PLAIN)
    same, parts = run(tmp_path, criterion, **PARTS)
    rounded, _ = run(tmp_path, criterion, **PARTS, bf16=True)
    assert structure.counts()["heads"] == (6, 12)
    assert same == structure and rounded == structure
    for name, value in weights.items():
        torch.testing.assert_close(parts[name], value, rtol=0, atol=1e-5)
