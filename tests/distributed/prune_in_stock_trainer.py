"""A stock Trainer script with two lines added: one imports the callback, one passes it."""

import json
import os
import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hfslim import PruningCallback


def main(output: Path, criterion: str) -> None:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    set_seed(0)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=48,
            num_labels=3,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )
    texts = torch.randint(64, (96, 12), generator=torch.Generator().manual_seed(0))
    data = Dataset.from_dict({"input_ids": texts.tolist(), "labels": (texts[:, 0] % 3).tolist()})
    args = TrainingArguments(
        output_dir=str(output),
        per_device_train_batch_size=8 // processes,
        num_train_epochs=2,
        learning_rate=1e-3,
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="steps",
        save_steps=7,
    )
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=data,
        callbacks=[PruningCallback(target={"macs": 0.5}, criterion=criterion)],
    )
    trainer.train()

    rank = int(os.environ.get("RANK", "0"))
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, PruningCallback))
    digest = torch.cat([p.detach().double().flatten() for p in model.parameters()])
    (output / f"rank{rank}.json").write_text(
        json.dumps(
            {
                "structure": callback.structure.to_dict(),
                "parameters": digest.numel(),
                "sum": digest.sum().item(),
                "norm": digest.norm().item(),
            }
        )
    )
    trainer.save_model(str(output / "final"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
