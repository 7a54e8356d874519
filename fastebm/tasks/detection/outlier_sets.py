"""Outlier sets that need no files: noise, constant colours, means of two images, rotated and mirrored images.

They are bytes like images from files, so that quantisation does not give them away. Random content is a pure function
of the seed and of the image's number. Rotated and mirrored images have exactly the pixels of the originals: colours and
contrast can't tell them apart, only shapes.
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

from fastebm import rng
from fastebm.data import Images
from fastebm.ops.uniform import uniform
from fastebm.tasks.arguments import check_memory, check_seed, check_whole


class _Address(IntEnum):
    """Steps of the stream of initial states at the end of its range, which no chain reaches."""

    NOISE = rng.MAX_STEP - 1
    COLOURS = rng.MAX_STEP - 2
    PAIRS = rng.MAX_STEP - 3


def uniform_noise(count: int, channels: int, size: int, *, seed: int = 0) -> Images:
    """Images whose pixels and channels are independent and uniform over all bytes. Raises as `interpolations`."""
    _check(count, channels, size, seed=seed)
    noise = torch.empty((count, channels, size, size), dtype=torch.uint8, device="cpu")
    at_once = max(1, 2**24 // (channels * size * size))
    for first in range(0, count, at_once):
        part = noise[first : first + at_once]
        part.copy_(_bytes(_draws(tuple(part.shape), _Address.NOISE, seed, first)))
    return Images(noise, name="uniform noise", format="synthetic")


def constant_colours(count: int, channels: int, size: int, *, seed: int = 0) -> Images:
    """Images of one colour each, drawn uniformly from all colours. Raises as `interpolations`."""
    _check(count, channels, size, seed=seed)
    colours = _bytes(_draws((count, channels), _Address.COLOURS, seed))
    pixels = colours[:, :, None, None].expand(-1, -1, size, size).contiguous()
    return Images(pixels, name="constant colours", format="synthetic")


def interpolations(images: Images, count: int, *, seed: int = 0) -> Images:
    """Means of two different images each, rounded to bytes.

    Raises ValueError for a single image, and ValueError or TypeError for numbers out of range.
    """
    if len(images) < 2:
        raise ValueError(f"{images.name}: means of two images need two at least, got {len(images)}")
    _check(count, *images.pixels.shape[1:3], seed=seed)
    draws = _draws((count, 2), _Address.PAIRS, seed).double()
    first = (draws[:, 0] * len(images)).long().clamp(max=len(images) - 1)
    distance = 1 + (draws[:, 1] * (len(images) - 1)).long().clamp(max=len(images) - 2)
    second = (first + distance) % len(images)
    a, b = images.select_pixels(first).short(), images.select_pixels(second).short()
    total = a + b
    mean = (total + (total >> 1 & 1)) >> 1  # half to even: always up would make images brighter
    return Images(mean.to(torch.uint8), name=f"means of two of {images.name}", format="synthetic")


def rotate(images: Images) -> Images:
    """The images rotated by 90 degrees counter-clockwise."""
    return Images(images.pixels.rot90(1, (2, 3)).contiguous(), name=f"{images.name}, rotated", format="synthetic")


def flip(images: Images) -> Images:
    """The images mirrored, left to right."""
    return Images(images.pixels.flip(3), name=f"{images.name}, mirrored", format="synthetic")


def _check(count: int, channels: int, size: int, *, seed: int) -> None:
    count, channels, size = check_whole("count", count), check_whole("channels", channels), check_whole("size", size)
    check_memory(f"a set of {count:,} images", count * channels * size**2, torch.device("cpu"))
    check_seed(seed)


def _draws(shape: tuple[int, ...], address: _Address, seed: int, first: int = 0) -> Tensor:
    """Uniforms in (0, 1]; the first dimension counts images from number `first` on."""
    return uniform(shape, seed=seed, step=address, stream=rng.Stream.INITIAL, chain_ids=first)


def _bytes(draws: Tensor) -> Tensor:
    return draws.mul(256).clamp(max=255).to(torch.uint8)
