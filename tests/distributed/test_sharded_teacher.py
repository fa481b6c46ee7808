import json
from pathlib import Path

import pytest
from distributed import sharded_teacher
from distributed.launch import launch


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]), prepend=":")


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
