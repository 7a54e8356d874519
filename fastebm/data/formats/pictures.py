"""Single picture files, read by Pillow: upright, on white where they are transparent, in grey or in colour."""

from __future__ import annotations

import io
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fastebm.data.errors import DataError, raise_as_data_error
from fastebm.data.formats.byte_reader import MAX_BYTES, MAX_PIXELS, check_pixels, name_content, open_bytes
from fastebm.data.formats.png import SIGNATURE, plain_png

if TYPE_CHECKING:
    from PIL.Image import Image

# Pillow's other formats are not tried: some run programs (EPS), others refer to further files, and TGA has no mark by
# which other content could be told from it.
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF", "JPEG2000")
IMAGE_SUFFIXES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".jp2", ".j2k", ".jpf", ".jpx", ".j2c", ".jpc"),
)

_GREY_MODES = ("1", "L", "LA", "La")
_DEEP_MODES = ("I", "F")
_ORIENTATION = 0x0112  # EXIF tag
_WIDTH, _HEIGHT = 0x0100, 0x0101  # TIFF tags
_PILLOW_LIMIT = threading.RLock()


@dataclass(frozen=True)
class PictureInfo:
    """The sides of an upright picture and the number of channels it needs."""

    height: int
    width: int
    channels: int


def read_picture_info(path: str | os.PathLike[str], max_pixels: int = MAX_PIXELS) -> PictureInfo:
    """Reads the header of a picture file without decoding it. Errors are those of `picture_to_array`."""
    with _open_picture(path, max_pixels, with_pixels=False) as picture:
        # Pillow's size of a TIFF that is not loaded is that of the turned picture, but not in all versions.
        tags: Any = getattr(picture, "tag_v2", {})
        width, height = tags.get(_WIDTH, picture.width), tags.get(_HEIGHT, picture.height)
        if _orientation(picture) >= 5:
            width, height = height, width
        return PictureInfo(height, width, 1 if picture.mode in _GREY_MODES else 3)


