"""Choose the structure of greatest importance under a budget."""
