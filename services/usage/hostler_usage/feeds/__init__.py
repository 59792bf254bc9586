"""Stored messages as Atom feeds, and the hub that pushes them."""
