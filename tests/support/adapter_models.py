"""What several tests share: adapter models."""

from pathlib import Path
from typing import Any

import torch
from distilling import rename
from models import tiny
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification

NAMES = ("no", "maybe", "yes")


def base(folder: Path, head: bool = True) -> Path:
    model = rename(tiny("bert", **NO_DROPOUT), *NAMES)
    (model if head else model.bert).save_pretrained(folder / "base")
    return folder / "base"


NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def adapted(source: Path, seed: int = 0, **fields: Any) -> PeftModel:
    """A model with LoRA on its attention, off its initial values, and a head of its own."""
    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=3)
    rename(model, *NAMES)
    settings = {"target_modules": ["query", "value"], "r": 4, "lora_dropout": 0.0, **fields}
    model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", **settings))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def adapter(folder: Path, source: Path, seed: int = 1, **fields: Any) -> tuple[str, PeftModel]:
    model = adapted(source, seed, **fields)
    model.save_pretrained(folder / "adapter")
    return str(folder / "adapter"), model


def logits(model: Any, rows: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    with torch.no_grad():
        return model.eval()(**batch).logits
