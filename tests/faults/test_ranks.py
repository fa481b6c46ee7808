from pathlib import Path

import pytest
import torch
from distributed.launch import launch, launched

from hfslim.training.checkpoint_folders import last_whole

SCRIPT = Path(__file__).with_name("ranks.py")


@pytest.mark.distributed
def test_a_rank_that_dies_or_is_told_to_stop_ends_the_run_and_it_resumes(tmp_path: Path) -> None:
    run = tmp_path / "run"
    launch(SCRIPT, tmp_path / "whole", tmp_path / "expected", processes=2)

    # One that hangs meets with the time limit of the test.
    died = launched(SCRIPT, run, tmp_path / "none", "SIGKILL", "4", processes=2)
    assert died.returncode != 0
    assert "Signal 9 (SIGKILL)" in died.stdout + died.stderr
    assert last_whole(run)[0] == run / "checkpoint-3"

    told = launched(SCRIPT, run, tmp_path / "none", "SIGTERM", "6", processes=2)
    assert "SIGTERM: checkpoint-7 is saved" in told.stdout + told.stderr
    assert "exitcode  : 143" in told.stdout + told.stderr
    assert last_whole(run) == (run / "checkpoint-7", [])

    launch(SCRIPT, run, tmp_path / "resumed", processes=2)
    expected = torch.load(tmp_path / "expected.0")
    assert not list(tmp_path.glob("none.*"))
    for name in ("expected.1", "resumed.0", "resumed.1"):
        found = torch.load(tmp_path / name)
        assert found["structure"] == expected["structure"]
        for key, value in expected["weights"].items():
            assert torch.equal(found["weights"][key], value), (name, key)
