"""Where samples and real images come from."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fastebm.data import DataError, average_pool_to, digits, to_pixels
from fastebm.evaluation.sources import holds_statistics, open_real, read_samples
from fastebm.training import DigitsSource, ImageSource


def test_float_samples_stay_as_they_are(tmp_path: Path) -> None:
    floats = torch.rand(5, 3, 4, 4) * 2 - 1
    for dtype in (np.float32, np.float64):
        np.savez(tmp_path / "a.npz", images=floats.numpy().astype(dtype))
        assert torch.equal(read_samples(tmp_path / "a.npz"), floats)


def test_bytes_are_read_as_images(tmp_path: Path) -> None:
    pixels = np.arange(2 * 4 * 4, dtype=np.uint8).reshape(2, 4, 4)
    np.savez(tmp_path / "a.npz", images=pixels)
    assert torch.equal(to_pixels(read_samples(tmp_path / "a.npz"))[:, 0], torch.from_numpy(pixels))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 1, 4, 5), np.float32), "samples must be"),
        (np.zeros((2, 2, 4, 4), np.float32), "no axis of 1 or 3 channels"),
        (np.zeros((0, 1, 4, 4), np.float32), "samples must be"),
        (np.full((2, 1, 4, 4), np.nan, np.float32), "finite"),
        (np.full((2, 1, 4, 4), -1.01, np.float32), r"lie in \[-1, 1\]"),
        (np.zeros((2, 4, 6), np.uint8), "samples must be"),
    ],
)
def test_wrong_samples_are_refused(tmp_path: Path, array: np.ndarray, message: str) -> None:
    np.savez(tmp_path / "a.npz", images=array)
    with pytest.raises(ValueError, match=message):
        read_samples(tmp_path / "a.npz")


def test_what_is_no_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(b"PK nothing")
    with pytest.raises(DataError, match=r"a\.npz"):
        read_samples(tmp_path / "a.npz")


def test_statistics_are_told_from_images(tmp_path: Path) -> None:
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(2), sigma=np.eye(2))
    np.savez(tmp_path / "images.npz", x_train=np.zeros((2, 4, 4), np.uint8))
    (tmp_path / "text.npz").write_text("none")
    assert [holds_statistics(tmp_path / f"{name}.npz") for name in ("statistics", "images", "text")] == [
        True,
        False,
        False,
    ]


def test_real_images_are_averaged_down_with_their_test_split(tmp_path: Path) -> None:
    real = open_real(DigitsSource(), 4)
    assert real.test is not None
    images, labels = digits("test")
    whole = open_real(DigitsSource(), 8).test
    assert whole is not None
    assert torch.equal(whole.pixels, to_pixels(images))
    assert torch.equal(real.test.pixels, to_pixels(average_pool_to(whole.batch(slice(None)), 4)))
    assert torch.equal(real.test.labels, labels)

    np.savez(tmp_path / "a.npz", x_train=np.full((6, 8, 8), 7, np.uint8), x_test=np.full((3, 8, 8), 9, np.uint8))
    real = open_real(ImageSource(tmp_path / "a.npz", 8), 8)
    assert (len(real.train), real.test and len(real.test)) == (6, 3)
    assert open_real(ImageSource(tmp_path / "a.npz", 8, split="test"), 8).test is None
    with pytest.raises(ValueError, match="smaller than 16x16"):
        open_real(ImageSource(tmp_path / "a.npz", 8), 16)
