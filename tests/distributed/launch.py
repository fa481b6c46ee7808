"""Start a script in several real processes on the CPU (gloo)."""

import os
import subprocess
import sys
from pathlib import Path

START = Path(__file__).with_name("start.py")
"""What starts a script so that the end of its process cannot fail when the script has not."""


def launch(script: Path, *arguments: str | Path, processes: int) -> str:
    """Run a script under torchrun and return its output; fail with it if it fails."""
    done = launched(script, *arguments, processes=processes)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def launched(
    script: Path, *arguments: str | Path, processes: int
) -> "subprocess.CompletedProcess[str]":
    """Run a script under torchrun, whatever comes of it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(processes), *map(str, (START, script, *arguments))]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True)
