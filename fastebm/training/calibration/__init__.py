"""Code that EC-VAE, the calibrated posterior and the calibrated flow share."""
