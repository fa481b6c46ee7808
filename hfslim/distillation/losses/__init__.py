"""Distillation losses, on logits and inside the models."""
