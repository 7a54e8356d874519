"""Channels, crop and size of images, compared exactly with Pillow and numpy where possible."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image

from fastebm.data import DataError
from fastebm.data.preprocessing import Preprocessing
from tests.data.image_files import noise


def test_leaves_images_as_they_are() -> None:
    images = noise(0, 3, 3, 5, 7)
    assert Preprocessing().apply("s", images) is images
    assert np.array_equal(Preprocessing(size=5, channels=3).apply("s", images), images[:, :, :, 1:6])


def test_grey_is_that_of_pillow() -> None:
    images = noise(0, 4, 3, 32, 32)
    grey = [np.asarray(Image.fromarray(image.transpose(1, 2, 0)).convert("L")) for image in images]
    assert np.array_equal(Preprocessing(channels=1).apply("s", images)[:, 0], grey)


def test_colour_of_grey_has_equal_channels() -> None:
    images = noise(0, 4, 1, 8, 8)
    assert np.array_equal(Preprocessing(channels=3).apply("s", images), np.concatenate([images] * 3, axis=1))


@pytest.mark.parametrize(("shape", "top", "left"), [((9, 5), 2, 0), ((5, 9), 0, 2), ((6, 5), 0, 0), ((5, 6), 0, 0)])
def test_the_largest_square_in_the_middle(shape: tuple[int, int], top: int, left: int) -> None:
    images = noise(0, 2, 1, *shape)
    assert np.array_equal(Preprocessing(size=5).apply("s", images), images[:, :, top : top + 5, left : left + 5])


def test_crop_comes_before_the_size() -> None:
    images = noise(0, 2, 3, 10, 12)
    inner = images[:, :, 2:8, 3:9]
    assert np.array_equal(Preprocessing(crop=6).apply("s", images), inner)
    means = inner.reshape(2, 3, 3, 2, 3, 2).mean((3, 5))
    assert np.array_equal(Preprocessing(crop=6, size=3).apply("s", images), means.round())
    with pytest.raises(DataError, match="s: an image of 10x12 is too small for a crop of 11x11"):
        Preprocessing(crop=11).apply("s", images)


@pytest.mark.parametrize("factor", [2, 3, 8])
def test_means_where_a_pixel_becomes_of_whole_ones(factor: int) -> None:
    images = noise(0, 2, 3, 4 * factor, 4 * factor)
    means = images.reshape(2, 3, 4, factor, 4, factor).mean((3, 5))
    assert np.array_equal(Preprocessing(size=4).apply("s", images), means.round())


def test_other_sizes_are_resampled_smoothly() -> None:
    """A ramp stays a ramp, up and down; flat images stay flat."""
    ramp = np.broadcast_to(np.linspace(0, 252, 64).round().astype(np.uint8), (1, 1, 64, 64))
    for size in (40, 100):
        resized = Preprocessing(size=size).apply("s", ramp)[0, 0].astype(int)
        assert (resized == resized[0]).all()
        assert np.abs(resized[0] - np.linspace(0, 252, size)).max() <= 4
    assert (Preprocessing(size=13).apply("s", np.full((1, 3, 8, 8), 77, np.uint8)) == 77).all()


def test_padding_changes_no_pixel() -> None:
    images = noise(0, 2, 1, 28, 27)
    padded = Preprocessing(size=32, fit="pad").apply("s", images)
    assert np.array_equal(padded[:, :, 2:30, 2:29], images)
    assert padded.sum() == images.sum()
    with pytest.raises(DataError, match="s: an image of 28x27 can't be padded to 16x16"):
        Preprocessing(size=16, fit="pad").apply("s", images)


@pytest.mark.parametrize("number", [np.int64, np.int32, np.array, torch.tensor])
def test_numbers_of_every_kind(number: Callable) -> None:
    found = Preprocessing(size=number(5), crop=number(6), channels=number(3), max_bytes=number(75))
    assert found == Preprocessing(5, 3, crop=6, max_bytes=75)
    assert all(type(value) is int for value in (found.size, found.crop, found.channels, found.max_bytes))
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        Preprocessing(size=number(0))


def test_what_is_no_whole_number() -> None:
    for wrong in (4.5, 4.0, "32", [32], torch.ones(2), np.ones(2), float("nan"), True):
        with pytest.raises(TypeError, match="crop must be an integer, got "):
            Preprocessing(crop=wrong)


def test_collects_chunks() -> None:
    images = noise(0, 7, 3, 8, 8)
    collected = Preprocessing(size=4).collect("s", 7, [images[:3], images[3:]])
    assert np.array_equal(collected.numpy(), Preprocessing(size=4).apply("s", images))
    with pytest.raises(DataError, match="s: holds 3 of 7 images"):
        Preprocessing().collect("s", 7, [images[:3]])
    with pytest.raises(DataError, match="s: holds no images"):
        Preprocessing().collect("s", 0, [])
    with pytest.raises(DataError, match="s: image 7 is 1x8x8 and the first one 3x8x8: give a size, and channels"):
        Preprocessing().collect("s", 8, [images, images[:1, :1]])
    with pytest.raises(DataError, match="s: 7 images of 3x8x8 take 1,344 bytes of memory, more than max_bytes = 1,343"):
        Preprocessing(max_bytes=1343).collect("s", 7, [images])
