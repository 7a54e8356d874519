"""Finds the channels and sides of the images of a file or folder, and the split, without reading all of them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastebm.data.errors import DataError, MixedSizesError
from fastebm.data.formats.byte_reader import MAX_PIXELS
from fastebm.data.formats.open_images import open_path
from fastebm.data.preprocessing import Preprocessing


class ImageFormat(NamedTuple):
    """Channels and sides of images. The sides are None for pictures of several sizes."""

    channels: int
    height: int | None
    width: int | None

    def __str__(self) -> str:
        if self.height is None:
            return f"of several sizes, with {self.channels} channels"
        return f"{self.channels}x{self.height}x{self.width}"


def image_format(
    source: str | os.PathLike[str],
    split: str | None = None,
    *,
    crop: int | None = None,
    key: str | None = None,
    max_pixels: int = MAX_PIXELS,
) -> ImageFormat:
    """The format in which `open_images` would return the images at a path, given the same arguments.

    Of a folder of pictures all headers are read, of other sets only the first images. Raises DataError as `open_images`
    does, except for errors in parts of a file that are not read.

    Example:
        >>> import numpy as np
        >>> from fastebm.data import image_format
        >>> np.savez("faces.npz", x_train=np.zeros((10, 16, 24, 3), np.uint8))
        >>> str(image_format("faces.npz")), str(image_format("faces.npz", crop=12))
        ('3x16x24', '3x12x12')
    """
    path = Path(source)
    try:
        return _probe(path, split, crop, key, max_pixels)
    except MixedSizesError:
        return ImageFormat(_probe(path, split, 1, key, max_pixels).channels, None, None)


def split_of(source: str | os.PathLike[str], split: str | None = None, *, key: str | None = None) -> str:
    """The split that `open_images` would read, given the same arguments: "" where it would read a set as a whole.

    No picture is decoded, and arrays are read and not kept. Raises DataError as `open_images` does, except for errors
    in what is not read.

    Example:
        >>> import numpy as np
        >>> from fastebm.data.formats.image_format import split_of
        >>> np.savez("faces.npz", x_train=np.zeros((9, 8, 8), np.uint8), x_test=np.zeros((2, 8, 8), np.uint8))
        >>> split_of("faces.npz")
        'train'
    """
    # With size and channels not even the headers of pictures are read.
    return open_path(Path(source), _Unread(size=1, channels=1), split, key).split


class _FormatFound(Exception):  # noqa: N818  (not an error: it ends the reading early)
    """Carries the format out of the reader at the moment when memory for all images would be allocated."""

    def __init__(self, found: ImageFormat) -> None:
        self.found = found


@dataclass(frozen=True)
class _FormatProbe(Preprocessing):
    """Preprocessing that stops the reader as soon as the shape of the first images is known."""

    def _allocate(self, name: str, shape: tuple[int, ...]) -> Tensor:
        raise _FormatFound(ImageFormat(*shape[1:]))


@dataclass(frozen=True)
class _Unread(Preprocessing):
    """Preprocessing that keeps no images, and says that there are as many as were to be read."""

    def collect(self, name: str, count: int, chunks: Iterable[NDArray[np.uint8]]) -> Tensor:
        for _ in chunks:  # labels may be read with them
            pass
        return self.collect_processed(name, count, chunks)

    def collect_processed(self, name: str, count: int, chunks: Iterable[NDArray[np.uint8]]) -> Tensor:
        if not count:
            raise DataError(f"{name}: holds no images")
        return torch.zeros(1, dtype=torch.uint8, device="cpu").expand(count, 1, 1, 1)


def _probe(path: Path, split: str | None, crop: int | None, key: str | None, max_pixels: int) -> ImageFormat:
    try:
        images = open_path(path, _FormatProbe(crop=crop, max_pixels=max_pixels), split, key)
    except _FormatFound as probe:
        return probe.found
    return ImageFormat(*images.pixels.shape[1:])
