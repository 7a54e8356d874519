"""Axes of image arrays: recognises (N, H, W), (N, H, W, C) and (N, C, H, W), and returns (N, C, H, W)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fastebm.data.errors import DataError

CHANNELS = (1, 3)


def channels_first(name: str, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A view (N, C, H, W) of images in any of the three layouts.

    An axis of length 1 or 3 is that of the channels; if two axes could be, it is the one that leaves square images.
    Raises DataError if that does not decide it, and for (H, W, 3), which is a single image.
    """
    shape = images.shape
    if images.ndim == 3:
        if shape[2] in (*CHANNELS, 4) and shape[1] != shape[2]:
            raise DataError(f"{name}: an array of shape {shape} looks like one image; a set (N, H, W) is needed")
        return images[:, None]
    if images.ndim != 4:
        raise DataError(
            f"{name}: an array of shape {shape} is no set of images: (N, H, W), (N, H, W, C) or (N, C, H, W) is needed"
        )
    last, second = shape[3] in CHANNELS, shape[1] in CHANNELS
    why = "could have its channels in two places" if last and second else "has no axis of 1 or 3 channels"
    if last and second:
        last, second = shape[1] == shape[2], shape[2] == shape[3]
    if last == second:
        raise DataError(f"{name}: shape {shape} {why}: (N, H, W, C) or (N, C, H, W) with 1 or 3 channels is needed")
    return images.transpose(0, 3, 1, 2) if last else images
