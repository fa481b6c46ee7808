"""Remove heads, neurons and layers: gates, importance, search under a budget, surgery."""

from hfslim.prune.gates import Gates, gated
from hfslim.prune.surgery import shrink

__all__ = ["Gates", "gated", "shrink"]
