"""A Trainer with an exact loss, exact checkpoints and complete pushes, and its parts."""
