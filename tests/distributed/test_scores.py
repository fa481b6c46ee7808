from pathlib import Path

import pytest
import torch
from distributed import prune_in_one_go, reduce_scores
from distributed.launch import launch
from places import SUPPORT


@pytest.mark.distributed
def test_two_processes_score_like_one(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(SUPPORT), prepend=":")
    launch(Path(reduce_scores.__file__), tmp_path, processes=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert list(first) == list(second) == [*reduce_scores.CALIBRATED, "by class"]
    for name in first:
        if name == "by class":
            one = reduce_scores.by_class(slice(0, 7))
        else:
            one = reduce_scores.scores_of(slice(0, 7), name)
        assert one.keys() == first[name].keys() == second[name].keys()
        for key, value in one.items():
            assert torch.equal(first[name][key], second[name][key])
            torch.testing.assert_close(first[name][key], value, rtol=1e-4, atol=1e-7)


@pytest.mark.distributed
def test_two_processes_prune_like_one(tmp_path, monkeypatch):
    """The same units go, and the weights that stay make up for them alike."""
    monkeypatch.setenv("PYTHONPATH", str(SUPPORT), prepend=":")
    launch(Path(prune_in_one_go.__file__), tmp_path, processes=2)
    for family in prune_in_one_go.UNITS:
        first, second = (torch.load(tmp_path / f"{family}{rank}.pt") for rank in (0, 1))
        one = prune_in_one_go.pruned(family, slice(0, 24))
        assert first["structure"] == second["structure"] == one["structure"]
        for name, value in one["weights"].items():
            assert torch.equal(first["weights"][name], second["weights"][name])
            # Float32 rounds the sums of 24 examples and of 17 and 7 differently.
            torch.testing.assert_close(first["weights"][name], value, rtol=0, atol=1e-4)
