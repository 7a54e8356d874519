"""Hole masks for inpainting: patterns, and masks from picture files.

A hole mask is True where a pixel is missing. The `mask` of `fastebm.Langevin` and of `restoration.Inpainting` is the
opposite: True where a pixel is known.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fastebm.data.formats.pictures import read_picture
from fastebm.ops import uniform
from fastebm.rng import Stream
from fastebm.tasks.arguments import check_memory, check_seed, check_whole
from fastebm.tasks.inputs import shape

Pattern = Literal["square", "pixels", "half"]


def hole_mask(pattern: Pattern, count: int, size: int, seed: int = 0) -> Tensor:
    """Hole masks (count, 1, size, size), bool, True where a pixel is missing.

    "square" is a quarter of the image, in the middle; "half" is its lower half; "pixels" is about half of all pixels,
    drawn for each image by the seed. Raises ValueError for another pattern, and for numbers out of range.
    """
    count, size = check_whole("count", count), check_whole("size", size)
    check_memory(f"{count:,} masks", count * size**2, torch.device("cpu"))
    check_seed(seed)
    hole = torch.zeros(count, 1, size, size, dtype=torch.bool, device="cpu")
    if pattern == "square":
        hole[:, :, size // 4 : size // 4 + size // 2, size // 4 : size // 4 + size // 2] = True
    elif pattern == "half":
        hole[:, :, size // 2 :] = True
    elif pattern == "pixels":
        hole = uniform(hole.shape, seed=seed, stream=Stream.AUGMENTATION) > 0.5
    else:
        raise ValueError(f"a hole is 'square', 'pixels' or 'half', got {pattern!r}")
    return hole


def load_hole_mask(path: str | Path, count: int, size: int) -> Tensor:
    """`count` equal hole masks (count, 1, size, size) from a picture: True where it is lighter than middle gray.

    Raises DataError for a file that is no picture, ValueError for a picture of another size.
    """
    check_whole("count", count)
    pixels = torch.from_numpy(read_picture(path, 1).copy())
    if pixels.shape[2:] != (size, size):
        raise ValueError(f"{path}: the mask is {shape(pixels.shape[2:])}, and the images are {size}x{size}")
    return (pixels > 127).expand(count, 1, size, size)


def check_hole_mask(hole: Tensor, images: Tensor) -> Tensor:
    """`hole`, (H, W) or (N or 1, C or 1, H, W), expanded to the shape (N, C, H, W) of `images`, on their device.

    Raises TypeError unless it is bool, ValueError for another shape and for an image without a hole or without a known
    pixel.
    """
    if not isinstance(hole, Tensor) or hole.dtype != torch.bool:
        kind = hole.dtype if isinstance(hole, Tensor) else type(hole).__name__
        raise TypeError(f"the hole must be a bool tensor, True where pixels are missing, got {kind}")
    # Not any shape that broadcasts: three numbers may be meant as (N, H, W) and taken for (C, H, W).
    count, channels, height, width = images.shape
    several = hole.ndim == 4 and hole.shape[0] in (1, count) and hole.shape[1] in (1, channels)
    if not (hole.ndim == 2 or several) or hole.shape[-2:] != (height, width):
        raise ValueError(
            f"the hole must be ({height}, {width}), or ({count} or 1, {channels} or 1, {height}, {width}) for these "
            f"images, got {tuple(hole.shape)}"
        )
    hole = hole.to(images.device).expand(images.shape)
    share = hole.flatten(1).float().mean(1)
    for wrong, what in ((share == 0, "no hole"), (share == 1, "nothing but hole")):
        if wrong.any():
            raise ValueError(f"image {int(wrong.nonzero()[0])} has {what}: each needs missing and known pixels")
    return hole
