from pathlib import Path

import pytest
import torch
from distributed import sharded
from distributed.launch import launch
from places import SUPPORT


@pytest.mark.distributed
def test_gates_scores_and_gathered_weights_of_a_sharded_model_are_those_of_a_whole_one(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("PYTHONPATH", str(SUPPORT), prepend=":")
    launch(Path(sharded.__file__), tmp_path, processes=2)
    expected = sharded.results(False, slice(0, 6))
    for rank, rows in enumerate((slice(0, 4), slice(4, 6))):
        found = torch.load(tmp_path / f"{rank}.pt")
        for key, value in expected["scores"].items():
            torch.testing.assert_close(found["scores"][key], value, rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(found["closed"], expected["closed"][rows], rtol=0, atol=1e-5)
        if rank == 0:
            torch.testing.assert_close(found["cut"], expected["cut"][rows], rtol=0, atol=1e-5)
            torch.testing.assert_close(found["cut"], found["closed"], rtol=0, atol=1e-5)


@pytest.mark.distributed
def test_fsdp_that_the_trainer_would_ignore_on_the_cpu_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(SUPPORT), prepend=":")
    told = launch(Path(__file__).with_name("fsdp_on_cpu.py"), tmp_path, processes=2)
    assert told.count("FSDP was asked for and the Trainer would ignore it on cpu") == 4
