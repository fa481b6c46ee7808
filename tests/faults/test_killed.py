import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("killed.py")


def check_kills(folder: Path, points: int, seed: int) -> None:
    """Kill a run at some points, resume it, and compare with the run that nobody killed."""
    command = [sys.executable, str(SCRIPT), str(folder), str(points), str(seed)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = json.loads((folder / "rows.json").read_text())["rows"]
    assert len(rows) == points
    for row in rows:
        assert row["ended"] == -9, row
        assert row["unreadable"] == [], row
        assert row["again"] == 0, row
        assert row["structure"], row
        assert row["difference"] == 0.0, row
        # Nothing half-written is left, and no more checkpoints than were asked for.
        assert len(row["left"]) <= 2 and ".saving" not in row["left"], row
    kinds = {row["kind"] for row in rows}
    assert {"saving", "step", "evaluation"} <= kinds


def test_a_run_killed_anywhere_resumes_exactly(tmp_path: Path) -> None:
    check_kills(tmp_path, points=3, seed=0)


@pytest.mark.slow
def test_a_run_killed_at_twenty_points_resumes_exactly(tmp_path: Path) -> None:
    check_kills(tmp_path, points=20, seed=1)
