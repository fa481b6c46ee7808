"""Where a model keeps its units: generic discovery, with the exceptions as data."""

from hfslim.anatomy.coverage import Coverage, coverage
from hfslim.anatomy.discovery import find_units
from hfslim.anatomy.inputs import Stated, example_inputs, stated_inputs
from hfslim.anatomy.units import Cut, Feed, Refusal, Site, Units

__all__ = [
    "Coverage",
    "Cut",
    "Feed",
    "Refusal",
    "Site",
    "Stated",
    "Units",
    "coverage",
    "example_inputs",
    "find_units",
    "stated_inputs",
]
