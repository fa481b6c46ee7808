"""Distil, prune and physically shrink transformers classifiers for text, images and speech."""
