"""Classical denoisers of scikit-image, tuned to the noise: the baselines of `denoise`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fastebm.tasks.arguments import check_layout, check_number, check_values
from fastebm.tasks.image_quality import import_skimage, psnr

NAMES: tuple[Literal["non-local means", "total variation"], ...] = ("non-local means", "total variation")


@dataclass(frozen=True)
class ClassicalDenoiser:
    """A denoiser of scikit-image with its settings; called with images (N, C, H, W) in [-1, 1].

    Attributes:
        name: "non-local means" (`denoise_nl_means`) or "total variation" (`denoise_tv_chambolle`).
        settings: keyword arguments of that function.

    Results are clamped to [-1, 1]. Raises ValueError for another name, and for images as `psnr`.
    """

    name: Literal["non-local means", "total variation"]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ValueError(f"a classical denoiser is {' or '.join(map(repr, NAMES))}, got {self.name!r}")

    def __call__(self, images: Tensor) -> Tensor:
        check_layout("images", images)
        check_values("images", images, bounded=False)
        restoration = import_skimage("restoration")
        function: Any = restoration.denoise_nl_means if self.name == NAMES[0] else restoration.denoise_tv_chambolle
        # With the axis of a single colour given, non-local means return the image transposed.
        pixels, axis = (images[:, 0], None) if images.shape[1] == 1 else (images, 0)
        restored = [function(image, channel_axis=axis, **self.settings) for image in pixels.cpu().double().numpy()]
        return torch.from_numpy(np.stack(restored)).to(images).reshape(images.shape).clamp(-1, 1)


def tune_denoisers(clean: Tensor, noisy: Tensor, noise: float) -> list[ClassicalDenoiser]:
    """Both denoisers, each with the settings of a grid whose results on `noisy` have the highest mean PSNR.

    Args:
        clean, noisy: images (N, C, H, W) in [-1, 1] without and with noise.
        noise: standard deviation of the noise.

    Raises ValueError or TypeError as `psnr`, and for a noise that is not positive.
    """
    noise = check_number("noise", noise, above=0)
    best = []
    for name in NAMES:
        tried = [ClassicalDenoiser(name, settings) for settings in _grid(name, noise)]
        best.append(max(tried, key=lambda denoiser: float(psnr(denoiser(noisy), clean).mean())))
    return best


def _grid(name: str, noise: float) -> Iterator[dict[str, Any]]:
    if name == NAMES[1]:
        yield from ({"weight": weight * noise} for weight in (0.15, 0.25, 0.4, 0.6, 0.8, 1.0, 1.3, 1.7, 2.2))
        return
    for strength, patch, distance in itertools.product((0.6, 0.8, 1.0, 1.2), (3, 5), (5, 9)):
        yield {
            "h": strength * noise,
            "sigma": noise,
            "patch_size": patch,
            "patch_distance": distance,
            "fast_mode": False,
        }
