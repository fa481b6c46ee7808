"""What a model costs and how fast it runs; what it answers, class by class."""

from hfslim.measuring.measurement import Comparison, Measurement, compare, measure

__all__ = ["Comparison", "Measurement", "compare", "measure"]
