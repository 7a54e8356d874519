"""Longer experiments whose tables are in docs/results."""
