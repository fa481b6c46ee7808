"""Distil, prune and physically shrink transformers classifiers for text, images and speech."""

import importlib
from typing import Any

from hfslim import hub

_HOMES = {
    "DistillationConfig": "hfslim.distillation",
    "DistillationTrainer": "hfslim.distillation",
    "GradualUnfreezing": "hfslim.training.transfer",
    "L2SP": "hfslim.training.transfer",
    "LayerDropCallback": "hfslim.pruning",
    "PruningCallback": "hfslim.pruning",
    "Report": "hfslim.reporting.report",
    "SlimTrainer": "hfslim.training.checkpoint",
    "Structure": "hfslim.anatomy.structure",
    "WeightPruningCallback": "hfslim.sparsity",
    "export": "hfslim.hub.export",
    "find_units": "hfslim.anatomy.discovery",
    "gated": "hfslim.pruning",
    "init_from_teacher": "hfslim.distillation",
    "measure": "hfslim.measuring",
    "merge_adapters": "hfslim.anatomy.adapters",
    "prune": "hfslim.pruning",
    "prune_family": "hfslim.pruning",
    "prune_within": "hfslim.pruning",
    "semi_structured": "hfslim.sparsity",
    "shrink": "hfslim.pruning",
    "sparsify": "hfslim.sparsity",
    "train_head_only": "hfslim.training.transfer",
    "weight_sparsity": "hfslim.sparsity",
}
__all__ = list(_HOMES)
__version__ = "0.2.0.dev0"


hub.register()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'hfslim' has no attribute {name!r}; it has {sorted(_HOMES)}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
