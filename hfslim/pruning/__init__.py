"""Remove units of a model: gates, importance, search under a budget, surgery."""

from hfslim.pruning.family import PruneFamily, prune_family
from hfslim.pruning.gates.gates import Gates, gated
from hfslim.pruning.in_training.layerdrop import LayerDropCallback
from hfslim.pruning.in_training.pruning_callback import PruningCallback
from hfslim.pruning.metric_drop import prune_within
from hfslim.pruning.oneshot import PruneResult, prune
from hfslim.pruning.scores.batches import Batches
from hfslim.pruning.scores.by_class import ClassImportance, importance_by_class
from hfslim.pruning.scores.criteria import CRITERIA, Criterion, register_criterion
from hfslim.pruning.scores.importance import UnusableScoresError
from hfslim.pruning.scores.layers import spaced_layers
from hfslim.pruning.surgery.surgery import shrink
from hfslim.pruning.target import UnreachableTargetError

__all__ = [
    "CRITERIA",
    "Batches",
    "ClassImportance",
    "Criterion",
    "Gates",
    "LayerDropCallback",
    "PruneFamily",
    "PruneResult",
    "PruningCallback",
    "UnreachableTargetError",
    "UnusableScoresError",
    "gated",
    "importance_by_class",
    "prune",
    "prune_family",
    "prune_within",
    "register_criterion",
    "shrink",
    "spaced_layers",
]
