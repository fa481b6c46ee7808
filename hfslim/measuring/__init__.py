"""A model's costs and speed, and its answers class by class."""

from hfslim.measuring.measurement import Comparison, Measurement, compare, measure

__all__ = ["Comparison", "Measurement", "compare", "measure"]
