"""Look into a model: how alike its layers are, what two models agree on, what a cut lost."""

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
