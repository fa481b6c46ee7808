"""Weights that a cut left empty have no zeros; incomplete groups are no 2:4 pattern."""

from pathlib import Path

import pytest
import torch
from distilling import examples
from models import tiny
from transformers import Trainer, TrainingArguments

import hfslim
from hfslim import PruningCallback, WeightPruningCallback
from hfslim.anatomy.inputs import example_inputs
from hfslim.anatomy.structure import Structure
from hfslim.anatomy.weights import sparse_modules, zeros_of
from hfslim.sparsity.kernels import semi_structured

FAMILIES = ("bert", "deberta-v2", "modernbert", "vit", "swin", "wav2vec2", "llama", "whisper")


def emptied(family: str):
    """A model whose first layer has lost all heads, its second all neurons."""
    model = tiny(family)
    sites: dict = {}
    for kind, index in (("heads", 0), ("neurons", 1)):
        site = [s for s in hfslim.find_units(model) if s.kind == kind and not s.needs_one][index]
        sites[kind] = {site.path: ((), site.size)}
    return hfslim.shrink(model, Structure.of(sites))


def batches(model):
    length = 1600 if model.main_input_name == "input_values" else 16
    return [example_inputs(model, 4, length=length)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["sparsegpt", "wanda", "magnitude"])
def test_empty_weights_are_skipped(family: str, method: str) -> None:
    model = emptied(family)
    assert any(not p.numel() for p in model.parameters())
    assert hfslim.weight_sparsity(model)[-1].sparsity == 0
    data = batches(model)
    rows = hfslim.sparsify(model, data, 0.5, method=method, progress=False).sparsity
    assert rows[-1].sparsity == pytest.approx(0.5, abs=0.01)
    assert sparse_modules(model)
    assert zeros_of(model)[-1]["sparsity"] == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("goal", [{"sparsity": 0.5}, {"pattern": "2:4"}])
@pytest.mark.parametrize("method", ["magnitude", "movement"])
def test_a_cut_model_loses_weights_in_training(goal: dict, method: str, tmp_path: Path) -> None:
    model = emptied("bert")
    args = TrainingArguments(tmp_path, max_steps=6, use_cpu=True, report_to=[], disable_tqdm=True)
    callback = WeightPruningCallback(**goal, method=method)
    Trainer(model, args, train_dataset=examples(model), callbacks=[callback]).train()
    assert hfslim.weight_sparsity(model)[-1].sparsity == pytest.approx(0.5, abs=0.01)


def test_heads_and_weights_go_in_one_training_until_a_layer_has_none(tmp_path: Path) -> None:
    model = tiny("bert")
    args = TrainingArguments(tmp_path, max_steps=8, use_cpu=True, report_to=[], disable_tqdm=True)
    callbacks = [
        PruningCallback({"sparsity": 0.9}, units=["heads"], criterion="magnitude", end=0.25),
        WeightPruningCallback(pattern="2:4", start=0.5, end=0.75),
    ]
    Trainer(model, args, train_dataset=examples(model), callbacks=callbacks).train()
    assert any(not p.numel() for p in model.parameters())
    rows = hfslim.weight_sparsity(model)
    assert (rows[-1].sparsity, rows[-1].pattern) == (pytest.approx(0.5), "2:4")


def test_groups_that_the_inputs_do_not_fill_are_told() -> None:
    model = tiny("bert", hidden_size=30, num_attention_heads=3, intermediate_size=48)
    rows = hfslim.sparsify(model, pattern="2:4", method="magnitude").sparsity
    assert [(row.kind, row.pattern) for row in rows] == [
        ("attention", "2:4 but for incomplete groups"),
        ("feed-forward", "2:4 but for incomplete groups"),
        ("other linear", "2:4 but for incomplete groups"),
        ("all", "2:4 but for incomplete groups"),
    ]
    tail = model.bert.encoder.layer[0].attention.self.query.weight[:, 28:]
    assert tail.all()
    down = hfslim.weight_sparsity(model, r".*\d\.output\.dense")
    assert (down[-1].pattern, down[-1].sparsity) == ("2:4", 0.5)


@pytest.mark.gpu
def test_widths_that_4_does_not_divide_stay_on_dense_kernels() -> None:
    model = tiny("bert", hidden_size=66, num_attention_heads=3, intermediate_size=90)
    hfslim.sparsify(model, pattern="2:4", method="magnitude")
    with pytest.raises(ValueError, match="4 does not divide its 66 inputs"):
        semi_structured(model.to("cuda", torch.float16))
