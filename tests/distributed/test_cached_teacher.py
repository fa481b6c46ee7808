import json
from pathlib import Path

import pytest
from distributed.launch import launch


@pytest.mark.distributed
def test_two_processes_fill_one_cache_read_it_and_resume_in_mid_epoch(tmp_path: Path) -> None:
    launch(Path(__file__).parent / "cached_teacher.py", tmp_path, processes=2)
    again = [f"{name}, resumed" for name in ("live", "filled", "read")]
    for folder, steps, runs in (
        (tmp_path, 8, ["filled", "read", *again]),
        (tmp_path / "paired", 4, ["filled"]),
        (tmp_path / "inside", 4, ["filled", "read"]),
        (tmp_path / "augmented", 15, ["filled"]),
    ):
        ranks = [json.loads((folder / f"losses.{rank}.json").read_text()) for rank in (0, 1)]
        assert ranks[0] == ranks[1]
        assert len(ranks[0]["live"]) == steps
        for run in runs:
            assert ranks[0][run] == pytest.approx(ranks[0]["live"], rel=0, abs=1e-5)
