"""Readers of image files and data sets, one format per file; `open_images` chooses between them."""
