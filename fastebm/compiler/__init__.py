"""The compiler of energy gradients: from any energy to a fused program for energies and their gradient."""

from fastebm.compiler.energy_gradient import EnergyGradient, as_conditions, energy_gradient

__all__ = ["EnergyGradient", "as_conditions", "energy_gradient"]
