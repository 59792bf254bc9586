"""What was done to resources: how long it took, and how it ended."""
