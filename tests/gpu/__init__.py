"""What proves code for GPUs without one: launches compiled, kernels run on the CPU."""
