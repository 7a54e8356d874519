"""Image sets in memory, and the conversion between bytes and floats."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fastebm.data import Images, to_float, to_pixels

ALL = torch.arange(256, dtype=torch.uint8)


def test_floats_of_bytes() -> None:
    floats = to_float(ALL)
    assert floats.dtype == torch.float32
    assert (floats[0], floats[255]) == (-1, 1)
    assert torch.equal(floats.flip(0), -floats)
    assert (floats.double() - (ALL.double() / 127.5 - 1)).abs().max() < 2**-23
    assert (floats.diff() > 0).all()


def test_bytes_of_floats() -> None:
    assert torch.equal(to_pixels(to_float(ALL)), ALL)
    assert to_pixels(torch.tensor([-1.5, -0.997, 0.0, 0.9999, 7.0])).tolist() == [0, 0, 128, 255, 255]


def images(count: int = 6) -> Images:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, 4, 4), dtype=torch.uint8, generator=generator)
    return Images(pixels, torch.arange(count), "set", "made up", "train")


def test_batches() -> None:
    data = images()
    assert (len(data), data.channels, data.size) == (6, 3, 4)
    indices = torch.tensor([4, 0, 4])
    assert torch.equal(data.batch(indices), to_float(data.pixels[indices]))
    assert torch.equal(data.batch(slice(2, 4)), to_float(data.pixels[2:4]))
    assert data.batch(indices, "meta").device.type == "meta"
    assert torch.equal(data.to("cpu").pixels, data.pixels)


def test_is_frozen_and_checked() -> None:
    data = images()
    with pytest.raises(dataclasses.FrozenInstanceError):
        data.pixels = data.pixels
    for pixels in (data.pixels.float(), data.pixels[0], data.pixels[:0], data.pixels[:, :, :0]):
        with pytest.raises(ValueError, match=r"pixels must be uint8 \(N, C, H, W\)"):
            Images(pixels)
    for labels in (torch.arange(5), torch.arange(6).float(), torch.zeros(6, 1, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"labels must be int64 \(6,\)"):
            Images(data.pixels, labels)


def test_labels_are_class_numbers_or_minus_one() -> None:
    pixels = images().pixels
    for good in ([0, 1, 2, 0, 1, 2], [-1] * 6, [90_000, 0, 1, 2, 3, -1]):
        assert Images(pixels, torch.tensor(good)).labels.tolist() == good
    with pytest.raises(ValueError, match="made: the label -2 is below -1"):
        Images(pixels, torch.tensor([0, 1, -2, 0, 0, 0]), "made")
    with pytest.raises(ValueError, match=r"labels must be int64 \(6,\)"):
        Images(pixels, torch.tensor([0.5] * 6))
    with pytest.raises(ValueError, match="made: the label 2 has no name; there are 2 classes, numbered from 0"):
        Images(pixels, torch.tensor([0, 1, 2, 0, 0, -1]), "made", classes=("cat", "dog"))
    assert Images(pixels, torch.tensor([0, 1, 1, 0, 0, -1]), classes=("cat", "dog")).to("meta").labels.is_meta


def test_repr() -> None:
    assert repr(images()) == "set, train: made up: 6 images of 3x4x4, labels, 0.0 MiB"
    assert repr(Images(torch.zeros(2**10, 1, 64, 64, dtype=torch.uint8))) == (
        "images: tensor: 1,024 images of 1x64x64, 4.0 MiB"
    )
