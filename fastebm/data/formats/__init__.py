"""Readers of image files and data sets."""
