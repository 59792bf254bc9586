"""The bytes themselves: from one disk over the network to another, checked."""
