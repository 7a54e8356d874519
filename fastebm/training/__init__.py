"""Training of energy-based models in run folders that survive a kill at any moment."""

from fastebm.training.coarse_to_fine import resume_coarse_to_fine, train_coarse_to_fine
from fastebm.training.coarse_to_fine_config import CoarseToFineConfig, Stage
from fastebm.training.coarse_to_fine_run import CoarseToFineRun, load_coarse_to_fine
from fastebm.training.guard import DivergedError
from fastebm.training.image_source import DigitsSource, ImageSource
from fastebm.training.presets import DIGITS, PRESETS
from fastebm.training.run import RunError
from fastebm.training.stopping import StoppedError

__all__ = [
    "DIGITS",
    "PRESETS",
    "CoarseToFineConfig",
    "CoarseToFineRun",
    "DigitsSource",
    "DivergedError",
    "ImageSource",
    "RunError",
    "Stage",
    "StoppedError",
    "load_coarse_to_fine",
    "resume_coarse_to_fine",
    "train_coarse_to_fine",
]
