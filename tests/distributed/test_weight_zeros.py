from pathlib import Path

import pytest
import torch
from distributed import prune_weights, sparsify_and_recover
from distributed.launch import launch
from places import SUPPORT


@pytest.mark.distributed
def test_two_processes_prune_weights_like_one_and_resume_exactly(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(SUPPORT), prepend=":")
    one = prune_weights.run(tmp_path / "one")
    launch(Path(prune_weights.__file__), tmp_path, processes=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for name, expected in one.items():
        for path, zeros in expected["zeros"].items():
            assert torch.equal(first[name]["zeros"][path], zeros), (name, path)
            assert torch.equal(second[name]["zeros"][path], zeros), (name, path)
        for key, value in expected["weights"].items():
            assert torch.equal(first[name]["weights"][key], second[name]["weights"][key])
            torch.testing.assert_close(first[name]["weights"][key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.distributed
def test_two_processes_sparsify_like_one_and_lose_no_zero(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(SUPPORT), prepend=":")
    one = sparsify_and_recover.run(tmp_path / "one", slice(None))
    launch(Path(sparsify_and_recover.__file__), tmp_path, processes=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for method, expected in one.items():
        for key, value in expected["sparse"].items():
            found = first[method]["sparse"][key]
            assert torch.equal(found, second[method]["sparse"][key])
            assert torch.equal(found == 0, value == 0), (method, key)
            # The rounding of float32 sums over positions, times the condition of their moments.
            torch.testing.assert_close(found, value, rtol=1e-3, atol=1e-4)
        for key, value in first[method]["trained"].items():
            assert torch.equal(second[method]["trained"][key], value)
