"""Pictures inside a page: as data URIs, each of a bounded size, and all together within a budget."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from fastebm.plotting import MAX_PIXELS
from fastebm.runs.interrupts import uninterrupted

LARGEST_FILE = 2**26
LARGEST_PICTURE = 400_000
"""Bytes of a picture; a larger one is shown in fewer pixels."""
WIDEST, HIGHEST = 1600, 4000
JPEG_QUALITY = 88


@dataclass(frozen=True)
class Picture:
    """A picture of a page: its data URI, its size in pixels, what it shows, and the words below it."""

    source: str
    width: int
    height: int
    alt: str
    caption: str


class PictureError(ValueError):
    """A picture that a page does not show, with the reason as a sentence."""


class Pictures:
    """The pictures of one page, as long as there is room for them."""

    def __init__(self, budget: int) -> None:
        self.left = budget

    def read(self, path: Path, alt: str, caption: str, widest: int = WIDEST) -> Picture:
        """The picture in a file, in at most `widest` pixels a row.

        Raises PictureError where it is damaged or there is no room left, FileNotFoundError where it is missing.
        """
        data, kind, size = _readable(path, widest)
        return self._embedded(f"image/{kind}", data, size, alt, caption, path.name)

    def svg(self, text: str, width: int, height: int, alt: str, caption: str) -> Picture:
        """A drawing, as the text of an SVG. Raises PictureError where there is no room left."""
        return self._embedded("image/svg+xml", text.encode(), (width, height), alt, caption, "A drawing")

    def _embedded(self, kind: str, data: bytes, size: tuple[int, int], alt: str, caption: str, name: str) -> Picture:
        source = f"data:{kind};base64,{base64.b64encode(data).decode()}"
        if len(source) > self.left:
            raise PictureError(f"{name} is left out, so that the page stays small.")
        self.left -= len(source)
        return Picture(source, *size, alt, caption)


def _readable(path: Path, widest: int) -> tuple[bytes, str, tuple[int, int]]:
    """The bytes, the format and the size of a picture that browsers show; a large one becomes a smaller JPEG."""
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise PictureError(f"{path.name} is left out: it has more than {LARGEST_FILE / 2**20:.0f} MiB.")
        if not path.is_file():  # opening a pipe would wait for a writer
            raise OSError("it is not a file")
        data = path.read_bytes()
        with uninterrupted(), Image.open(io.BytesIO(data), formats=("PNG",)) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise PictureError(f"{path.name} is left out: it has more than {MAX_PIXELS:,} pixels.")
            picture.load()
            if len(data) <= LARGEST_PICTURE and picture.width <= widest and picture.height <= HIGHEST:
                return data, "png", picture.size
            smaller = picture.convert("RGBA")
            smaller.thumbnail((widest, HIGHEST))
            flat = Image.new("RGB", smaller.size, "white")
            flat.paste(smaller, mask=smaller)
            file = io.BytesIO()
            flat.save(file, "JPEG", quality=JPEG_QUALITY)
            return file.getvalue(), "jpeg", flat.size
    except (FileNotFoundError, PictureError):
        raise
    except Exception as error:  # Pillow raises a dozen kinds for damaged files
        raise PictureError(f"{path.name} can't be shown: {error}.") from error
