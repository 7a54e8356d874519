"""Benchmarks of gradients, chains, cascades and training."""
