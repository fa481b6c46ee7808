"""Optimal brain surgeon: second moments, elimination order, reconstruction of weights."""
