"""From a recipe file to a finished run: stages, state, manifest, seeds."""
