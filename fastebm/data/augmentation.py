"""Random flips and noise for training images.

Both are pure functions of the seed and of the image's position in training, which is the number of images that were
used before it. A batch can therefore be split, and a run stopped and resumed, without changing any flip or noise. An
image that returns in a later epoch has another position and gets another flip and other noise. The random numbers take
the position as their chain id; each purpose has a stream of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastebm.ops.normal import normal
from fastebm.ops.uniform import uniform
from fastebm.rng import Stream
from fastebm.scalars import as_real


def flip(images: Tensor, *, seed: int, positions: int | Tensor) -> Tensor:
    """Mirrors each image left to right with probability 1/2.

    Args:
        images: (B, C, H, W) of any type.
        seed: in [-2^63, 2^64).
        positions: the position of the first image, with the others following; or int64 (B,). In [0, 2^56).

    Raises ValueError for images of another shape or positions out of range.
    """
    if images.ndim != 4:
        raise ValueError(f"images must be (B, C, H, W), got {tuple(images.shape)}")
    draws = uniform((len(images), 1), seed=seed, stream=Stream.AUGMENTATION, chain_ids=positions, device=images.device)
    return torch.where(draws[:, :, None, None] > 0.5, images.flip(3), images)


def add_noise(images: Tensor, std: float, *, seed: int, positions: int | Tensor) -> Tensor:
    """Adds normal noise of standard deviation `std` to every pixel of float images (B, C, H, W), without clamping.

    Arguments and errors are those of `flip`; a `std` below 0 is a ValueError as well.
    """
    std = as_real("std", std)
    if not std >= 0:
        raise ValueError(f"the standard deviation of noise must not be negative, got {std}")
    noise = normal(images.shape, seed=seed, stream=Stream.DATA_NOISE, chain_ids=positions, device=images.device)
    return images + std * noise
