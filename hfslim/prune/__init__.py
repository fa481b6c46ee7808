"""Remove heads, neurons and layers: gates, importance, search under a budget, surgery."""

from hfslim.prune.gates import Gates, gated
from hfslim.prune.oneshot import PruneResult, prune
from hfslim.prune.search import UnreachableTargetError
from hfslim.prune.surgery import shrink

__all__ = ["Gates", "PruneResult", "UnreachableTargetError", "gated", "prune", "shrink"]
