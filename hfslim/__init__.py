"""Distil, prune and physically shrink transformers classifiers for text, images and speech."""

import importlib
import sys
from types import ModuleType
from typing import Any

from hfslim import hub

_HOMES = {
    "DistillationConfig": "hfslim.distill",
    "DistillationTrainer": "hfslim.distill",
    "GradualUnfreezing": "hfslim.transfer",
    "L2SP": "hfslim.transfer",
    "LayerDropCallback": "hfslim.prune",
    "PruningCallback": "hfslim.prune",
    "Report": "hfslim.report",
    "SlimTrainer": "hfslim.checkpoint",
    "Structure": "hfslim.structure",
    "WeightPruningCallback": "hfslim.prune",
    "export": "hfslim.export",
    "find_units": "hfslim.anatomy",
    "gated": "hfslim.prune",
    "init_from_teacher": "hfslim.distill",
    "measure": "hfslim.measure",
    "merge_adapters": "hfslim.adapters",
    "prune": "hfslim.prune",
    "semi_structured": "hfslim.prune",
    "shrink": "hfslim.prune",
    "sparsify": "hfslim.prune",
    "train_head_only": "hfslim.transfer",
    "weight_sparsity": "hfslim.prune",
}
__all__ = list(_HOMES)
__version__ = "0.1.0"


class _Package(ModuleType):
    """Keeps `hfslim.prune` and `hfslim.measure` functions when the modules they live in load."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and name in _HOMES:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
hub.register()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'hfslim' has no attribute {name!r}; it has {sorted(_HOMES)}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
