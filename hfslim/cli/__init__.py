"""The `hfslim` command: one verb for each thing to do with a classifier."""

from hfslim.cli import exporting, inspecting, measuring, pruning, running, sharing
from hfslim.cli.command import app, main

__all__ = ["app", "exporting", "inspecting", "main", "measuring", "pruning", "running", "sharing"]
