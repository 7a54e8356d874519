"""Metrics of images: Fréchet and kernel distance, precision and recall, their features, nearest neighbours."""
