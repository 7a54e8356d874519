"""`image_format` finds the channels and sides that `open_images` then returns, and `split_of` the split."""

import doctest
import gzip
import importlib
import io
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastebm.data import DataError, ImageFormat, image_format, open_images
from fastebm.data.formats.image_format import split_of


def idx(path: Path, count: int, height: int, width: int) -> Path:
    content = struct.pack(">BBBB3I", 0, 0, 8, 3, count, height, width) + bytes(count * height * width)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def cifar(path: Path) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name in (*(f"data_batch_{n}.bin" for n in range(1, 6)), "test_batch.bin"):
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = 2 * 3073
            archive.addfile(member, io.BytesIO(bytes(member.size)))
    return path


def pictures(folder: Path, *sizes: tuple[int, int], mode: str = "L") -> Path:
    folder.mkdir()
    for number, size in enumerate(sizes):
        Image.new(mode, size).save(folder / f"{number}.png")
    return folder


def test_the_format_is_that_of_the_opened_images(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x_train=np.zeros((5, 6, 7, 3), np.uint8), x_test=np.zeros((2, 4, 4), np.uint8))
    np.save(tmp_path / "a.npy", np.zeros((5, 6, 7), np.uint8))
    sources = [
        tmp_path / "a.npz",
        tmp_path / "a.npy",
        idx(tmp_path / "t10k-images-idx3-ubyte.gz", 3, 9, 8),
        idx(tmp_path / "train-images-idx3-ubyte", 3, 9, 8),
        cifar(tmp_path / "cifar.tar.gz"),
        pictures(tmp_path / "grey", (5, 6), (5, 6)),
    ]
    for source in sources:
        for crop in (None, 4):
            assert image_format(source, crop=crop) == tuple(open_images(source, crop=crop).pixels.shape[1:])
        assert split_of(source) == open_images(source).split
    assert image_format(tmp_path / "a.npz", "test") == (1, 4, 4)
    assert split_of(tmp_path / "a.npz", "test") == "test"
    assert str(image_format(tmp_path / "a.npz")) == "3x6x7"


def test_pictures_of_several_sizes_have_a_split(tmp_path: Path) -> None:
    """Nothing of them is read, so that they need no common size."""
    (tmp_path / "set").mkdir()
    for split in ("train", "test"):
        pictures(tmp_path / "set" / split, (5, 6), (6, 6))
    assert split_of(tmp_path / "set") == "train"


def test_pictures_of_several_sizes_have_channels_only(tmp_path: Path) -> None:
    assert image_format(pictures(tmp_path / "grey", (5, 6), (6, 6))) == ImageFormat(1, None, None)
    assert str(image_format(pictures(tmp_path / "colour", (5, 6), (6, 6), mode="RGB"))) == (
        "of several sizes, with 3 channels"
    )


def test_what_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for source in (tmp_path / "nowhere", tmp_path / "empty"):
        for reads in (image_format, split_of):
            with pytest.raises(DataError, match=source.name):
                reads(source)


def test_docstring_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert doctest.testmod(importlib.import_module("fastebm.data.formats.image_format")) == (0, 8)
