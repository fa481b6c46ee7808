"""The stages of a recipe: each module in this folder registers its own."""

from importlib import import_module
from pkgutil import iter_modules

from hfslim.pipeline.stages.base import STAGES, LaunchNeed, Stage

__all__ = ["STAGES", "LaunchNeed", "Stage"]

for module in iter_modules(__path__):
    import_module(f"{__name__}.{module.name}")
