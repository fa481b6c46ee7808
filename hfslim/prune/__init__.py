"""Remove heads, neurons, layers and weights: gates, importance, search under a budget, surgery."""

from hfslim.prune.by_class import ClassImportance, importance_by_class
from hfslim.prune.callbacks import PruningCallback
from hfslim.prune.criteria import CRITERIA, Criterion
from hfslim.prune.gates import Gates, gated
from hfslim.prune.importance import UnusableScoresError
from hfslim.prune.kernels import semi_structured
from hfslim.prune.layerdrop import LayerDropCallback
from hfslim.prune.layers import spaced_layers
from hfslim.prune.oneshot import PruneResult, prune
from hfslim.prune.surgery import shrink
from hfslim.prune.target import UnreachableTargetError
from hfslim.prune.weight_callback import WeightPruningCallback
from hfslim.prune.weight_oneshot import SparsifyResult, sparsify
from hfslim.prune.weights import WeightSparsity, weight_sparsity

__all__ = [
    "CRITERIA",
    "ClassImportance",
    "Criterion",
    "Gates",
    "LayerDropCallback",
    "PruneResult",
    "PruningCallback",
    "SparsifyResult",
    "UnreachableTargetError",
    "UnusableScoresError",
    "WeightPruningCallback",
    "WeightSparsity",
    "gated",
    "importance_by_class",
    "prune",
    "semi_structured",
    "shrink",
    "spaced_layers",
    "sparsify",
    "weight_sparsity",
]