def read_picture(path: str | os.PathLike[str], channels: int | None, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """uint8 (1, C, H, W) of the first picture in a file. Arguments and errors are those of `picture_to_array`."""
    with _open_picture(path, max_pixels) as picture:
        return picture_to_array(os.fspath(path), picture, channels, max_pixels)


def picture_to_array(
    name: str, picture: Image, channels: int | None, max_pixels: int = MAX_PIXELS
) -> NDArray[np.uint8]:
    """uint8 (1, C, H, W) of a Pillow image, with `channels` 1 or 3, or with as many as it needs for None.

    Raises DataError, with `name`, for a picture that is damaged, has more than `max_pixels` pixels, or has more than 8
    bits per channel.
    """
    check_pixels(name, *picture.size, max_pixels)
    _check_depth(name, picture)
    grey_file = picture.mode in _GREY_MODES
    grey = grey_file if channels is None else channels == 1
    # Before loading, which fills a palette up with black.
    palette = len(picture.palette.palette) // 3 if picture.format == "PNG" and picture.palette else 0
    with raise_as_data_error(name, "damaged picture"), _no_warnings():
        picture.load()
        orientation = _orientation(picture)  # asked for after loading, which turns a TIFF upright and says so
        if picture.format == "PNG" and picture.mode == "P":
            highest = int(np.asarray(picture).max())
            if highest >= palette:
                raise DataError(
                    f"{name}: damaged picture: it has the index {highest} and a palette of {palette} colours"
                )
        # Not every mode can become grey at once, and colours must become the same grey however they are stored.
        flat = _on_white(picture).convert("L" if grey_file else "RGB")
        pixels = np.asarray(flat.convert("L" if grey else "RGB"))
    pixels = pixels[None, None] if grey else pixels.transpose(2, 0, 1)[None]
    if orientation >= 5:
        pixels = pixels.swapaxes(2, 3)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[:, :, ::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, :, :, ::-1]
    return pixels


@contextmanager
def _open_picture(path: str | os.PathLike[str], max_pixels: int, with_pixels: bool = True) -> Iterator[Image]:
    from PIL import Image

    name = os.fspath(path)
    if not os.path.isfile(path):  # opening a pipe would wait for a writer
        raise DataError(f"{name}: is no file")
    with raise_as_data_error(name):
        file = Path(path).open("rb")  # noqa: SIM115  (closed below; errors of the caller's block must pass unchanged)
    with file, _pillow_limit(max_pixels):
        content: Any = file
        beginning = file.peek(64)
        if beginning.startswith(SIGNATURE):
            with open_bytes(path, unpack=False) as reader:
                content = io.BytesIO(plain_png(name, reader.read_all(MAX_BYTES), max_pixels, with_pixels))
        elif what := name_content(beginning):
            raise DataError(f"{name}: {what}")
        with raise_as_data_error(name, "is no picture that can be read"), _no_warnings():
            picture = Image.open(content, formats=IMAGE_FORMATS)
        with picture:
            check_pixels(name, *picture.size, max_pixels)
            _check_depth(name, picture)
            yield picture


def _check_depth(name: str, picture: Image) -> None:
    """Raises DataError for more than 8 bits per channel, which Pillow keeps for grey and cuts for colour."""
    deep = picture.mode.startswith(_DEEP_MODES)
    for *_, arguments in getattr(picture, "tile", ()):  # what Pillow will unpack
        form, *options = arguments if isinstance(arguments, tuple) else (arguments,)
        deep |= ";16" in str(form)
        deep |= picture.format == "PPM" and bool(options) and options[0] > 255
        deep |= picture.format == "JPEG2000" and _depth_of_jpeg2000(picture) > 8
    if deep:
        raise DataError(f"{name}: has more than 8 bits per channel (mode {picture.mode}): convert it to 8 bits first")


def _depth_of_jpeg2000(picture: Any) -> int:
    """The bits of the deepest channel, from the codestream's marker SIZ."""
    place = picture.fp.tell()
    picture.fp.seek(0)
    beginning = picture.fp.read(2**16)
    picture.fp.seek(place)
    siz = beginning.partition(b"\xff\x4f\xff\x51")[2]
    channels = int.from_bytes(siz[36:38], "big")
    return max((1 + (bits & 0x7F) for bits in siz[38 : 38 + 3 * channels : 3]), default=0)


@contextmanager
def _pillow_limit(max_pixels: int) -> Iterator[None]:
    """Lifts Pillow's own limit, which is the process's, while a picture above it is asked for: one at a time."""
    from PIL import Image

    if Image.MAX_IMAGE_PIXELS is None or max_pixels <= 2 * Image.MAX_IMAGE_PIXELS:
        yield
        return
    with _PILLOW_LIMIT:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


@contextmanager
def _no_warnings() -> Iterator[None]:
    """Silences Pillow's warnings about size, for which we have a limit of our own, and about metadata we do not use."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _orientation(picture: Image) -> int:
    """The EXIF orientation, 1 to 8; 1 (upright) if the metadata are damaged, because the pixels may still be fine."""
    from PIL import Image

    try:
        with _no_warnings():
            # The method of the base class, because that of PNG decodes the picture if there are no metadata.
            orientation = Image.Image.getexif(picture).get(_ORIENTATION, 1)
    except Exception:
        return 1
    return orientation if orientation in range(1, 9) else 1


def _on_white(picture: Image) -> Image:
    """The picture without transparency, on a white background."""
    from PIL import Image

    if picture.mode not in ("LA", "La", "PA", "RGBA", "RGBa") and "transparency" not in picture.info:
        return picture
    layer = (picture.convert("LA") if picture.mode == "La" else picture).convert("RGBA")
    white = Image.new("RGBA", layer.size, "white")
    white.alpha_composite(layer)
    return white
