"""Several processes: chains measured on this machine, and training modelled for many GPUs."""
