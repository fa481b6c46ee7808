"""Set single weights to zero: unstructured or N:M patterns, after training or during it."""

from hfslim.anatomy.weights import WeightSparsity, weight_sparsity
from hfslim.sparsity.kernels import semi_structured
from hfslim.sparsity.oneshot import SparsifyResult, sparsify
from hfslim.sparsity.weight_callback import WeightPruningCallback

__all__ = [
    "SparsifyResult",
    "WeightPruningCallback",
    "WeightSparsity",
    "semi_structured",
    "sparsify",
    "weight_sparsity",
]
