"""Curves and units of a report are thinned without changing their ends, sums or numbers."""

import json
from itertools import pairwise

import pytest
import torch

from hfslim.anatomy.structure import Structure
from hfslim.reporting.readable_json import readable_json
from hfslim.reporting.training_curves import training_curves
from hfslim.reporting.unit_rows import unit_rows


def test_a_log_becomes_a_series_for_each_figure() -> None:
    log = [
        {"loss": 2.0, "learning_rate": 1e-3, "epoch": 0.5, "step": 10},
        {"loss": 1.0, "grad_norm": float("nan"), "note": "text", "step": 20},
        {"eval_loss": 1.5, "eval_runtime": 3.0, "step": 20},
        {"train_runtime": 9.0, "total_flos": 1.0, "step": 20},
    ]
    assert training_curves(log) == {
        "loss": {"step": [10, 20], "value": [2.0, 1.0]},
        "learning_rate": {"step": [10], "value": [1e-3]},
        "eval_loss": {"step": [20], "value": [1.5]},
    }


def test_a_long_log_keeps_its_ends() -> None:
    log = [{"loss": float(step), "step": step} for step in range(1, 1001)]
    steps = training_curves(log, most=100)["loss"]["step"]
    assert (len(steps), steps[0], steps[-1]) == (100, 1, 1000)
    gaps = {after - before for before, after in pairwise(steps)}
    assert gaps <= {10, 11}


def test_units_are_pooled_without_changing_their_mean() -> None:
    kept = tuple(range(0, 200, 3))
    structure = Structure.of({"neurons": {"mlp": (kept, 200)}, "heads": {"attention": ((0, 2), 3)}})
    scores = {("neurons", "mlp"): torch.arange(200.0)}
    rows = {row["kind"]: row for row in unit_rows(structure, scores, most=50)}
    assert rows["heads"]["kept"] == [1.0, 0.0, 1.0]
    assert rows["heads"]["importance"] is None
    neurons = rows["neurons"]
    assert (len(neurons["kept"]), len(neurons["importance"])) == (50, 50)
    assert sum(neurons["kept"]) * 4 == pytest.approx(len(kept))
    assert neurons["importance"][:2] == [1.5, 5.5]


def test_json_has_a_line_for_each_list_of_numbers() -> None:
    content = {"a": [1, 2.5, None], "b": [[1, 2], [3, 4]], "c": ["x [1,\n 2]", "y"], "d": []}
    text = readable_json(content)
    assert json.loads(text) == content
    assert '"a": [1, 2.5, null]' in text
    assert "    [1, 2],\n    [3, 4]" in text
