"""How near images are to what they should be: peak signal-to-noise ratio and structural similarity (scikit-image)."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

WINDOW = 11
STD = 1.5
SMALLEST = 4


@dataclass(frozen=True, eq=False)
class Quality:
    """`psnr` in dB and `ssim` (at most 1), float64 (N,), higher for better; infinite and 1 for equal images."""

    psnr: Tensor
    ssim: Tensor

    def to_json(self) -> dict[str, float]:
        return {"psnr": float(self.psnr.mean()), "ssim": float(self.ssim.mean())}


def quality(images: Tensor, truth: Tensor) -> Quality:
    """Of each of `images` (N, C, H, W) in [-1, 1], beside `truth` of the same shape.

    PSNR is `10 log10(2^2 / mean squared error)`. SSIM is that of Wang et al. 2004: Gaussian windows of std 1.5, cut off
    at 11x11, population variances, K = (0.01, 0.03), colours averaged, and the mean over windows that lie within the
    image. Images smaller than a window are continued by reflection, and the mean is over the middle. Values outside of
    [-1, 1], as noise leads to, count as they are. Raises ValueError for shapes that differ and sides below 4.
    """
    if images.shape != truth.shape or images.ndim != 4:
        raise ValueError(f"images must be (N, C, H, W) as the truth, got {tuple(images.shape)}, {tuple(truth.shape)}")
    metrics = skimage("metrics")
    side = min(*images.shape[2:], WINDOW)
    if side < SMALLEST:
        raise ValueError(f"an SSIM needs images of at least {SMALLEST}x{SMALLEST}, got {tuple(images.shape[2:])}")
    # With Gaussian windows, win_size is only how much of the border is left out of the mean.
    options = {"gaussian_weights": True, "sigma": STD, "use_sample_covariance": False}
    options |= {"data_range": 2, "channel_axis": 0, "win_size": side - (side + 1) % 2}
    psnr, ssim = [], []
    for image, true in zip(images.cpu().double().numpy(), truth.cpu().double().numpy(), strict=True):
        error = float(((image - true) ** 2).mean())
        psnr.append(metrics.peak_signal_noise_ratio(true, image, data_range=2) if error else float("inf"))
        ssim.append(metrics.structural_similarity(true, image, **options))
    return Quality(torch.tensor(psnr, dtype=torch.float64), torch.tensor(ssim, dtype=torch.float64))


def skimage(part: str) -> Any:
    """A part of scikit-image, imported when it is needed: it takes a second."""
    try:
        return importlib.import_module(f"skimage.{part}")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "PSNR, SSIM and the classical denoisers need scikit-image: pip install 'fastebm[tasks]'"
        ) from error
