"""Resolution pyramids: the same images at sizes that halve from level to level, by average pooling."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastebm.data.images import Images, to_odd_integers
from fastebm.scalars import as_int

_AT_ONCE = 2**24  # pixels converted to floats at once while a level is computed: 64 MiB


def average_pool_to(images: Tensor, size: int) -> Tensor:
    """Averages images (N, C, s, s) down to (N, C, size, size), where s is `size` times a power of two.

    The size is halved step by step, so that each level is bitwise the average pool of the level above it. For s =
    `size` the images themselves are returned. Raises ValueError for other shapes and sizes.
    """
    size = _check(images, size)
    while images.shape[3] > size:
        images = F.avg_pool2d(images, 2)
    return images


def pyramid(images: Tensor, min_size: int) -> dict[int, Tensor]:
    """All levels of images (N, C, s, s), keyed by size, ascending from `min_size` to s.

    Errors are those of `average_pool_to`.
    """
    min_size = _check(images, min_size)
    levels = [images]
    while levels[-1].shape[3] > min_size:
        levels.append(F.avg_pool2d(levels[-1], 2))
    return {level.shape[3]: level for level in reversed(levels)}


class ImagePyramid:
    """Float batches of an image set at every level, while the set itself stays in memory as bytes.

    Batches of the full size are computed from bytes. A lower level is computed and kept as floats when it is first
    asked for, from the smallest level up as far as `cache_bytes` reach; levels beyond that are computed batch by batch.
    (The level below the full size takes as many bytes as the set; all smaller ones together take a third of that.)

    A pixel of a level is the mean of the pixels it covers. The mean is exact (for up to 256x256 pixels, whose sums fit
    into 24 bits) until it is scaled to [-1, 1] and rounded once. A batch therefore has the same bits whether its level
    is kept or not, on every device and however it is split. `pyramid` rounds at every level and agrees to 1e-6.

    Args:
        images: square images, of a side that is `min_size` times a power of two.
        min_size: the side of the smallest level.
        cache_bytes: how much memory may be used in addition to the set's own.

    Raises:
        ValueError: for other images or sizes.

    Attributes:
        sizes: the sides of all levels, ascending.

    Example:
        >>> import torch
        >>> from fastebm.data import ImagePyramid, Images
        >>> levels = ImagePyramid(Images(torch.zeros(10, 3, 32, 32, dtype=torch.uint8)), min_size=8)
        >>> levels.sizes, levels.batch(16, torch.tensor([3, 5])).shape
        ((8, 16, 32), torch.Size([2, 3, 16, 16]))
    """

    def __init__(self, images: Images, min_size: int, *, cache_bytes: int = 2**30) -> None:
        min_size = _check(images.pixels, min_size)
        cache_bytes = as_int("cache_bytes", cache_bytes)
        self.images = images
        self.sizes = tuple(min_size << level for level in range((images.size // min_size).bit_length()))
        self._cache: dict[int, Tensor | None] = {}
        for size in self.sizes[:-1]:
            cache_bytes -= 4 * len(images) * images.channels * size * size
            if cache_bytes >= 0:
                self._cache[size] = None

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, size: int, indices: Tensor, device: torch.device | str | None = None) -> Tensor:
        """float32 (B, C, size, size) in [-1, 1] of the images at int64 `indices` (B,), on `device`.

        Raises ValueError for a size that is not a level.
        """
        if size not in self.sizes:
            raise ValueError(f"size {size} is not a level; the levels are {', '.join(map(str, self.sizes))}")
        if size not in self._cache:
            return _compute_level(self.images.select_pixels(indices, device), size)
        level = self._cache[size]
        if level is None:
            level = self._cache[size] = self._compute_all(size)
        return level[indices.to(level.device)].to(device)

    def _compute_all(self, size: int) -> Tensor:
        pixels = self.images.pixels
        level = torch.empty((*pixels.shape[:2], size, size), device=pixels.device)
        at_once = max(1, _AT_ONCE // pixels[0].numel())
        for first in range(0, len(pixels), at_once):
            part = slice(first, first + at_once)
            level[part] = _compute_level(self.images.select_pixels(part), size)
        return level


def _compute_level(pixels: Tensor, size: int) -> Tensor:
    return average_pool_to(to_odd_integers(pixels), size).mul_(1 / 255)


def _check(images: Tensor, size: int) -> int:
    """`size` as int."""
    size = as_int("size", size)
    if images.ndim != 4 or images.shape[2] != images.shape[3]:
        raise ValueError(f"images must be (N, C, s, s), got {tuple(images.shape)}")
    factor, rest = divmod(images.shape[3], size) if size > 0 else (0, 0)
    if rest or factor < 1 or factor & (factor - 1):
        raise ValueError(f"images of size {images.shape[3]} can't be halved to size {size}")
    return size
