"""Zero-shot restoration: images from linear measurements `y = A x`, by an energy trained on images alone."""

from fastebm.tasks.restoration.cascade import restore_by_cascade
from fastebm.tasks.restoration.composition import Composition, Dense, compose
from fastebm.tasks.restoration.consistency import DataConsistency
from fastebm.tasks.restoration.degradation_names import degradation
from fastebm.tasks.restoration.degradations import (
    Colorization,
    CompressedSensing,
    Degradation,
    Inpainting,
    SeparableBlur,
    SuperResolution,
    bicubic,
    box_mask,
    gaussian_kernel,
    random_mask,
)
from fastebm.tasks.restoration.latent import LatentEnergy, LatentSearch
from fastebm.tasks.restoration.restore import ImageSearch, restore
from fastebm.tasks.restoration.result import Refinement, RestorationResult

__all__ = [
    "Colorization",
    "Composition",
    "CompressedSensing",
    "DataConsistency",
    "Degradation",
    "Dense",
    "ImageSearch",
    "Inpainting",
    "LatentEnergy",
    "LatentSearch",
    "Refinement",
    "RestorationResult",
    "SeparableBlur",
    "SuperResolution",
    "bicubic",
    "box_mask",
    "compose",
    "degradation",
    "gaussian_kernel",
    "random_mask",
    "restore",
    "restore_by_cascade",
]
