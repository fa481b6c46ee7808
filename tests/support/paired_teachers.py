"""What several tests share: paired teachers."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from distilling import config
from models import tiny
from transformers import (
    BertTokenizer,
    set_seed,
)

from hfslim.distillation import DistillationTrainer, teacher_inputs

WORDS = ("a", "film", "plot", "good", "gripping", "dull", "bad", "the")


TEXTS = ["a good film", "the plot", "a dull plot", "the gripping film", "bad", "a film"] * 2


def tokenizer(*words: str) -> BertTokenizer:
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    vocabulary = {word: i for i, word in enumerate((*special, *words))}
    return BertTokenizer(vocab=vocabulary, model_max_length=32)


def pairs(student: BertTokenizer, teacher: BertTokenizer, batch: dict[str, Any]) -> dict[str, Any]:
    return {**student(batch["text"]), **teacher_inputs(teacher(batch["text"]))}


def text_trainer(
    folder: Path, cache: Path | None = None, resume: str | None = None, **settings: Any
) -> DistillationTrainer:
    """A Trainer on raw texts, with a teacher whose tokenizer has other ids and another length."""
    set_seed(0)
    ours, theirs = tokenizer(*WORDS), tokenizer("of", *reversed(WORDS))
    teacher = tiny("roberta", num_labels=2, seed=1, pad_token_id=0)
    raw = datasets.Dataset.from_dict({"text": TEXTS, "labels": [i % 2 for i in range(12)]})
    return DistillationTrainer(
        tiny("bert", num_labels=2),
        config(folder, teacher_cache=cache and str(cache), logging_steps=1, **settings),
        teacher=teacher,
        teacher_processor=theirs,
        processing_class=ours,
        train_dataset=raw.map(partial(pairs, ours, theirs), batched=True),
    )


def text_losses(folder: Path, cache: Path | None, resume: str | None = None) -> list[float]:
    trainer = text_trainer(folder, cache, gradient_accumulation_steps=2)
    trainer.train(resume_from_checkpoint=resume)
    log = [entry for entry in trainer.state.log_history if "loss_distillation" in entry]
    assert not cache or {entry["teacher_cache_hits"] for entry in log} == {1.0}
    return [entry["loss_distillation"] for entry in log]


def main(folder: Path) -> None:
    """Write this process's losses, live and cached; started by tests/distributed."""
    runs = {
        name: text_losses(folder / name, cache)
        for name, cache in (("live", None), ("filled", folder / "cache"))
    }
    (folder / f"losses.{torch.distributed.get_rank()}.json").write_text(json.dumps(runs))
