"""Degradations by their names on a command line."""

from __future__ import annotations

import torch

from fastebm.tasks.restoration.composition import compose
from fastebm.tasks.restoration.degradations import (
    Colorization,
    CompressedSensing,
    Degradation,
    Inpainting,
    SeparableBlur,
    Shape,
    SuperResolution,
    box_mask,
    gaussian_kernel,
    random_mask,
)

TASKS = "super-resolution-K, colorization, inpaint-box, inpaint-random-P, compressed-sensing-P, deblur-S"


def degradation(task: str, shape: Shape, *, seed: int = 0) -> Degradation:
    """The degradation with the name `task`, for images of `shape` (C, H, W).

    Args:
        task: super-resolution-K (blocks of K x K), colorization, inpaint-box (a box in the middle is missing),
            inpaint-random-P (P per cent of the pixels are known), compressed-sensing-P (P per cent of the coefficients
            of blocks of 8x8, or of the largest smaller size that fits), deblur-S (a Gaussian of S pixels), or several
            joined by "+", in the order in which they are applied.
        seed: of masks and of the basis of compressed sensing.

    Raises ValueError for other names, and if a degradation does not fit the images.

    Example:
        >>> degradation("colorization+super-resolution-4", (3, 32, 32)).rank((3, 32, 32))
        64
    """
    first, *others = task.split("+")
    operator = _single(first, shape, seed)
    for name in others:
        between = operator.A(torch.zeros(1, *shape, device="cpu")).shape[1:]
        operator = compose(operator, _single(name, (between[0], between[1], between[2]), seed), shape)
    operator.A(torch.zeros(1, *shape, device="cpu"))  # raises here, before any work, if it does not fit
    return operator


def _single(name: str, shape: Shape, seed: int) -> Degradation:
    channels, height, width = shape
    kind, _, number = name.rpartition("-")
    try:
        match (name, kind):
            case ("colorization", _):
                return Colorization(channels)
            case ("inpaint-box", _):
                return Inpainting(box_mask(height, width))
            case (_, "super-resolution"):
                return SuperResolution(int(number))
            case (_, "inpaint-random"):
                return Inpainting(random_mask(height, width, float(number) / 100, seed=seed))
            case (_, "compressed-sensing"):
                block = next(side for side in (8, 4, 2, 1) if height % side == width % side == 0)
                return CompressedSensing(float(number) / 100, block, seed=seed)
            case (_, "deblur"):
                return SeparableBlur(gaussian_kernel(float(number)), height, width)
    except ValueError as error:
        raise ValueError(f"task {name!r}: {error}") from error
    raise ValueError(f"there is no task {name!r}; tasks are {TASKS}, and several joined by +")
