"""Gates: reversible multipliers on the units of a live model."""
