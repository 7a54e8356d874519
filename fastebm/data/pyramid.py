"""The resolution pyramid: images halved again and again by average pooling, as in the fade path of a growing net."""

import torch.nn.functional as F
from torch import Tensor


def average_pool_to(images: Tensor, size: int) -> Tensor:
    """Images (N, C, s, s) averaged down to (N, C, size, size), where s is `size` times a power of two.

    Halved step by step, so that each level is to the last bit the average pool of the level above it. The images
    themselves are returned for s = `size`. Raises ValueError for other shapes and sizes.
    """
    _check(images, size)
    while images.shape[3] > size:
        images = F.avg_pool2d(images, 2)
    return images


def pyramid(images: Tensor, lowest: int) -> dict[int, Tensor]:
    """All levels of images (N, C, s, s) by their size, ascending from `lowest` to s. Errors as in `average_pool_to`."""
    _check(images, lowest)
    levels = [images]
    while levels[-1].shape[3] > lowest:
        levels.append(F.avg_pool2d(levels[-1], 2))
    return {level.shape[3]: level for level in reversed(levels)}


def _check(images: Tensor, size: int) -> None:
    if images.ndim != 4 or images.shape[2] != images.shape[3]:
        raise ValueError(f"images have shape {tuple(images.shape)}; needed is (N, C, s, s)")
    factor, rest = divmod(images.shape[3], size) if size > 0 else (0, 0)
    if rest or factor < 1 or factor & (factor - 1):
        raise ValueError(f"images of size {images.shape[3]} can't be halved to size {size}")
