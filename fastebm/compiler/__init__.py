"""The compiler of energy gradients: from any energy to a fused program for energies and their gradient."""

from fastebm.compiler.energy_gradient import EnergyGradient, as_conditions, energy_gradient
from fastebm.compiler.score import ScoreGradient, require_energy, score_gradient
from fastebm.compiler.weight_gradient import WeightGradient, weight_gradient

__all__ = [
    "EnergyGradient",
    "ScoreGradient",
    "WeightGradient",
    "as_conditions",
    "energy_gradient",
    "require_energy",
    "score_gradient",
    "weight_gradient",
]
