"""From an energy to its gradient with respect to the input, for anybody's module or function."""

from fastebm.compiler.energy_gradient import EnergyGradient, energy_gradient

__all__ = ["EnergyGradient", "energy_gradient"]
