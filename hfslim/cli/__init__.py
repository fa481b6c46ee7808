"""The `hfslim` command: one verb for each thing to do with a classifier."""

from hfslim.cli import costs, inspection, recipes
from hfslim.cli.app import app, main

__all__ = ["app", "costs", "inspection", "main", "recipes"]
