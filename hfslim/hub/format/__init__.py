"""The saved form of a pruned model: the blueprint in its config, and how it is rebuilt."""
