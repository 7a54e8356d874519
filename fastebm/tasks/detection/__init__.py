"""Outliers by their energies."""
