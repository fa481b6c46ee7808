"""A Trainer whose loss, checkpoints and pushes are exact, and what it is made of."""
