import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("failing_disk.py")
ERRORS = {
    "limit": r"File too large|inline_container",
    "permission": r"Permission denied",
    "full": r"No space left|inline_container",
    "read-only": r"Read-only file system",
}


def mounts() -> bool:
    """Tell whether a tmpfs can be mounted here, in a namespace of its own."""
    if shutil.which("unshare") is None:
        return False
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", tempfile.gettempdir()]
    return subprocess.run(command, capture_output=True).returncode == 0


MOUNTS = mounts()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("disk")
    own, ways = (["unshare", "-rm"], [*ERRORS]) if MOUNTS else ([], ["limit", "permission"])
    command = [*own, sys.executable, str(SCRIPT), str(folder), *ways]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder


@pytest.mark.parametrize("way", ERRORS)
def test_a_disk_that_fails_leaves_the_checkpoint_before(runs: Path, way: str) -> None:
    if way in ("full", "read-only") and not MOUNTS:
        pytest.skip("a tmpfs cannot be mounted here")
    report = json.loads((runs / f"{way}.json").read_text())
    assert report["whole"] == "checkpoint-3" and report["broken"] == []
    message = report["error"]
    assert message.startswith(f"checkpoint-6 could not be written into {runs / way}: ")
    assert "checkpoint-3 is whole" in message and "MiB free there" in message
    assert any(part in message for part in ERRORS[way].split("|")), message
    if way in ("limit", "full"):
        assert report["hidden"] == []
    whole, resumed = (torch.load(runs / f"{name}.pt") for name in ("whole", way))
    assert resumed["structure"] == whole["structure"]
    for name, value in whole["weights"].items():
        assert torch.equal(value, resumed["weights"][name])
