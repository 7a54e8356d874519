"""An image set in memory: a byte a pixel and channel, and floats only for the batch at hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastebm.data.errors import NoSplitError


@dataclass(frozen=True, eq=False, repr=False)
class Images:
    """Images of one size, with or without labels.

    Attributes:
        pixels: uint8 (N, C, H, W), N >= 1, 0 is black; all the memory that the set takes.
        labels: int64 (N,), counted from 0, or None.
        name: the file, folder or data set that they come from.
        format: which format that was taken for.
        split: the part of it, such as "train"; "" where it has no parts.
        classes: names of the labels, or ().

    Raises ValueError for tensors of other shapes or types.
    """

    pixels: Tensor
    labels: Tensor | None = None
    name: str = "images"
    format: str = "tensor"
    split: str = ""
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.pixels.dtype != torch.uint8 or self.pixels.ndim != 4 or not self.pixels.numel():
            raise ValueError(
                f"pixels must be uint8 (N, C, H, W), none of them 0, got {self.pixels.dtype} {tuple(self.pixels.shape)}"
            )
        if self.labels is not None and (self.labels.dtype != torch.int64 or self.labels.shape != (len(self),)):
            raise ValueError(f"labels must be int64 ({len(self)},), got {self.labels.dtype} {tuple(self.labels.shape)}")

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def channels(self) -> int:
        return self.pixels.shape[1]

    @property
    def size(self) -> int:
        """The side of the images. Raises ValueError where they are not square."""
        height, width = self.pixels.shape[2:]
        if height != width:
            raise ValueError(f"{self.name}: its images are {height}x{width}, not square: give a size")
        return height

    def chosen(self, indices: Tensor | slice, device: torch.device | str | None = None) -> Tensor:
        """uint8 (B, C, H, W): the pixels at int64 `indices` (B,) or in a slice, on `device`."""
        if isinstance(indices, Tensor):
            indices = indices.to(self.pixels.device)
        return self.pixels[indices].to(device)

    def batch(self, indices: Tensor | slice, device: torch.device | str | None = None) -> Tensor:
        """float32 (B, C, H, W) in [-1, 1] of the images at int64 `indices` (B,) or in a slice, on `device`.

        Bytes travel to the device, not floats, and become the same floats everywhere.
        """
        return to_float(self.chosen(indices, device))

    def to(self, device: torch.device | str) -> Images:
        """The same set with its tensors on `device`."""
        labels = None if self.labels is None else self.labels.to(device)
        return dataclasses.replace(self, pixels=self.pixels.to(device), labels=labels)

    def __repr__(self) -> str:
        channels, height, width = self.pixels.shape[1:]
        kinds = f", {len(self.classes)} classes" if self.classes else ", labels" if self.labels is not None else ""
        return (
            f"{self.name}{self.split and f', {self.split}'}: {self.format}: {len(self):,} images of "
            f"{channels}x{height}x{width}{kinds}, {self.pixels.numel() / 2**20:,.1f} MiB"
        )


def to_float(pixels: Tensor) -> Tensor:
    """float32 in [-1, 1] of uint8 pixels: 0 becomes -1 and 255 becomes 1, exactly, and p and 255 - p are opposites.

    2p - 255 is exact in float32, so that a single product is rounded, on any device in the same way; a division by
    127.5 is not, because some devices multiply by the reciprocal instead.
    """
    return centred(pixels).mul_(1 / 255)


def centred(pixels: Tensor) -> Tensor:
    """float32 of uint8 pixels as the odd whole numbers from -255 to 255, a new tensor."""
    return pixels.to(torch.float32).mul_(2).sub_(255)


def to_pixels(images: Tensor) -> Tensor:
    """uint8 of images in [-1, 1], the nearest: the way back of `to_float`. What lies outside is clamped."""
    return images.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)


def pick_split(name: str, wanted: str | None, there: Sequence[str]) -> str:
    """The split to read, of those that are `there` (none: the set is one piece, called "").

    Without a wish it is the only one or "train". Raises NoSplitError for one that is not there.
    """
    if wanted is None:
        if not there or len(there) == 1:
            return there[0] if there else ""
        wanted = "train"
    if wanted not in there:
        has = f"it has {', '.join(there)}" if there else "it is one piece: give no split"
        raise NoSplitError(f"{name}: has no split {wanted!r}; {has}")
    return wanted
