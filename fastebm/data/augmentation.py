"""What is done to images each time they are seen: a flip, a little noise.

Both are pure functions of the seed and of the image's position, the number of images that training has seen before it.
So a batch may be split, or a run stopped and resumed, and every image meets the same flip and the same noise; and an
image that comes again in a later epoch, at another position, meets others. Positions are the "chains" of our random
numbers, of which each purpose has a stream of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastebm.ops.normal import normal
from fastebm.ops.uniform import uniform
from fastebm.rng import Stream


def flip(images: Tensor, *, seed: int, positions: int | Tensor) -> Tensor:
    """Images (B, C, H, W) of any type, each mirrored left to right with probability 1/2.

    Args:
        seed: in [-2^63, 2^64).
        positions: the position of the first image, the others follow; or int64 (B,). In [0, 2^56).

    Raises ValueError for images of another form or positions out of range.
    """
    if images.ndim != 4:
        raise ValueError(f"images must be (B, C, H, W), got {tuple(images.shape)}")
    draws = uniform((len(images), 1), seed=seed, stream=Stream.AUGMENTATION, chain_ids=positions, device=images.device)
    return torch.where(draws[:, :, None, None] > 0.5, images.flip(3), images)


def add_noise(images: Tensor, std: float, *, seed: int, positions: int | Tensor) -> Tensor:
    """Images (B, C, H, W) in floats with normal noise of standard deviation `std` on every pixel; it is not clamped.

    Arguments and errors as in `flip`; also ValueError for a `std` below 0.
    """
    if not std >= 0:
        raise ValueError(f"the standard deviation of noise must not be negative, got {std}")
    noise = normal(images.shape, seed=seed, stream=Stream.DATA_NOISE, chain_ids=positions, device=images.device)
    return images + std * noise
