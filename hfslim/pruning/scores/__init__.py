"""Importance of every unit: the criteria, and the passes that collect them."""
