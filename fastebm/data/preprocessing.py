"""Crop, size and channels of images as they are read into memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastebm.data.errors import DataError, raise_as_data_error
from fastebm.data.formats.axes import CHANNELS
from fastebm.data.formats.byte_reader import MAX_BYTES, MAX_PIXELS, PIECE
from fastebm.scalars import as_int

# ITU-R 601 luma in 16-bit fixed point, as Pillow converts, so that arrays and picture files give equal greys.
RED, GREEN, BLUE, HALF = 19595, 38470, 7471, 0x8000


@dataclass(frozen=True)
class Preprocessing:
    """The requested crop, size and channels; None leaves a property unchanged. `open_images` explains the fields.

    Raises ValueError for a field out of range.
    """

    size: int | None = None
    channels: int | None = None
    fit: Literal["resize", "pad"] = "resize"
    crop: int | None = None
    max_bytes: int = MAX_BYTES
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        for name in ("size", "crop", "max_bytes", "max_pixels", "channels"):
            if (given := getattr(self, name)) is not None:
                value = as_int(name, given)
                object.__setattr__(self, name, value)
                if value < 1 and name != "channels":
                    raise ValueError(f"{name} must be at least 1, got {value}")
        if self.channels not in (None, *CHANNELS):
            raise ValueError(f"channels must be 1 or 3, got {self.channels}")
        if self.fit not in ("resize", "pad"):
            raise ValueError(f"fit must be 'resize' or 'pad', got {self.fit!r}")

    def apply(self, name: str, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Preprocesses images (k, C, H, W). Raises DataError, with `name`, for images too small or too large."""
        if 0 in images.shape[1:]:
            raise DataError(f"{name}: images of {_describe(images.shape[1:])} have no pixels")
        images = _convert_channels(images, self.channels)
        if self.crop is not None:
            images = _center_crop(name, images, self.crop)
        if self.size is None or images.shape[2:] == (self.size, self.size):
            return images
        if self.fit == "pad":
            return _pad(name, images, self.size)
        return _resize(_center_crop(name, images, min(images.shape[2:])), self.size)

    def collect(self, name: str, count: int, chunks: Iterable[NDArray[np.uint8]]) -> Tensor:
        """Preprocesses chunks (k, C, H, W) one by one and collects them in one tensor (count, channels, size, size).

        Memory for the result and for one chunk is used. Errors are those of `collect_processed`.
        """
        return self.collect_processed(name, count, self._apply_to_chunks(name, chunks))

    def collect_processed(self, name: str, count: int, chunks: Iterable[NDArray[np.uint8]]) -> Tensor:
        """Collects chunks that have been preprocessed in one tensor (count, channels, size, size).

        Raises DataError for images of several shapes, for fewer than `count`, and for more than `max_bytes` in all.
        """
        collected: Tensor | None = None
        filled = 0
        for chunk in chunks:
            if collected is None:
                collected = self._allocate(name, (count, *chunk.shape[1:]))
            if chunk.shape[1:] != tuple(collected.shape[1:]):
                raise DataError(
                    f"{name}: image {filled} is {_describe(chunk.shape[1:])} and the first one "
                    f"{_describe(collected.shape[1:])}: give a size, and channels if those differ"
                )
            collected.numpy()[filled : filled + len(chunk)] = chunk
            filled += len(chunk)
        if collected is None or filled != count:
            raise DataError(f"{name}: holds {f'{filled} of {count}' if filled else 'no'} images")
        return collected

    def _apply_to_chunks(self, name: str, chunks: Iterable[NDArray[np.uint8]]) -> Iterator[NDArray[np.uint8]]:
        # Small images may grow: no result is larger than about 4 MiB.
        limit = max(1, 4 * PIECE // (3 * self.size * self.size)) if self.size else None
        for chunk in chunks:
            step = limit or max(1, len(chunk))
            for first in range(0, len(chunk), step):
                yield self.apply(name, chunk[first : first + step])

    def _allocate(self, name: str, shape: tuple[int, ...]) -> Tensor:
        needed = math.prod(shape)
        if needed > self.max_bytes:
            raise DataError(
                f"{name}: {shape[0]:,} images of {_describe(shape[1:])} take {needed:,} bytes of memory, more than "
                f"max_bytes = {self.max_bytes:,}: choose a smaller size or raise max_bytes"
            )
        with raise_as_data_error(name, "does not fit into memory"):
            return torch.empty(shape, dtype=torch.uint8, device="cpu")


def _convert_channels(images: NDArray[np.uint8], channels: int | None) -> NDArray[np.uint8]:
    if channels is None or images.shape[1] == channels:
        return images
    if channels == 3:
        return images.repeat(3, axis=1)
    red, green, blue = (images[:, i].astype(np.uint32) for i in range(3))
    return ((RED * red + GREEN * green + BLUE * blue + HALF) >> 16).astype(np.uint8)[:, None]


def _center_crop(name: str, images: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    height, width = images.shape[2:]
    if side > min(height, width):
        raise DataError(f"{name}: an image of {height}x{width} is too small for a crop of {side}x{side}")
    top, left = (height - side) // 2, (width - side) // 2
    return images[:, :, top : top + side, left : left + side]


def _pad(name: str, images: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    height, width = images.shape[2:]
    if max(height, width) > size:
        raise DataError(f"{name}: an image of {height}x{width} can't be padded to {size}x{size}")
    padded = np.zeros((*images.shape[:2], size, size), dtype=np.uint8)
    top, left = (size - height) // 2, (size - width) // 2
    padded[:, :, top : top + height, left : left + width] = images
    return padded


def _resize(images: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Square images at another size: means of whole pixels where the sizes divide, else Lanczos resampling."""
    count, channels, side, _ = images.shape
    factor, rest = divmod(side, size)
    if not rest:  # not by Pillow, which rounds twice, after rows and after columns
        return np.rint(images.reshape(count, channels, size, factor, size, factor).mean((3, 5))).astype(np.uint8)
    from PIL import Image

    planes = (Image.fromarray(plane) for plane in images.reshape(-1, side, side))
    resized = [np.asarray(plane.resize((size, size), Image.Resampling.LANCZOS)) for plane in planes]
    return np.stack(resized).reshape(count, channels, size, size)


def _describe(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape))
