"""Inspect models: similarity of layers, agreement on units, and changed predictions."""

from hfslim.inspection.agreement import UnitAgreement, unit_agreement
from hfslim.inspection.changes import Change, Changes, prediction_changes
from hfslim.inspection.similarity import layer_similarity, linear_cka

__all__ = [
    "Change",
    "Changes",
    "UnitAgreement",
    "layer_similarity",
    "linear_cka",
    "prediction_changes",
    "unit_agreement",
]
