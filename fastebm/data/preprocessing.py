"""What every image goes through on its way into memory: channels, crop, size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fastebm.data.errors import DataError, explaining
from fastebm.data.formats.byte_reader import MAX_BYTES, PIECE
from fastebm.data.formats.layout import CHANNELS

# ITU-R 601 luma in 16 bits fixed point, as Pillow's own conversion has it: arrays and files give the same grey.
RED, GREEN, BLUE, HALF = 19595, 38470, 7471, 0x8000


@dataclass(frozen=True)
class Preprocessing:
    """The wanted form of images. None leaves a thing as it is; the fields are explained at `open_images`."""

    size: int | None = None
    channels: int | None = None
    fit: Literal["resize", "pad"] = "resize"
    crop: int | None = None
    max_bytes: int = MAX_BYTES

    def __post_init__(self) -> None:
        for name in ("size", "crop", "max_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.channels not in (None, *CHANNELS):
            raise ValueError(f"channels must be 1 or 3, got {self.channels}")
        if self.fit not in ("resize", "pad"):
            raise ValueError(f"fit must be 'resize' or 'pad', got {self.fit!r}")

    def gather(self, name: str, count: int, chunks: Iterable[NDArray[np.uint8]]) -> Tensor:
        """One tensor (count, C, H, W) of the images in chunks (k, C, H, W), each shaped as it comes.

        Beside the result only a chunk is ever in memory. Errors as in `collect`.
        """
        return self.collect(name, count, self._applied(name, chunks))

    def collect(self, name: str, count: int, shaped: Iterable[NDArray[np.uint8]]) -> Tensor:
        """One tensor (count, C, H, W) of chunks that are shaped already.

        Raises DataError for images of several shapes, for more than `max_bytes` of them, and for none.
        """
        block: Tensor | None = None
        filled = 0
        for chunk in shaped:
            if block is None:
                block = self._room(name, (count, *chunk.shape[1:]))
            if chunk.shape[1:] != tuple(block.shape[1:]):
                raise DataError(
                    f"{name}: image {filled} is {_shape(chunk.shape[1:])} and the first one "
                    f"{_shape(block.shape[1:])}: give a size, and channels if those differ"
                )
            block.numpy()[filled : filled + len(chunk)] = chunk
            filled += len(chunk)
        if block is None or filled != count:
            raise DataError(f"{name}: holds {f'{filled} of {count}' if filled else 'no'} images")
        return block

    def apply(self, name: str, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Images (k, C, H, W) in the wanted form, (k, channels, size, size)."""
        if 0 in images.shape[1:]:
            raise DataError(f"{name}: images of {_shape(images.shape[1:])} have no pixels")
        images = _with_channels(images, self.channels)
        if self.crop is not None:
            images = _centre(name, images, self.crop)
        if self.size is None or images.shape[2:] == (self.size, self.size):
            return images
        if self.fit == "pad":
            return _padded(name, images, self.size)
        return _resized(_centre(name, images, min(images.shape[2:])), self.size)

    def _applied(self, name: str, chunks: Iterable[NDArray[np.uint8]]) -> Iterator[NDArray[np.uint8]]:
        at_once = max(1, 4 * PIECE // (3 * self.size * self.size)) if self.size else None  # small images may grow
        for chunk in chunks:
            step = at_once or max(1, len(chunk))
            for first in range(0, len(chunk), step):
                yield self.apply(name, chunk[first : first + step])

    def _room(self, name: str, shape: tuple[int, ...]) -> Tensor:
        needed = int(np.prod(shape, dtype=object))
        if needed > self.max_bytes:
            raise DataError(
                f"{name}: {shape[0]:,} images of {_shape(shape[1:])} take {needed:,} bytes of memory, more than "
                f"max_bytes = {self.max_bytes:,}: choose a smaller size or raise max_bytes"
            )
        with explaining(name, "does not fit into memory"):
            return torch.empty(shape, dtype=torch.uint8)


def _with_channels(images: NDArray[np.uint8], channels: int | None) -> NDArray[np.uint8]:
    if channels is None or images.shape[1] == channels:
        return images
    if channels == 3:
        return images.repeat(3, axis=1)
    red, green, blue = (images[:, i].astype(np.uint32) for i in range(3))
    return ((RED * red + GREEN * green + BLUE * blue + HALF) >> 16).astype(np.uint8)[:, None]


def _centre(name: str, images: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    height, width = images.shape[2:]
    if side > min(height, width):
        raise DataError(f"{name}: an image of {height}x{width} is too small for a crop of {side}x{side}")
    top, left = (height - side) // 2, (width - side) // 2
    return images[:, :, top : top + side, left : left + side]


def _padded(name: str, images: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    height, width = images.shape[2:]
    if max(height, width) > size:
        raise DataError(f"{name}: an image of {height}x{width} can't be padded to {size}x{size}")
    padded = np.zeros((*images.shape[:2], size, size), dtype=np.uint8)
    top, left = (size - height) // 2, (size - width) // 2
    padded[:, :, top : top + height, left : left + width] = images
    return padded


def _resized(images: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Square images at another size: means where a pixel becomes of whole ones, as in the pyramid, else Lanczos'
    filter, widened when it shrinks."""
    count, channels, side, _ = images.shape
    factor, rest = divmod(side, size)
    if not rest:  # not by Pillow, which rounds twice, after rows and after columns
        return np.rint(images.reshape(count, channels, size, factor, size, factor).mean((3, 5))).astype(np.uint8)
    resized = np.empty((count, channels, size, size), dtype=np.uint8)
    for image, target in zip(images, resized, strict=True):
        for plane, target_plane in zip(image, target, strict=True):
            target_plane[:] = np.asarray(Image.fromarray(plane).resize((size, size), Image.Resampling.LANCZOS))
    return resized


def _shape(shape: Iterable[int]) -> str:
    """Channels, height and width in words."""
    return "x".join(map(str, shape))
