"""hostler capacity: how much RAM is really free, and claims that never oversubscribe."""
