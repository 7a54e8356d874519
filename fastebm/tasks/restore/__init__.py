"""Zero-shot restoration: images from linear measurements `y = A x`, by an energy that was trained without them."""

from fastebm.tasks.restore.by_cascade import restore_by_cascade
from fastebm.tasks.restore.consistency import Consistent
from fastebm.tasks.restore.degradations import (
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
from fastebm.tasks.restore.latent import LatentEnergy, LatentSearch, Refinement, Restored, restore
from fastebm.tasks.restore.named import degradation
from fastebm.tasks.restore.projected import ProjectedCascade, ProjectedLangevin

__all__ = [
    "Colorization",
    "Composition",
    "CompressedSensing",
    "Consistent",
    "Degradation",
    "Dense",
    "Inpainting",
    "LatentEnergy",
    "LatentSearch",
    "ProjectedCascade",
    "ProjectedLangevin",
    "Refinement",
    "Restored",
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
