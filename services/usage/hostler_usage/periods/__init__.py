"""Months that are closed once and for all."""
