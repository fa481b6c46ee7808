"""The machine and the versions that figures were taken with."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "transformers", "torch-pruning")


def environment() -> dict[str, Any]:
    """Return what a reader needs to judge or repeat the figures."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": _commit(),
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """Return the commit that runs, marked where more has changed since than the results."""
    root = Path(__file__).parents[1]

    def git(*command: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(["git", *command], cwd=root, capture_output=True, text=True)

    commit = git("describe", "--always").stdout.strip()
    changed = git("diff", "--quiet", "HEAD", "--", ".", ":(exclude)benchmarks/results").returncode
    return commit + "-dirty" * bool(changed) if commit else "unknown"


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(named, platform.processor() or platform.machine())}, {os.cpu_count()} cores"
