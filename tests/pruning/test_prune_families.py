"""One call of `prune` on families whose forward passes are unlike the usual ones."""

import pytest
import torch
import zoo
from transformers import AutoModel

import hfslim
from hfslim.anatomy.coverage import coverage
from hfslim.anatomy.discovery import find_units
from hfslim.anatomy.inputs import example_inputs
from hfslim.measuring.measurement import macs
from hfslim.pruning.scores.importance import UnusableScoresError

LENGTHS = {"input_ids": 16, "inputs": 16, "input_values": 4000, "input_features": 64}
ROWS = {f"{row.task}/{row.model_type}": row for row in coverage()}


def batches(model):
    length = LENGTHS.get(model.main_input_name)
    labels = torch.tensor([0, 1, 1, 0])
    return [example_inputs(model, 4, seed, length) | {"labels": labels} for seed in range(2)]


def pruned(case, **options):
    """Return the share of the multiply-accumulates that a cut of all that may go leaves."""
    model = zoo.tiny(case)
    data = batches(model)
    one = {name: value[:1] for name, value in data[0].items() if name != "labels"}
    before = macs(model, one)
    kinds = sorted({site.kind for site in find_units(model)} - {"experts"})
    options = {"target": {"macs": 0.95}, "units": kinds, "inputs": one} | options
    hfslim.prune(model, data, progress=False, **options)
    return macs(model, one) / before


# Falcon adds in place to what its projections return, I-BERT's return a scale beside.
@pytest.mark.parametrize("case", ["text/falcon", "text/ibert", "text/luke", "image/levit"])
@pytest.mark.parametrize("criterion", ["fisher", "activation"])
def test_by_the_criterion(case, criterion):
    assert 0.5 < pruned(case, criterion=criterion) <= 0.95


def test_what_the_decision_does_not_hear_goes_first(tmp_path):
    """CANINE classifies before its last encoder, whose moments are zero."""
    model = zoo.tiny("text/canine")
    result = hfslim.prune(
        model,
        batches(model),
        target={"sparsity": {"neurons": 0.2}},
        units=["neurons"],
        criterion="obs",
        progress=False,
    )
    left = {e.path: len(e.kept) for e in result.structure if e.kind == "neurons"}
    assert left.pop("canine.final_char_encoder.layer.0") == 0
    assert set(left.values()) == {zoo.NEURONS}


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c, row in ROWS.items() if "exact" in row.outcomes.values()])
def test_every_type(case):
    if case in ("text/reformer", "image/timm_wrapper"):
        pytest.skip("scored without gradients; in an environment of its own")
    # Those of MiniMax that may go are the last ones, which only a cut tells.
    units = {"units": ["neurons"]} if case == "text/minimax" else {}
    assert pruned(case, criterion="fisher", **units) <= 0.95


@pytest.mark.parametrize("options", [{}, {"criterion": "obs"}, {"reconstruction": "none"}])
def test_a_model_without_gradients_inside_is_refused_with_what_fits(options):
    with pytest.raises(UnusableScoresError, match=r"ReformerFor.*criterion='activation'"):
        pruned("text/reformer", **options)
    assert pruned("text/reformer", criterion="activation", reconstruction="none") <= 0.95


def test_a_model_that_is_no_classifier_is_refused_with_how_to_load_it():
    model = AutoModel.from_config(zoo.tiny_config("bert")).eval()
    with pytest.raises(ValueError, match=r"for text encoding.*AutoModelForSequenceClassification"):
        hfslim.prune(model, batches(model), target={"macs": 0.8}, progress=False)
