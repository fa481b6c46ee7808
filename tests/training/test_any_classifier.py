"""Both Trainers on models without labels in forward, without a padding token, without a config."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distilling import config
from models import tiny
from torch import nn
from trainings import arguments, examples
from transformers import (
    AutoModelForSequenceClassification,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    GPT2Config,
    GPT2ForSequenceClassification,
)

from hfslim import DistillationTrainer, SlimTrainer
from hfslim.anatomy.inputs import example_inputs, text_positions
from hfslim.tasks.padding import set_padding

SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}


def deit() -> DeiTForImageClassificationWithTeacher:
    sizes = {**SIZES, "intermediate_size": 48, "image_size": 16, "patch_size": 8, "num_labels": 3}
    torch.manual_seed(0)
    return DeiTForImageClassificationWithTeacher(DeiTConfig(**sizes))


def gpt2(padding: int | None = None, labels: int = 3, **fields: Any) -> Any:
    sizes = {"n_embd": 32, "n_head": 4, "n_layer": 2, "vocab_size": 64, "n_positions": 40}
    sizes |= {"bos_token_id": 1, "eos_token_id": 2, "num_labels": labels, "pad_token_id": padding}
    torch.manual_seed(0)
    return GPT2ForSequenceClassification(GPT2Config(**sizes, **fields))


def accuracy(prediction: Any) -> dict[str, float]:
    outputs = prediction.predictions
    logits = outputs[0] if isinstance(outputs, tuple) else outputs
    return {"accuracy": float(np.mean(logits.argmax(-1) == prediction.label_ids))}


def trainer(folder: Path, model: Any, distil: bool, teacher: Any = None, **settings: Any) -> Any:
    data = settings.pop("data", None) or examples(model)
    rest = {"train_dataset": data, "eval_dataset": data, "compute_metrics": accuracy}
    rest |= {k: settings.pop(k) for k in ("processing_class",) if k in settings}
    if distil:
        teacher = teacher or copy.deepcopy(model)
        return DistillationTrainer(model, config(folder, **settings), teacher=teacher, **rest)
    return SlimTrainer(model, arguments(folder, **settings), **rest)


@pytest.mark.parametrize("distil", [False, True])
def test_a_model_whose_forward_takes_no_labels_trains_and_is_evaluated(
    distil: bool, tmp_path: Path
) -> None:
    model = deit()
    one = trainer(tmp_path, model, distil, eval_strategy="epoch", max_steps=3)
    one.train()
    figures = one.evaluate()
    assert {"eval_loss", "eval_accuracy"} <= set(figures)
    rows = examples(model)
    with torch.no_grad():
        logits = model.eval()(torch.stack([row["pixel_values"] for row in rows])).logits
    right = torch.stack([row["labels"] for row in rows])
    assert figures["eval_accuracy"] == pytest.approx((logits.argmax(-1) == right).float().mean())
    expected = nn.functional.cross_entropy(logits, right).item()
    assert figures["eval_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("distil", [False, True])
def test_the_arguments_of_the_caller_stay_as_they_are(distil: bool, tmp_path: Path) -> None:
    model = tiny("bert")
    given = (config if distil else arguments)(tmp_path)
    before = given.to_dict()
    rest = {"teacher": tiny("bert", seed=1)} if distil else {}
    cls = DistillationTrainer if distil else SlimTrainer
    cls(model, given, train_dataset=examples(model), **rest).train()
    assert given.average_tokens_across_devices is True
    assert given.to_dict() == before


def test_a_model_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        TypeError, match="SlimTrainer got Linear, which has no config: expected a tr"
    ):
        SlimTrainer(nn.Linear(2, 2), arguments(tmp_path))


class Tokenizer:
    """As much of a tokenizer as tells what it pads with."""

    def __init__(self, padding: int | None) -> None:
        self.pad_token_id = padding


@pytest.mark.parametrize("distil", [False, True])
def test_a_padding_token_is_refused_before_training_where_none_is_known(
    distil: bool, tmp_path: Path
) -> None:
    rows = examples(gpt2(0))
    with pytest.raises(ValueError, match="the model GPT2ForSequenceClassification has no padding"):
        trainer(tmp_path, gpt2(), distil, gpt2(0), data=rows)
    sizes = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1}
    trainer(tmp_path, gpt2(), distil, gpt2(), data=rows, **sizes).train()


def test_a_teacher_takes_the_padding_token_of_what_made_its_inputs(tmp_path: Path) -> None:
    student, teacher = gpt2(0), gpt2()
    trainer(tmp_path, student, True, teacher).train()
    assert teacher.config.pad_token_id == 0
    with pytest.raises(ValueError, match=r"the teacher GPT2.*, GPT2.* has no padding token"):
        bert = tiny("bert", pad_token_id=None, vocab_size=64)
        trainer(tmp_path, bert, True, gpt2(), data=examples(bert))


def test_a_padding_token_outside_of_the_vocabulary_is_refused() -> None:
    model = gpt2()
    set_padding(model.config, Tokenizer(None))
    assert model.config.pad_token_id is None
    with pytest.raises(ValueError, match="pads with id 64, the model has a vocabulary of 64: set"):
        set_padding(model.config, Tokenizer(64))
    set_padding(model.config, Tokenizer(2))
    assert model.config.pad_token_id == 2
    set_padding(model.config, Tokenizer(3))
    assert model.config.pad_token_id == 2


def test_inputs_of_several_texts_need_a_padding_token() -> None:
    assert example_inputs(gpt2(), 1)["input_ids"].shape[0] == 1
    with pytest.raises(ValueError, match="has no padding token, so it takes one text at a time"):
        example_inputs(gpt2(), 2)


FAMILIES = ["bert", "roberta", "mpnet", "distilbert", "electra", "modernbert", "llama"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_length_beyond_the_positions_is_refused_and_one_within_is_kept(family: str) -> None:
    model = tiny(family)
    most = text_positions(model)
    assert most == {"roberta": 38, "mpnet": 38, "modernbert": None, "llama": None}.get(family, 40)
    for length in (7, most or 200):
        inputs = example_inputs(model, length=length)
        assert inputs["input_ids"].shape == (1, length)
        model(**inputs)
    if most is not None:
        with pytest.raises(ValueError, match=f"length {most + 1} is more than the {most} posit"):
            example_inputs(model, length=most + 1)
        ids = torch.ones(1, most + 1, dtype=torch.long) * 5
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=ids)


def test_a_model_that_is_loaded_for_a_tokenizer_has_its_padding_token(tmp_path: Path) -> None:
    gpt2(labels=2).save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert model.config.pad_token_id is None
    SlimTrainer(
        model, arguments(tmp_path), train_dataset=examples(gpt2(0)), processing_class=Tokenizer(2)
    )
    assert model.config.pad_token_id == 2
