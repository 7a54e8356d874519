"""Outlier detection by energies: scores, statistics of levels, outlier sets and metrics."""
