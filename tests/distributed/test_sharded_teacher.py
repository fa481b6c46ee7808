import json
from pathlib import Path

import pytest
import torch
from distributed import sharded_student, sharded_teacher
from distributed.launch import launch
from places import SUPPORT


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(SUPPORT), prepend=":")


@pytest.mark.distributed
def test_a_teacher_is_loaded_whole_then_split_and_teaches_the_same(tmp_path: Path) -> None:
    launch(Path(sharded_teacher.__file__), tmp_path, processes=2)
    for rank in (0, 1):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert len(found["whole"]["losses"]) == 5
        for way in ("split", "cached"):
            for one, other in zip(found[way]["losses"], found["whole"]["losses"], strict=True):
                assert one == pytest.approx(other, rel=1e-5)
        assert found["split"]["share"] == pytest.approx(0.5, abs=0.02)
        assert found["whole"]["share"] == found["cached"]["share"] == 1
        assert found["loaded"] == {"stock": rank == 0, "ours": True}


@pytest.mark.distributed
def test_features_of_a_student_in_parts_teach_as_those_of_a_whole_one(tmp_path: Path) -> None:
    launch(Path(sharded_student.__file__), tmp_path, processes=2)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for case in sharded_student.CASES:
            whole, parts = found[case][False], found[case][True]
            assert len(whole["losses"]) == 3
            for one, other in zip(parts["losses"], whole["losses"], strict=True):
                assert one == pytest.approx(other, rel=1e-5), case
            for name, weight in whole["weights"].items():
                torch.testing.assert_close(parts["weights"][name], weight, rtol=0, atol=1e-5)
