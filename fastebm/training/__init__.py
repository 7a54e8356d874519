"""Training of energy-based models in run folders that survive a kill at any moment."""

from fastebm.training.coarse_to_fine import CoarseToFineRun, load_coarse_to_fine, train_coarse_to_fine
from fastebm.training.coarse_to_fine_config import CoarseToFineConfig, Stage
from fastebm.training.presets import DIGITS, PRESETS
from fastebm.training.run import DivergedError, RunError

__all__ = [
    "DIGITS",
    "PRESETS",
    "CoarseToFineConfig",
    "CoarseToFineRun",
    "DivergedError",
    "RunError",
    "Stage",
    "load_coarse_to_fine",
    "train_coarse_to_fine",
]
