"""What form the images of a file or folder have, found without reading them all."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from fastebm.data.errors import MixedSizesError
from fastebm.data.formats.open_images import open_path
from fastebm.data.preprocessing import Preprocessing


class ImageFormat(NamedTuple):
    """Channels and sides of images; sides are None where pictures differ in size."""

    channels: int
    height: int | None
    width: int | None

    def __str__(self) -> str:
        if self.height is None:
            return f"of several sizes, with {self.channels} channels"
        return f"{self.channels}x{self.height}x{self.width}"


def image_format(
    source: str | os.PathLike[str], split: str | None = None, *, crop: int | None = None, key: str | None = None
) -> ImageFormat:
    """The form of the images at a path, as `open_images` would give them with these arguments.

    Of a folder of pictures all headers are read, of other sets the images up to the first few.

    Raises DataError as `open_images` does, but not for what is wrong further back.

    Example:
        >>> import numpy as np
        >>> from fastebm.data import image_format
        >>> np.savez("faces.npz", x_train=np.zeros((10, 16, 24, 3), np.uint8))
        >>> str(image_format("faces.npz")), str(image_format("faces.npz", crop=12))
        ('3x16x24', '3x12x12')
    """
    try:
        return _seen(Path(source), split, crop, key)
    except MixedSizesError:
        return ImageFormat(_seen(Path(source), split, 1, key).channels, None, None)


class _Seen(Exception):  # noqa: N818  (nothing is wrong: it ends the reading)
    """The form of the images, at the moment when memory would be set aside for them."""

    def __init__(self, form: ImageFormat) -> None:
        self.form = form


@dataclass(frozen=True)
class _Look(Preprocessing):
    """A shaping that goes no further than the first images."""

    def _room(self, name: str, shape: tuple[int, ...]) -> Tensor:
        raise _Seen(ImageFormat(*shape[1:]))


def _seen(path: Path, split: str | None, crop: int | None, key: str | None) -> ImageFormat:
    try:
        images = open_path(path, _Look(crop=crop), split, key)
    except _Seen as seen:
        return seen.form
    return ImageFormat(*images.pixels.shape[1:])
