"""How near restored images are to the originals."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastebm.tasks.restore.degradations import Degradation, SuperResolution

SMALL = 16
"""Images with a side below this have an SSIM over uniform windows of 7x7: a Gaussian of 11x11 does not fit in them."""


def psnr(images: Tensor, originals: Tensor) -> Tensor:
    """(B,) peak signal-to-noise ratios in dB of images (B, C, H, W), clamped to [-1, 1], whose range is 2.

    Raises ImportError, with what to install, where torchmetrics is missing.
    """
    metrics = _metrics()
    return metrics.peak_signal_noise_ratio(
        images.clamp(-1, 1), originals, data_range=2.0, dim=(1, 2, 3), reduction="none"
    )


def ssim(images: Tensor, originals: Tensor) -> Tensor:
    """(B,) structural similarities (Wang et al., 2004) of images (B, C, H, W), clamped to [-1, 1].

    Gaussian windows of std 1.5, for small images uniform ones (see `SMALL`). Raises as `psnr` does, and ValueError for
    sides below 4.
    """
    side = min(images.shape[2:])
    if side < 4:
        raise ValueError(f"an SSIM needs images of at least 4x4, got {tuple(images.shape[2:])}")
    windows = {"gaussian_kernel": False, "kernel_size": 7} if side < SMALL else {}
    metrics = _metrics()
    return metrics.structural_similarity_index_measure(
        images.clamp(-1, 1), originals, data_range=2.0, reduction="none", **windows
    )


def bicubic(y: Tensor, degradation: Degradation) -> Tensor | None:
    """The measurement enlarged by bicubic interpolation, for super-resolution; None for other degradations."""
    if not isinstance(degradation, SuperResolution):
        return None
    return F.interpolate(y, scale_factor=degradation.factor, mode="bicubic", align_corners=False)


def _metrics():  # type: ignore[no-untyped-def]  # a module whose functions have loose types
    try:
        import torchmetrics.functional.image as metrics  # here, because it takes seconds to import
    except ImportError as error:
        raise ImportError("PSNR and SSIM need torchmetrics: pip install 'fastebm[evaluation]'") from error
    return metrics
