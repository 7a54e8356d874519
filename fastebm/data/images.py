"""Image sets in memory: one byte per pixel and channel, converted to floats batch by batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastebm.data.errors import DataError, NoSplitError


@dataclass(frozen=True, eq=False, repr=False)
class Images:
    """Images of one size, with or without labels.

    Attributes:
        pixels: uint8 (N, C, H, W), N >= 1, 0 is black.
        labels: int64 (N,), the number of each image's class, counted from 0, or -1 for an image without a class; or
            None. Numbers are kept as the set has them, and need not be consecutive.
        name: the file, folder or data set that the images come from.
        format: the format that it was recognised as.
        split: the part of the set, such as "train"; "" for a set without splits.
        classes: the names of the classes, by their numbers; or ().

    Raises ValueError for tensors of other shapes or types, and for a label below -1 or without a name among `classes`.
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
                f"pixels must be uint8 (N, C, H, W), not empty, got {self.pixels.dtype} {tuple(self.pixels.shape)}"
            )
        if self.labels is not None and (self.labels.dtype != torch.int64 or self.labels.shape != (len(self),)):
            raise ValueError(f"labels must be int64 ({len(self)},), got {self.labels.dtype} {tuple(self.labels.shape)}")
        if self.labels is not None:
            _check_labels(self.name, self.labels, len(self.classes))

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def channels(self) -> int:
        return self.pixels.shape[1]

    @property
    def size(self) -> int:
        """The side of the images. Raises ValueError for images that are not square."""
        height, width = self.pixels.shape[2:]
        if height != width:
            raise ValueError(f"{self.name}: its images are {height}x{width}, not square: give a size")
        return height

    def select_pixels(self, indices: Tensor | slice, device: torch.device | str | None = None) -> Tensor:
        """uint8 (B, C, H, W) of the images at int64 `indices` (B,) or in a slice, on `device`."""
        if isinstance(indices, Tensor):
            indices = indices.to(self.pixels.device)
        return self.pixels[indices].to(device)

    def batch(self, indices: Tensor | slice, device: torch.device | str | None = None) -> Tensor:
        """float32 (B, C, H, W) in [-1, 1] of the images at int64 `indices` (B,) or in a slice, on `device`.

        Bytes are copied to the device and converted there, with the same result on every device.
        """
        return to_float(self.select_pixels(indices, device))

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


def _check_labels(name: str, labels: Tensor, num_classes: int) -> None:
    """Raises DataError, with `name`, for a label below -1, or of `num_classes` or more unless that is 0 (unknown)."""
    if labels.is_meta:
        return
    lowest, highest = (int(limit) for limit in labels.aminmax())
    if lowest < -1:
        raise DataError(f"{name}: the label {lowest} is below -1; labels are class numbers from 0, or -1 for no class")
    if num_classes and highest >= num_classes:
        raise DataError(f"{name}: the label {highest} has no name; there are {num_classes} classes, numbered from 0")


def to_float(pixels: Tensor) -> Tensor:
    """float32 in [-1, 1] of uint8 pixels: 0 becomes -1, 255 becomes 1, and p and 255 - p become exact opposites.

    2p - 255 is exact in float32, so that only one product is rounded, in the same way on every device. A division by
    127.5 is not the same everywhere, because some devices multiply by the reciprocal instead.
    """
    return to_odd_integers(pixels).mul_(1 / 255)


def to_odd_integers(pixels: Tensor) -> Tensor:
    """A new float32 tensor with 2p - 255 for uint8 pixels p: the odd integers from -255 to 255."""
    return pixels.to(torch.float32).mul_(2).sub_(255)


def to_pixels(images: Tensor) -> Tensor:
    """The nearest uint8 pixels to float images in [-1, 1], the inverse of `to_float`. Other values are clamped."""
    return images.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)


def resolve_split(name: str, requested: str | None, available: Sequence[str]) -> str:
    """The split to read, one of those `available`; a set without splits has the one split "".

    If none is requested, it is the only one there is, or else "train". Raises NoSplitError for a missing split.
    """
    if requested is None:
        if len(available) < 2:
            return available[0] if available else ""
        requested = "train"
    if requested not in available:
        has = f"it has {', '.join(available)}" if available else "it is one piece: give no split"
        raise NoSplitError(f"{name}: has no split {requested!r}; {has}")
    return requested
