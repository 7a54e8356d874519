"""Zero-shot restoration: images from linear measurements `y = A x`, by an energy that was trained without them."""

from fastebm.tasks.restoration.cascade import restore_by_cascade
from fastebm.tasks.restoration.consistency import DataConsistency
from fastebm.tasks.restoration.degradation_names import degradation
from fastebm.tasks.restoration.degradations import (
    Colorization,
    Composition,
    CompressedSensing,
    Degradation,
    Dense,
    Inpainting,
    SeparableBlur,
    SuperResolution,
    bicubic,
    box_mask,
    composed,
    gaussian_kernel,
    random_mask,
)
from fastebm.tasks.restoration.latent import LatentEnergy, LatentSearch, Refinement, RestorationResult, restore
from fastebm.tasks.restoration.projected import ProjectedCascade, ProjectedLangevin

__all__ = [
    "Colorization",
    "Composition",
    "CompressedSensing",
    "DataConsistency",
    "Degradation",
    "Dense",
    "Inpainting",
    "LatentEnergy",
    "LatentSearch",
    "ProjectedCascade",
    "ProjectedLangevin",
    "Refinement",
    "RestorationResult",
    "SeparableBlur",
    "SuperResolution",
    "bicubic",
    "box_mask",
    "composed",
    "degradation",
    "gaussian_kernel",
    "random_mask",
    "restore",
    "restore_by_cascade",
]
