"""Folders of pictures: order, classes and splits, orientation, transparency, and decompression bombs."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastebm.data import DataError, open_images
from fastebm.data.formats.pictures import read_picture
from tests.data.image_files import noise


def save(path: Path, pixels: np.ndarray, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def test_sizes_that_differ_need_a_size(tmp_path: Path) -> None:
    save(tmp_path / "a.png", noise(0, 8, 10, 3))
    save(tmp_path / "b" / "c.png", noise(1, 9, 8, 3))
    with pytest.raises(DataError, match=r"differ in size, a\.png is 8x10 and b.c\.png is 9x8: give a size"):
        open_images(tmp_path)
    images = open_images(tmp_path, size=4)
    assert (images.pixels.shape, images.labels) == ((2, 3, 4, 4), None)
    assert open_images(tmp_path, crop=7).pixels.shape == (2, 3, 7, 7)
    assert open_images(tmp_path, size=16, fit="pad").pixels.shape == (2, 3, 16, 16)
    with pytest.raises(DataError, match=r"a\.png: an image of 8x10 is too small for a crop of 9x9"):
        open_images(tmp_path, crop=9)


def test_not_square_without_a_size(tmp_path: Path) -> None:
    save(tmp_path / "a.png", noise(0, 8, 10, 3))
    images = open_images(tmp_path)
    assert images.pixels.shape == (1, 3, 8, 10)
    with pytest.raises(ValueError, match="8x10, not square: give a size"):
        _ = images.size


def test_grey_if_all_are(tmp_path: Path) -> None:
    grey = noise(0, 8, 8)
    save(tmp_path / "a.png", grey)
    assert np.array_equal(open_images(tmp_path).pixels[0, 0].numpy(), grey)
    save(tmp_path / "b.png", noise(1, 8, 8, 3))
    images = open_images(tmp_path)
    assert np.array_equal(images.pixels[0].numpy(), np.stack([grey] * 3))


def test_order_is_that_of_paths(tmp_path: Path) -> None:
    for number, name in enumerate(("b/z.png", "b/a/y.png", "a.PNG", "c.png", "B.png")):
        save(tmp_path / name, np.full((2, 2), number, np.uint8))
    assert open_images(tmp_path).pixels[:, 0, 0, 0].tolist() == [4, 2, 1, 0, 3]


def test_classes_are_the_folders_of_the_top(tmp_path: Path) -> None:
    for name in ("cats/a.png", "cats/deep/er/b.png", "dogs/c.png"):
        save(tmp_path / name, noise(0, 4, 4))
    images = open_images(tmp_path)
    assert (images.labels.tolist(), images.classes) == ([0, 0, 1], ("cats", "dogs"))
    assert open_images(tmp_path / "cats").labels is None
    save(tmp_path / "stray.png", noise(0, 4, 4))
    assert open_images(tmp_path).labels is None


def test_splits_are_folders(tmp_path: Path) -> None:
    for name in ("train/a/1.png", "train/b/2.png", "test/a/3.png"):
        save(tmp_path / name, noise(0, 4, 4))
    images = open_images(tmp_path)
    assert (images.split, images.labels.tolist(), images.classes) == ("train", [0, 1], ("a", "b"))
    assert len(open_images(tmp_path, split="test")) == 1
    with pytest.raises(DataError, match="no split 'val'; it has test, train"):
        open_images(tmp_path, split="val")
    save(tmp_path / "cars" / "4.png", noise(0, 4, 4))  # and now `train` is a kind of vehicle
    images = open_images(tmp_path)
    assert (len(images), images.split, images.classes) == (4, "", ("cars", "test", "train"))


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    save(tmp_path / "elsewhere" / "a.png", noise(0, 4, 4))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "cats").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "round").symlink_to(tmp_path / "elsewhere")
    assert len(open_images(tmp_path / "set")) == 1
    (tmp_path / "set" / "b.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(DataError, match=r"b\.png: is no file"):
        open_images(tmp_path / "set")


# Pictures -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "webp", "gif", "pgm"])
def test_lossless_formats(suffix: str, tmp_path: Path) -> None:
    grey = noise(0, 6, 5)
    path = save(tmp_path / f"a.{suffix}", grey, **({"lossless": True} if suffix == "webp" else {}))
    assert np.array_equal(read_picture(path, 1)[0, 0], grey)


def test_jpeg_is_near(tmp_path: Path) -> None:
    ramp = np.broadcast_to(np.arange(0, 256, 4, dtype=np.uint8)[:, None], (64, 64))
    path = save(tmp_path / "a.jpeg", ramp, quality=95)
    assert np.abs(read_picture(path, None)[0, 0].astype(int) - ramp).max() <= 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_stands_upright(orientation: int, tmp_path: Path) -> None:
    """EXIF's eight orientations: stored as the camera was held, read as it was seen."""
    seen = noise(0, 4, 6)
    stored = {
        1: seen,
        2: seen[:, ::-1],
        3: seen[::-1, ::-1],
        4: seen[::-1],
        5: seen.T,
        6: np.rot90(seen),
        7: seen.T[::-1, ::-1],
        8: np.rot90(seen, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    save(tmp_path / "a.png", np.ascontiguousarray(stored), exif=exif)
    assert np.array_equal(open_images(tmp_path).pixels[0, 0].numpy(), seen)


def test_what_is_transparent_is_white(tmp_path: Path) -> None:
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[0] = [(10, 20, 30, 255), (10, 20, 30, 0)]
    pixels[1] = [(0, 0, 0, 128), (255, 0, 0, 255)]
    path = save(tmp_path / "a.png", pixels)
    expected = [[(10, 20, 30), (255, 255, 255)], [(127, 127, 127), (255, 0, 0)]]
    assert np.array_equal(read_picture(path, None)[0].transpose(1, 2, 0), expected)
    image = Image.new("P", (1, 1))
    image.putpalette([9, 9, 9])
    image.save(tmp_path / "p.png", transparency=0)
    assert (read_picture(tmp_path / "p.png", None) == 255).all()
    save(tmp_path / "la.png", np.array([[[7, 0], [7, 255]]], np.uint8))
    assert read_picture(tmp_path / "la.png", None).tolist() == [[[[255, 7]]]]


def test_other_modes(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([1, 2, 3, 4, 5, 6])
    image.putdata([0, 1])
    image.save(tmp_path / "p.png")
    assert read_picture(tmp_path / "p.png", None)[0, :, 0].tolist() == [[1, 4], [2, 5], [3, 6]]
    Image.new("1", (2, 1), 1).save(tmp_path / "one.png")
    assert read_picture(tmp_path / "one.png", None).tolist() == [[[[255, 255]]]]
    Image.new("CMYK", (1, 1), (0, 0, 0, 255)).save(tmp_path / "c.jpg")
    assert read_picture(tmp_path / "c.jpg", None).max() <= 2


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_deep_pictures_are_refused(dtype: type, tmp_path: Path) -> None:
    path = save(tmp_path / "deep.tiff", np.zeros((2, 2), dtype))
    with pytest.raises(DataError, match=r"deep\.tiff: has more than 8 bits per channel"):
        read_picture(path, None)


def test_of_several_pictures_in_a_file_the_first(tmp_path: Path) -> None:
    frames = [Image.fromarray(np.full((2, 2), value, np.uint8)) for value in (10, 200)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert (read_picture(tmp_path / "a.gif", 1) == 10).all()


def png(width: int, height: int, content: bytes) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(content)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


@pytest.mark.parametrize(("width", "height"), [(10_001, 10_000), (13_000, 13_000), (2**31 - 1, 2**31 - 1), (2**31, 1)])
def test_bombs_are_refused_by_their_header(width: int, height: int, tmp_path: Path) -> None:
    (tmp_path / "bomb.png").write_bytes(png(width, height, b"\0" * 1000))
    with pytest.raises(DataError, match=r"bomb\.png: .*(decompression bomb|dimensions|too large|invalid|no picture)"):
        open_images(tmp_path, size=8)


def test_formats_that_run_programs_are_not_tried(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "EPS")
    (tmp_path / "a.png").write_bytes(buffer.getvalue())
    with pytest.raises(DataError, match=r"a\.png: is no picture that can be read"):
        open_images(tmp_path)


def test_damaged_metadata_do_not_spoil_a_picture(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jpg", noise(0, 8, 8), exif=b"Exif\0\0MM\0*\xff\xff\xff\xff" + b"\xff" * 20)
    assert read_picture(path, None).shape == (1, 1, 8, 8)


def test_same_as_torch_sees(tmp_path: Path) -> None:
    pixels = noise(0, 3, 5, 5, 3)
    for number, image in enumerate(pixels):
        save(tmp_path / f"{number}.png", image)
    assert torch.equal(open_images(tmp_path).pixels, torch.from_numpy(pixels).permute(0, 3, 1, 2))
