"""Triton kernels, one file per operator; imported only where Triton runs."""
