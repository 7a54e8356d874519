"""The training images at each resolution of a run, from float tensors or from bytes."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from fastebm.data import ImagePyramid, Images, pyramid


class ImageLevels(ABC):
    """Images at several resolutions.

    Attributes:
        digest: a hash of all images, by which a resumed run knows that they are the same.
        labels: int64 (N,), or None where the images have none.
    """

    digest: str
    labels: Tensor | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def batch(self, size: int, indices: Tensor, device: torch.device | str | None = None) -> Tensor:
        """The images at `indices`, float32 (B, C, size, size) in [-1, 1]."""

    def at(self, size: int, rows: slice, device: torch.device | str | None = None) -> Tensor:
        """The images at the indices of a slice, which go on at the first image after the last one."""
        return self.batch(size, torch.arange(rows.start or 0, rows.stop, device="cpu") % len(self), device)

    def first(self, size: int, count: int, device: torch.device | str | None = None) -> Tensor:
        """The first `count` images, or all if there are fewer."""
        return self.batch(size, torch.arange(min(count, len(self)), device="cpu"), device)


class FloatLevels(ImageLevels):
    """Images from a float tensor; every resolution is kept in memory."""

    def __init__(self, images: Tensor, lowest: int) -> None:
        self.levels = pyramid(images, lowest)
        self.digest = _digest(images)

    def __len__(self) -> int:
        return len(self.levels[max(self.levels)])

    def batch(self, size: int, indices: Tensor, device: torch.device | str | None = None) -> Tensor:
        images = self.levels[size]
        return images[indices.to(images.device)].to(device)


class PixelLevels(ImageLevels):
    """Images from bytes, which become floats batch by batch."""

    def __init__(self, images: Images, lowest: int) -> None:
        self.pyramid = ImagePyramid(images, lowest)
        self.digest = _digest(images.pixels)
        self.labels = images.labels

    def __len__(self) -> int:
        return len(self.pyramid)

    def batch(self, size: int, indices: Tensor, device: torch.device | str | None = None) -> Tensor:
        return self.pyramid.batch(size, indices, device)


class SubsetLevels(ImageLevels):
    """The images at `positions`, int64, of other images, with the digest of all of them."""

    def __init__(self, images: ImageLevels, positions: Tensor) -> None:
        self.images, self.positions = images, positions
        self.digest = images.digest

    def __len__(self) -> int:
        return len(self.positions)

    def batch(self, size: int, indices: Tensor, device: torch.device | str | None = None) -> Tensor:
        return self.images.batch(size, self.positions[indices.to(self.positions.device)], device)


def split_by_label(images: ImageLevels, label: int) -> tuple[ImageLevels, ImageLevels]:
    """The images with a label, and all others. Raises ValueError without labels, or where one of the parts is empty."""
    if images.labels is None:
        raise ValueError(f"domain {label} is a label, and these images have none")
    found = images.labels == label
    if not found.any() or found.all():
        counts = torch.bincount(images.labels).tolist()
        raise ValueError(
            f"needed are images with label {label} and others; of each label, from 0 on, there are {counts}"
        )
    return SubsetLevels(images, found.nonzero()[:, 0]), SubsetLevels(images, (~found).nonzero()[:, 0])


def image_levels(images: Tensor | Images, sizes: Sequence[int], channels: int) -> ImageLevels:
    """The images at each of `sizes`, ascending, after a check of whether they can be trained on.

    Raises ValueError for another number of channels, for floats outside of [-1, 1], and for images that are too small
    or can't be halved to the lowest size.
    """
    if isinstance(images, Images):
        if images.channels != channels:
            raise ValueError(f"{images.name}: images have {images.channels} channels, and the config {channels}")
        levels: ImageLevels = PixelLevels(images, sizes[0])
        size = images.size
    else:
        images = images.detach()
        _check_floats(images, channels)
        levels = FloatLevels(images, sizes[0])
        size = images.shape[3]
    if size < sizes[-1]:
        raise ValueError(f"images of size {size} are too small to train up to {sizes[-1]}")
    return levels


def _check_floats(images: Tensor, channels: int) -> None:
    if images.dtype != torch.float32 or images.ndim != 4 or images.shape[1] != channels or not len(images):
        raise ValueError(
            f"images must be float32 (N, {channels}, S, S) with N >= 1, got {images.dtype} {tuple(images.shape)}"
        )
    low, high = images.aminmax()
    if not (low >= -1 and high <= 1):
        raise ValueError(f"images must lie in [-1, 1], got values from {float(low):g} to {float(high):g}")


def _digest(images: Tensor) -> str:
    # The hash reads the tensor in place, as sets of gigabytes should not be copied.
    return hashlib.sha256(images.detach().cpu().contiguous().numpy().data).hexdigest()
