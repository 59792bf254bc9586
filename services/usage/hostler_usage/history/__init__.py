"""From what was said of a resource to its history, its amounts and its sums."""
