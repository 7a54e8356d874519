"""The resolution pyramid: images halved again and again by average pooling, as in the fade path of a growing net."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastebm.data.images import Images, centred

_AT_ONCE = 2**24  # pixels that are floats, 64 MiB, while a level is made


def average_pool_to(images: Tensor, size: int) -> Tensor:
    """Images (N, C, s, s) averaged down to (N, C, size, size), where s is `size` times a power of two.

    Halved step by step, so that each level is to the last bit the average pool of the level above it. The images
    themselves are returned for s = `size`. Raises ValueError for other shapes and sizes.
    """
    _check(images, size)
    while images.shape[3] > size:
        images = F.avg_pool2d(images, 2)
    return images


def pyramid(images: Tensor, lowest: int) -> dict[int, Tensor]:
    """All levels of images (N, C, s, s) by their size, ascending from `lowest` to s. Errors as in `average_pool_to`."""
    _check(images, lowest)
    levels = [images]
    while levels[-1].shape[3] > lowest:
        levels.append(F.avg_pool2d(levels[-1], 2))
    return {level.shape[3]: level for level in reversed(levels)}


class ImagePyramid:
    """Every level of an image set, as float batches, without keeping the set as floats.

    The full size is made from bytes batch by batch. Lower levels are kept as floats once they have been asked for, from
    the lowest up as far as `cache_bytes` reach (the level below the top takes as many bytes as the set itself, all
    below it together a third of that); the others are made batch by batch as well.

    A pixel of a level is the mean of the pixels that it stands for, exact until it is scaled to [-1, 1] and rounded in
    the end (for means of up to 256x256, whose sums fit into 24 bits). So a batch has the same bits kept or made anew,
    on every device and however it is split; `pyramid`, which rounds at every level, gives them to 1e-6.

    Args:
        images: square images, of a side that is `lowest` times a power of two.
        lowest: the side of the lowest level.
        cache_bytes: how much memory may be used beside the set's own.

    Raises:
        ValueError: for other images or sizes.

    Attributes:
        sizes: the sides of all levels, ascending.
    """

    def __init__(self, images: Images, lowest: int, *, cache_bytes: int = 2**30) -> None:
        _check(images.pixels, lowest)
        self.images = images
        self.sizes = tuple(lowest << level for level in range((images.size // lowest).bit_length()))
        self._cached: dict[int, Tensor | None] = {}
        for size in self.sizes[:-1]:
            cache_bytes -= self._bytes_of(size)
            if cache_bytes >= 0:
                self._cached[size] = None

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, size: int, indices: Tensor, device: torch.device | str | None = None) -> Tensor:
        """float32 (B, C, size, size) in [-1, 1] of the images at int64 `indices` (B,), on `device`.

        Raises ValueError for a size that is no level.
        """
        if size not in self.sizes:
            raise ValueError(f"size {size} is no level; levels are {', '.join(map(str, self.sizes))}")
        if size not in self._cached:
            return _level(self.images.chosen(indices, device), size)
        level = self._cached[size]
        if level is None:
            level = self._cached[size] = self._made(size)
        return level[indices.to(level.device)].to(device)

    def _made(self, size: int) -> Tensor:
        pixels = self.images.pixels
        level = torch.empty((*pixels.shape[:2], size, size), device=pixels.device)
        at_once = max(1, _AT_ONCE // pixels[0].numel())
        for first in range(0, len(pixels), at_once):
            part = slice(first, first + at_once)
            level[part] = _level(self.images.chosen(part), size)
        return level

    def _bytes_of(self, size: int) -> int:
        return 4 * len(self.images) * self.images.channels * size * size


def _level(pixels: Tensor, size: int) -> Tensor:
    return average_pool_to(centred(pixels), size).mul_(1 / 255)


def _check(images: Tensor, size: int) -> None:
    if images.ndim != 4 or images.shape[2] != images.shape[3]:
        raise ValueError(f"images have shape {tuple(images.shape)}; needed is (N, C, s, s)")
    factor, rest = divmod(images.shape[3], size) if size > 0 else (0, 0)
    if rest or factor < 1 or factor & (factor - 1):
        raise ValueError(f"images of size {images.shape[3]} can't be halved to size {size}")
