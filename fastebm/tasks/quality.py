"""How near images are to what they should be: peak signal-to-noise ratio and structural similarity (scikit-image)."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Quality:
    """`psnr` in dB and `ssim` (at most 1), float64 (N,), higher for better; infinite and 1 for equal images."""

    psnr: Tensor
    ssim: Tensor

    def to_json(self) -> dict[str, float]:
        return {"psnr": float(self.psnr.mean()), "ssim": float(self.ssim.mean())}


def quality(images: Tensor, truth: Tensor) -> Quality:
    """Of each of `images` (N, C, H, W) in [-1, 1], beside `truth` of the same shape.

    PSNR is `10 log10(2^2 / mean squared error)`; SSIM is that of Wang et al. 2004 with windows of 7x7, or of the
    largest odd side that fits into smaller images. Raises ValueError for shapes that differ.
    """
    if images.shape != truth.shape or images.ndim != 4:
        raise ValueError(f"images must be (N, C, H, W) as the truth, got {tuple(images.shape)}, {tuple(truth.shape)}")
    metrics = skimage("metrics")
    side = min(*images.shape[2:], 7)
    window = side - (side + 1) % 2
    psnr, ssim = [], []
    for image, true in zip(images.cpu().double().numpy(), truth.cpu().double().numpy(), strict=True):
        error = float(((image - true) ** 2).mean())
        psnr.append(metrics.peak_signal_noise_ratio(true, image, data_range=2) if error else float("inf"))
        ssim.append(metrics.structural_similarity(true, image, data_range=2, channel_axis=0, win_size=window))
    return Quality(torch.tensor(psnr, dtype=torch.float64), torch.tensor(ssim, dtype=torch.float64))


def skimage(part: str) -> Any:
    """A part of scikit-image, imported when it is needed: it takes a second."""
    try:
        return importlib.import_module(f"skimage.{part}")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "PSNR, SSIM and the classical denoisers need scikit-image: pip install 'fastebm[tasks]'"
        ) from error
