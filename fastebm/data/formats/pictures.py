"""Single pictures through Pillow: upright, without transparency, grey or in colour."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastebm.data.errors import DataError, explaining
from fastebm.data.formats.byte_reader import MAX_PIXELS

# No others: some that Pillow knows run programs (EPS) or stand for other files.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")

_GREY = ("1", "L", "LA", "La")
_DEEP = ("I", "F")
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Facts:
    """What a picture's header says: sides as it stands upright, and how many channels it needs."""

    height: int
    width: int
    channels: int


def facts_of(path: str | os.PathLike[str]) -> Facts:
    """The facts of a picture file, without decoding it."""
    with _opened(path) as picture:
        width, height = picture.size
        if _orientation(picture) >= 5:
            width, height = height, width
        return Facts(height, width, 1 if picture.mode in _GREY else 3)


def read_picture(path: str | os.PathLike[str], channels: int | None) -> NDArray[np.uint8]:
    """uint8 (1, C, H, W) of a picture file. The first picture of several in one file; what is transparent is white."""
    with _opened(path) as picture:
        return pixels_of(os.fspath(path), picture, channels)


def pixels_of(name: str, picture: Image.Image, channels: int | None) -> NDArray[np.uint8]:
    """uint8 (1, C, H, W) of a picture that Pillow has opened, with as many channels as it needs if `channels` is None.

    Raises DataError, with `name`, for one that is too large, damaged, or has more than 8 bits a channel.
    """
    _check_size(name, picture)
    if picture.mode.startswith(_DEEP):
        raise DataError(f"{name}: has more than 8 bits a channel (mode {picture.mode}): convert it to 8 bits first")
    grey = picture.mode in _GREY if channels is None else channels == 1
    with explaining(name, "damaged picture"), _quiet():
        orientation = _orientation(picture)
        picture = _opaque(picture).convert("L" if grey else "RGB")
        if orientation in _UPRIGHT:
            picture = picture.transpose(_UPRIGHT[orientation])
        pixels = np.asarray(picture)
    return pixels[None, None] if grey else pixels.transpose(2, 0, 1)[None]


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Image.Image]:
    name = os.fspath(path)
    if not os.path.isfile(path):  # a pipe of that name would be waited for
        raise DataError(f"{name}: is no file")
    with explaining(name, "is no picture that can be read"), _quiet():
        picture = Image.open(path, formats=FORMATS)
    with picture:
        _check_size(name, picture)
        yield picture


def _check_size(name: str, picture: Image.Image) -> None:
    width, height = picture.size
    if width * height > MAX_PIXELS:
        raise DataError(
            f"{name}: {width}x{height} pixels are more than {MAX_PIXELS:,}: refused as a decompression bomb"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Pillow's warnings: of size, for which we have a limit of our own, and of odd metadata, not used here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _orientation(picture: Image.Image) -> int:
    """How the camera was held, 1 to 8; 1, upright, where metadata are damaged: pixels may well be whole."""
    try:
        with _quiet():
            orientation = picture.getexif().get(_ORIENTATION, 1)
    except Exception:
        return 1
    return orientation if orientation in _UPRIGHT else 1


def _opaque(picture: Image.Image) -> Image.Image:
    """The picture on white."""
    if picture.mode not in ("LA", "La", "PA", "RGBA", "RGBa") and "transparency" not in picture.info:
        return picture
    grey = picture.mode in _GREY
    layer = picture.convert("RGBA")
    white = Image.new("RGBA", layer.size, "white")
    white.alpha_composite(layer)
    return white.convert("L" if grey else "RGB")
