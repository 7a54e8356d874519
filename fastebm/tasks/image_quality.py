"""Image quality against a reference image: peak signal-to-noise ratio and structural similarity."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastebm.tasks.arguments import check_layout, check_values

WINDOW = 11
STD = 1.5
SMALLEST = 4


@dataclass(frozen=True, eq=False)
class Quality:
    """`psnr` in dB and `ssim` (at most 1), float64 (N,), higher is better; infinite and 1 for equal images."""

    psnr: Tensor
    ssim: Tensor

    def to_json(self) -> dict[str, float]:
        """The means over all images."""
        return {"psnr": float(self.psnr.mean()), "ssim": float(self.ssim.mean())}


def quality(images: Tensor, truth: Tensor) -> Quality:
    """`psnr` and `ssim` of images (N, C, H, W) in [-1, 1]. Arguments and errors as there."""
    return Quality(psnr(images, truth), ssim(images, truth))


def psnr(images: Tensor, truth: Tensor) -> Tensor:
    """`10 log10(2^2 / mean squared error)` of images (N, C, H, W) in [-1, 1] against `truth` of the same shape.

    Values of `images` outside of [-1, 1], for example of noisy ones, are not clamped. Returns float64 (N,). Raises
    ValueError for shapes that differ, values that are not finite and a truth outside of [-1, 1], TypeError unless both
    are float32.

    Example:
        >>> import torch
        >>> from fastebm.tasks import psnr
        >>> psnr(torch.full((1, 1, 8, 8), 0.2), torch.zeros(1, 1, 8, 8)).round().item()
        20.0
    """
    images, truth = _as_double(images, truth)
    errors = [float(((image - true) ** 2).mean()) for image, true in zip(images.numpy(), truth.numpy(), strict=True)]
    values = [10 * np.log10(4 / error) if error else float("inf") for error in errors]
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def ssim(images: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity (Wang et al., 2004) of images (N, C, H, W) in [-1, 1] against `truth`, by scikit-image.

    Gaussian windows of std 1.5 cut off at 11x11, population variances, K = (0.01, 0.03), mean over colours and over the
    windows that lie within the image. Images smaller than a window are continued by reflection, and the mean is over
    their middle. Values are not clamped. Returns float64 (N,). Raises ValueError for shapes that differ and sides below
    4, ModuleNotFoundError without scikit-image, and as `psnr`.
    """
    images, truth = _as_double(images, truth)
    metrics = import_skimage("metrics")
    side = min(*images.shape[2:], WINDOW)
    if side < SMALLEST:
        raise ValueError(f"an SSIM needs images of at least {SMALLEST}x{SMALLEST}, got {tuple(images.shape[2:])}")
    # With Gaussian windows, win_size only says how much of the border is left out of the mean.
    options = {"gaussian_weights": True, "sigma": STD, "use_sample_covariance": False}
    options |= {"data_range": 2, "channel_axis": 0, "win_size": side - (side + 1) % 2}
    pairs = zip(images.numpy(), truth.numpy(), strict=True)
    values = [metrics.structural_similarity(true, image, **options) for image, true in pairs]
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def import_skimage(part: str) -> Any:
    """A module of scikit-image; imported when it is needed, because that takes a second."""
    try:
        return importlib.import_module(f"skimage.{part}")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "SSIM and the classical denoisers need scikit-image: pip install 'fastebm[tasks]'"
        ) from error


def _as_double(images: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    check_layout("images", images)
    check_layout("the true images", truth)
    if images.shape != truth.shape:
        raise ValueError(f"images must be (N, C, H, W) as the truth, got {tuple(images.shape)}, {tuple(truth.shape)}")
    check_values("images", images, bounded=False)
    check_values("the true images", truth)
    return images.cpu().double(), truth.cpu().double()
