"""Folders of pictures: order, classes and splits, what is left out, orientation, modes, and decompression bombs."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from fastebm.data import DataError, image_format, open_images
from fastebm.data.formats.pictures import picture_to_array, read_picture, read_picture_info
from tests.data.image_files import noise, png_chunk


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
@pytest.mark.parametrize("suffix", ["png", "tif", "lzw.tif", "webp", "jpg", "avif"])
def test_stands_upright(orientation: int, suffix: str, tmp_path: Path) -> None:
    """The eight orientations: stored as the camera was held, read as it was seen, also by the headers alone."""
    lossless = suffix not in ("jpg", "avif")
    seen = noise(0, 4, 6) if lossless else np.arange(0, 240, 10, np.uint8).reshape(4, 6)
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
    options = {"webp": {"lossless": True}, "jpg": {"quality": 100}, "avif": {"quality": 100}}.get(suffix, {})
    options |= {"compression": "tiff_lzw"} if suffix == "lzw.tif" else {}
    save(tmp_path / f"a.{suffix}", np.ascontiguousarray(stored), exif=exif, **options)
    pixels = open_images(tmp_path, channels=1).pixels[0, 0].numpy()
    assert pixels.shape == seen.shape
    assert np.abs(pixels.astype(int) - seen).max() <= (0 if lossless else 4)
    assert image_format(tmp_path)[1:] == seen.shape


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


COLOUR = (200, 50, 100)
GREY = 101  # by ITU-R 601


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "P", "PA"])
def test_colours_are_the_same_in_every_mode(mode: str) -> None:
    image = Image.new("RGB", (2, 1), COLOUR)
    if mode == "LAB":
        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        image = ImageCms.profileToProfile(image, *profiles, outputMode="LAB")
    elif mode in ("P", "PA"):
        image = image.quantize().convert(mode)
    else:
        image = image.convert("RGBA").convert(mode) if mode == "RGBa" else image.convert(mode)
    for channels, expected in ((None, COLOUR), (3, COLOUR), (1, (GREY,))):
        found = picture_to_array("p", image, channels)[0, :, 0, 1].astype(int)
        assert np.abs(found - expected).max() <= 4
        assert len(found) == len(expected)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "La", "PA"])
def test_greys_are_the_same_in_every_mode(mode: str) -> None:
    image = Image.new("L", (2, 1), 255)
    image = image.convert("LA").convert(mode) if mode in ("La", "PA") else image.convert(mode)
    assert picture_to_array("p", image, None).shape[1] == (3 if mode == "PA" else 1)
    for channels in (1, 3):
        assert (picture_to_array("p", image, channels) == 255).all()


def test_a_tiff_of_lab_has_its_colours(tmp_path: Path) -> None:
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    image = Image.new("RGB", (3, 2), COLOUR)
    ImageCms.profileToProfile(image, *profiles, outputMode="LAB").save(tmp_path / "a.tif")
    pixels = open_images(tmp_path).pixels
    assert pixels.shape == (1, 3, 2, 3)
    assert np.abs(pixels[0, :, 0, 0].numpy().astype(int) - COLOUR).max() <= 2
    assert abs(int(open_images(tmp_path, channels=1).pixels[0, 0, 0, 0]) - GREY) <= 2


@pytest.mark.parametrize("mode", ["I", "F", "I;16", "I;16B"])
def test_deep_grey_is_refused(mode: str, tmp_path: Path) -> None:
    path = tmp_path / "deep.tiff"
    Image.new(mode, (2, 2)).save(path)
    for read in (read_picture_info, lambda path: read_picture(path, 3)):
        with pytest.raises(DataError, match=r"deep\.tiff: has more than 8 bits per channel"):
            read(path)


def tiff16(compression: int, samples: int) -> bytes:
    """A TIFF of 16 bits per channel, which Pillow reads as 8 but does not write."""
    pixels = np.arange(2 * 2 * samples, dtype="<u2") * 1000
    content = pixels.tobytes() if compression == 1 else zlib.compress(pixels.tobytes())
    bits = struct.pack("<H", 16) * samples
    photometric = {3: 2, 4: 5}[samples]
    entries = [(256, 3, 1, 2), (257, 3, 1, 2), (258, 3, samples, 8), (259, 3, 1, compression), (262, 3, 1, photometric)]
    entries += [(273, 4, 1, 16), (277, 3, 1, samples), (278, 3, 1, 2), (279, 4, 1, len(content))]
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(4)
    return struct.pack("<2sHI", b"II", 42, 16 + len(content)) + bits[:8].ljust(8, b"\0") + content + directory


def jpeg2000_16() -> bytes:
    """A JPEG 2000 file whose codestream says that its channels have 16 bits."""
    content = io.BytesIO()
    Image.fromarray(noise(0, 8, 8, 3)).save(content, "JPEG2000")
    changed = bytearray(content.getvalue())
    place = changed.index(b"\xff\x4f\xff\x51") + 4 + 38
    changed[place : place + 9 : 3] = bytes([15] * 3)
    return bytes(changed)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.tif", tiff16(1, 3)),
        ("a.tif", tiff16(8, 3)),
        ("a.tif", tiff16(1, 4)),
        ("a.ppm", b"P6 1 1 65535\n" + bytes(6)),
        ("a.ppm", b"P6 1 1 1023\n" + bytes(6)),
        ("a.ppm", b"P3 1 1 256\n1 2 3\n"),
        ("a.pgm", b"P5 1 1 4095\n" + bytes(2)),
        ("a.jp2", jpeg2000_16()),
    ],
)
def test_deep_colour_is_not_cut_to_eight_bits(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with Image.open(tmp_path / name) as image:
        assert image.mode in ("RGB", "CMYK", "I"), "Pillow does not refuse it"
    for read in (read_picture_info, lambda path: read_picture(path, None)):
        with pytest.raises(DataError, match=r"has more than 8 bits per channel .* convert it to 8 bits first"):
            read(tmp_path / name)


def test_fewer_than_eight_bits_become_eight(tmp_path: Path) -> None:
    (tmp_path / "a.pgm").write_bytes(b"P5 3 1 15\n" + bytes([0, 8, 15]))
    assert read_picture(tmp_path / "a.pgm", None)[0, 0, 0].tolist() == [0, 136, 255]


def test_of_several_pictures_in_a_file_the_first(tmp_path: Path) -> None:
    frames = [Image.fromarray(np.full((2, 2), value, np.uint8)) for value in (10, 200)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert (read_picture(tmp_path / "a.gif", 1) == 10).all()


def png(width: int, height: int, content: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(content)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


@pytest.mark.parametrize("suffix", ["png", "bmp", "jpg", "webp", "gif", "tif", "avif", "jp2"])
def test_the_limit_of_pixels_can_be_moved(suffix: str, tmp_path: Path) -> None:
    save(tmp_path / f"a.{suffix}", noise(0, 30, 20, 3))
    with pytest.raises(
        DataError, match=rf"a\.{suffix}: 20x30 are more than max_pixels = 599 pixels: .* a larger max_pixels"
    ):
        open_images(tmp_path, max_pixels=599)
    with pytest.raises(DataError, match="max_pixels = 599"):
        image_format(tmp_path, max_pixels=599)
    assert open_images(tmp_path, max_pixels=600).pixels.shape[2:] == (30, 20)


@pytest.mark.parametrize("suffix", ["png", "bmp", "webp", "gif", "tif"])
def test_pillows_own_limit_does_not_matter(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / f"a.{suffix}", noise(0, 30, 20, 3))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert open_images(tmp_path).pixels.shape[2:] == (30, 20)
    assert Image.MAX_IMAGE_PIXELS == 100


@pytest.mark.parametrize(("width", "height"), [(10_001, 10_000), (13_000, 13_000), (2**31 - 1, 2**31 - 1), (2**31, 1)])
def test_bombs_are_refused_by_their_header(width: int, height: int, tmp_path: Path) -> None:
    (tmp_path / "bomb.png").write_bytes(png(width, height, b"\0" * 1000))
    with pytest.raises(DataError, match=r"bomb\.png: .*(decompression bomb|dimensions|too large|invalid|no picture)"):
        open_images(tmp_path, size=8)


# What is left out, and what is damaged --------------------------------------------------------------------------------


SUFFIXES = {
    **dict.fromkeys(("jpg", "jpeg", "jpe", "jfif", "JPG"), "JPEG"),
    **dict.fromkeys(("png", "apng"), "PNG"),
    **dict.fromkeys(("jp2", "j2k", "jpx"), "JPEG2000"),
    "tif": "TIFF",
    "tiff": "TIFF",
    "dib": "DIB",
    "bmp": "BMP",
    "pnm": "PPM",
    "avif": "AVIF",
    "webp": "WEBP",
}


def test_every_usual_suffix_is_read(tmp_path: Path) -> None:
    for suffix, kind in SUFFIXES.items():
        save(tmp_path / suffix / f"a.{suffix}", noise(0, 8, 8, 3), format=kind)
    images = open_images(tmp_path)
    assert images.classes == tuple(sorted(SUFFIXES))
    assert images.labels.tolist() == list(range(len(SUFFIXES)))


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    save(tmp_path / "a.png", noise(0, 8, 8, 3))
    for name in ("b.heic", "c.heic", "d.raw", "README", ".hidden", "Thumbs.db", "desktop.ini", ".DS_Store", "._a.png"):
        (tmp_path / name).write_bytes(b"?")
    with pytest.warns(UserWarning, match=r"read 1 picture; 4 other files are left out \(2 \.heic, ") as said:
        assert len(open_images(tmp_path)) == 1
    assert len(said) == 1
    (tmp_path / "a.png").unlink()
    with pytest.raises(
        DataError, match=r"no pictures in it; 4 other files are left out \(2 \.heic, 1 \.raw, 1 without suffix\)$"
    ):
        open_images(tmp_path)


def test_nothing_is_said_where_nothing_is_left_out(tmp_path: Path) -> None:
    save(tmp_path / "a.png", noise(0, 8, 8, 3))
    for name in (".DS_Store", "labels.CSV", "numbers.json", "readme.md"):
        (tmp_path / name).write_bytes(b"?")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_images(tmp_path)


@pytest.mark.parametrize("content", [None, "a.heic", "a.raw"])
def test_a_class_without_pictures_is_an_error(content: str | None, tmp_path: Path) -> None:
    for name in ("cat", "owl"):
        save(tmp_path / name / "a.png", noise(0, 8, 8, 3))
    (tmp_path / "dog").mkdir()
    if content:
        (tmp_path / "dog" / content).write_bytes(b"?")
    with pytest.raises(
        DataError, match=r"dog: has no pictures that can be read, but the folders beside it are classes"
    ):
        open_images(tmp_path)
    (tmp_path / "dog" / "b.png").write_bytes((tmp_path / "cat" / "a.png").read_bytes())
    with pytest.warns(UserWarning, match="1 other file") if content else nullcontext():
        assert open_images(tmp_path).classes == ("cat", "dog", "owl")


def test_what_desktops_leave_in_folders(tmp_path: Path) -> None:
    """A folder that was packed and unpacked by a desktop: in a folder of its own, with more beside it."""
    for name in ("cat", "dog"):
        save(tmp_path / "out" / "pets" / "train" / name / "a.png", noise(0, 8, 8, 3))
        (tmp_path / "out" / "__MACOSX" / "pets" / "train" / name).mkdir(parents=True)
        (tmp_path / "out" / "__MACOSX" / "pets" / "train" / name / "._a.png").write_bytes(b"?")
        (tmp_path / "out" / "pets" / "train" / name / ".DS_Store").write_bytes(b"?")
        (tmp_path / "out" / "pets" / "train" / name / "Thumbs.db").write_bytes(b"?")
    images = open_images(tmp_path / "out")
    assert (images.split, images.classes, images.name) == ("train", ("cat", "dog"), str(tmp_path / "out" / "pets"))


def test_every_damaged_picture_is_listed(tmp_path: Path) -> None:
    for number in range(30):
        save(tmp_path / f"{number:02}.png", noise(number, 8, 8, 3))
    for number in range(0, 24, 2):
        path = tmp_path / f"{number:02}.png"
        content = bytearray(path.read_bytes())
        content[-20] ^= 1  # in the pixels, which the header says nothing about
        path.write_bytes(content)
    (tmp_path / "04.png").write_bytes(b"")
    (tmp_path / "06.png").write_text("<!DOCTYPE html><html>")
    for options in ({}, {"size": 4, "channels": 1}):
        with pytest.raises(DataError, match=r"12 of 30 pictures cannot be read: 00\.png: damaged picture: ") as caught:
            open_images(tmp_path, **options)
        message = str(caught.value)
        assert "; 04.png: is no picture that can be read" in message
        assert "; 06.png: is a web page, not the file it should be" in message
        assert message.endswith("; and 2 more")
        assert "18.png" in message
        assert "20.png" not in message
        assert "\n" not in message


def test_a_link_to_itself(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    save(tmp_path / "a.png", noise(0, 8, 8))
    with pytest.warns(UserWarning, match="1 other file is left out"):
        assert len(open_images(tmp_path)) == 1
    with pytest.raises(DataError, match=r"loop: cannot be read: .*symbolic links"):
        open_images(tmp_path / "loop")


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
