"""Callbacks that prune while a Trainer trains."""
