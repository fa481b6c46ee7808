"""Where a model keeps its units: generic discovery, with the exceptions as data."""
