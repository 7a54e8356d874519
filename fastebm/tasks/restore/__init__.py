"""Zero-shot restoration: images from linear measurements `y = A x`, by an energy that was trained without them."""

from fastebm.tasks.restore.degradations import (
    Colorization,
    Composition,
    CompressedSensing,
    Degradation,
    Dense,
    Inpainting,
    SeparableBlur,
    SuperResolution,
    box_mask,
    composed,
    gaussian_kernel,
    random_mask,
)

__all__ = [
    "Colorization",
    "Composition",
    "CompressedSensing",
    "Degradation",
    "Dense",
    "Inpainting",
    "SeparableBlur",
    "SuperResolution",
    "box_mask",
    "composed",
    "gaussian_kernel",
    "random_mask",
]
