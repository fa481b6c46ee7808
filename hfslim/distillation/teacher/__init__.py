"""Teachers: loading, checks, and their answers to a batch."""
