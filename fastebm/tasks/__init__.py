"""What trained energies are used for."""
