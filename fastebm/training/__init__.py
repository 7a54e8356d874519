"""Training of energy-based models in run folders that survive a kill at any moment."""

from fastebm.data.sources import DigitsSource, ImageSource
from fastebm.runs.folder import RunError
from fastebm.runs.registry import load
from fastebm.runs.run import Run
from fastebm.training.calibration.calibrate import DataTerm, DualUpdate, calibrate, calibration_loss, noise_floor
from fastebm.training.coarse_to_fine.config import CoarseToFineConfig, Stage
from fastebm.training.coarse_to_fine.presets import DIGITS, PRESETS
from fastebm.training.coarse_to_fine.run import CoarseToFineRun
from fastebm.training.ec_flow.config import ECFlowConfig
from fastebm.training.ec_flow.run import ECFlowRun
from fastebm.training.ec_posterior.config import ECPosteriorConfig
from fastebm.training.ec_posterior.posterior import PosteriorSampler, iwae_bound, refine_posterior
from fastebm.training.ec_posterior.run import ECPosteriorRun
from fastebm.training.ec_vae.config import ECVAEConfig
from fastebm.training.ec_vae.run import ECVAERun
from fastebm.training.trainer.entry import resume, train
from fastebm.training.trainer.guard import DivergedError
from fastebm.training.trainer.signals import StoppedError

__all__ = [
    "DIGITS",
    "PRESETS",
    "CoarseToFineConfig",
    "CoarseToFineRun",
    "DataTerm",
    "DigitsSource",
    "DivergedError",
    "DualUpdate",
    "ECFlowConfig",
    "ECFlowRun",
    "ECPosteriorConfig",
    "ECPosteriorRun",
    "ECVAEConfig",
    "ECVAERun",
    "ImageSource",
    "PosteriorSampler",
    "Run",
    "RunError",
    "Stage",
    "StoppedError",
    "calibrate",
    "calibration_loss",
    "iwae_bound",
    "load",
    "noise_floor",
    "refine_posterior",
    "resume",
    "train",
]
