"""PTX, as Triton compiles it for GPUs that aren't there, run on the CPU with every access checked."""
