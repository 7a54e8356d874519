"""Single picture files, read by Pillow: upright, on white where they are transparent, in grey or in colour."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fastebm.data.errors import DataError, raise_as_data_error
from fastebm.data.formats.byte_reader import MAX_PIXELS

if TYPE_CHECKING:
    from PIL.Image import Image

# Pillow's other formats are not tried: some run programs (EPS), others refer to further files.
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")

_GREY_MODES = ("1", "L", "LA", "La")
_DEEP_MODES = ("I", "F")
_ORIENTATION = 0x0112  # EXIF tag


@dataclass(frozen=True)
class PictureInfo:
    """The sides of an upright picture and the number of channels it needs."""

    height: int
    width: int
    channels: int


def read_picture_info(path: str | os.PathLike[str]) -> PictureInfo:
    """Reads the header of a picture file without decoding it."""
    with _open_picture(path) as picture:
        width, height = picture.size
        if _orientation(picture) >= 5:
            width, height = height, width
        return PictureInfo(height, width, 1 if picture.mode in _GREY_MODES else 3)


def read_picture(path: str | os.PathLike[str], channels: int | None) -> NDArray[np.uint8]:
    """uint8 (1, C, H, W) of the first picture in a file. Arguments and errors are those of `picture_to_array`."""
    with _open_picture(path) as picture:
        return picture_to_array(os.fspath(path), picture, channels)


def picture_to_array(name: str, picture: Image, channels: int | None) -> NDArray[np.uint8]:
    """uint8 (1, C, H, W) of a Pillow image, with `channels` 1 or 3, or with as many as it needs for None.

    Raises DataError, with `name`, for a picture that is too large, damaged, or has more than 8 bits per channel.
    """
    _check_size(name, picture)
    if picture.mode.startswith(_DEEP_MODES):
        raise DataError(f"{name}: has more than 8 bits per channel (mode {picture.mode}): convert it to 8 bits first")
    grey = picture.mode in _GREY_MODES if channels is None else channels == 1
    with raise_as_data_error(name, "damaged picture"), _no_warnings():
        orientation = _orientation(picture)
        pixels = np.asarray(_on_white(picture).convert("L" if grey else "RGB"))
    pixels = pixels[None, None] if grey else pixels.transpose(2, 0, 1)[None]
    if orientation >= 5:
        pixels = pixels.swapaxes(2, 3)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[:, :, ::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, :, :, ::-1]
    return pixels


@contextmanager
def _open_picture(path: str | os.PathLike[str]) -> Iterator[Image]:
    from PIL import Image

    name = os.fspath(path)
    if not os.path.isfile(path):  # opening a pipe would wait for a writer
        raise DataError(f"{name}: is no file")
    with raise_as_data_error(name, "is no picture that can be read"), _no_warnings():
        picture = Image.open(path, formats=IMAGE_FORMATS)
    with picture:
        _check_size(name, picture)
        yield picture


def _check_size(name: str, picture: Image) -> None:
    width, height = picture.size
    if width * height > MAX_PIXELS:
        raise DataError(
            f"{name}: {width}x{height} pixels are more than {MAX_PIXELS:,}: refused as a decompression bomb"
        )


@contextmanager
def _no_warnings() -> Iterator[None]:
    """Silences Pillow's warnings about size, for which we have a limit of our own, and about metadata we do not use."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _orientation(picture: Image) -> int:
    """The EXIF orientation, 1 to 8; 1 (upright) if the metadata are damaged, because the pixels may still be fine."""
    try:
        with _no_warnings():
            orientation = picture.getexif().get(_ORIENTATION, 1)
    except Exception:
        return 1
    return orientation if orientation in range(1, 9) else 1


def _on_white(picture: Image) -> Image:
    """The picture without transparency, on a white background."""
    from PIL import Image

    if picture.mode not in ("LA", "La", "PA", "RGBA", "RGBa") and "transparency" not in picture.info:
        return picture
    layer = picture.convert("RGBA")
    white = Image.new("RGBA", layer.size, "white")
    white.alpha_composite(layer)
    return white.convert("L" if picture.mode in _GREY_MODES else "RGB")
