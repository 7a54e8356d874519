"""Training of energy-based models in run folders that survive a kill at any moment."""

from fastebm.training.any_run import Run, load_run, resume_run
from fastebm.training.calibration import Anchor, DualUpdate, calibrate, calibration_loss, noise_floor
from fastebm.training.coarse_to_fine import resume_coarse_to_fine, train_coarse_to_fine
from fastebm.training.coarse_to_fine_config import CoarseToFineConfig, Stage
from fastebm.training.coarse_to_fine_run import CoarseToFineRun, load_coarse_to_fine
from fastebm.training.ec_flow import resume_ec_flow, train_ec_flow
from fastebm.training.ec_flow_config import EcFlowConfig
from fastebm.training.ec_flow_run import EcFlowRun, load_ec_flow
from fastebm.training.ec_posterior import resume_ec_posterior, train_ec_posterior
from fastebm.training.ec_posterior_config import EcPosteriorConfig
from fastebm.training.ec_posterior_run import EcPosteriorRun, load_ec_posterior
from fastebm.training.ec_vae import resume_ec_vae, train_ec_vae
from fastebm.training.ec_vae_config import EcVaeConfig
from fastebm.training.ec_vae_run import EcVaeRun, load_ec_vae
from fastebm.training.guard import DivergedError
from fastebm.training.image_source import DigitsSource, ImageSource
from fastebm.training.posterior import PosteriorSampler, importance_bound, refine_posterior
from fastebm.training.presets import DIGITS, PRESETS
from fastebm.training.run import RunError
from fastebm.training.stopping import StoppedError

__all__ = [
    "DIGITS",
    "PRESETS",
    "Anchor",
    "CoarseToFineConfig",
    "CoarseToFineRun",
    "DigitsSource",
    "DivergedError",
    "DualUpdate",
    "EcFlowConfig",
    "EcFlowRun",
    "EcPosteriorConfig",
    "EcPosteriorRun",
    "EcVaeConfig",
    "EcVaeRun",
    "ImageSource",
    "PosteriorSampler",
    "Run",
    "RunError",
    "Stage",
    "StoppedError",
    "calibrate",
    "calibration_loss",
    "importance_bound",
    "load_coarse_to_fine",
    "load_ec_flow",
    "load_ec_posterior",
    "load_ec_vae",
    "load_run",
    "noise_floor",
    "refine_posterior",
    "resume_coarse_to_fine",
    "resume_ec_flow",
    "resume_ec_posterior",
    "resume_ec_vae",
    "resume_run",
    "train_coarse_to_fine",
    "train_ec_flow",
    "train_ec_posterior",
    "train_ec_vae",
]
