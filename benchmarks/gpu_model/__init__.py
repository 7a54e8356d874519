"""What can be said of GPU kernels without a GPU: counts from compiled code. Nothing here is timed."""
