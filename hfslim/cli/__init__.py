"""The `hfslim` command: one verb for each thing to do with a classifier."""

from hfslim.cli import costs, exporting, inspection, pruning, recipes, sharing
from hfslim.cli.app import app, main

__all__ = ["app", "costs", "exporting", "inspection", "main", "pruning", "recipes", "sharing"]
