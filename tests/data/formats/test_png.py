"""PNG: no bit may flip unnoticed, no row may be missing, and metadata do not matter but for the orientation."""

from __future__ import annotations

import io
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from fastebm.data import DataError, open_images
from fastebm.data.formats.pictures import read_picture, read_picture_info
from tests.data.image_files import noise, png_chunk

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def saved(pixels: np.ndarray, **options) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG", **options)
    return content.getvalue()


def made(width: int, height: int, rows: bytes, *, depth: int = 8, colour: int = 0, interlaced: int = 0) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    chunks = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
    return SIGNATURE + chunks


def written(folder: Path, content: bytes) -> Path:
    (folder / "a.png").write_bytes(content)
    return folder / "a.png"


def test_a_flipped_bit_is_refused_wherever_it_is(tmp_path: Path) -> None:
    pixels = noise(0, 24, 24, 3)
    content = saved(pixels)
    draw = random.Random(1)
    for _ in range(300):
        place = draw.randrange(len(content))
        changed = bytearray(content)
        changed[place] ^= 1 << draw.randrange(8)
        with pytest.raises(DataError, match=r"a\.png: "):
            read_picture(written(tmp_path, bytes(changed)), 3)
    assert np.array_equal(read_picture(written(tmp_path, content), 3)[0].transpose(1, 2, 0), pixels)


@pytest.mark.parametrize("length", [0, 7, 8, 20, 40, -20, -12, -4, -1])
def test_cut_short(length: int, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.png: "):
        read_picture(written(tmp_path, saved(noise(0, 9, 9))[:length]), None)


@pytest.mark.parametrize(
    ("rows", "saying"),
    [
        (bytes(3 * 9), "it has 27 of 72 bytes of pixels"),
        (bytes(7 * 9 + 8), "it has 71 of 72 bytes"),
        (bytes(8 * 9 + 1), "it has more than 72 bytes"),
        (b"", "it has 0 of 72 bytes"),
    ],
)
def test_rows_are_as_many_as_the_header_says(rows: bytes, saying: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"damaged picture: {saying}"):
        read_picture(written(tmp_path, made(8, 8, rows)), None)
    assert read_picture(written(tmp_path, made(8, 8, bytes(72))), None).shape == (1, 1, 8, 8)


def test_pixels_without_their_checksum(tmp_path: Path) -> None:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 2, 8, 0, 0, 0, 0))
    packed = zlib.compress(bytes(6))
    for damaged in (packed[:-4], packed[:-1] + b"\0"):
        content = SIGNATURE + header + png_chunk(b"IDAT", damaged) + png_chunk(b"IEND", b"")
        with pytest.raises(DataError, match="damaged picture"):
            read_picture(written(tmp_path, content), None)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 5), (8, 8), (9, 13), (3, 20)])
@pytest.mark.parametrize(("depth", "colour"), [(8, 0), (8, 2), (8, 6), (1, 0), (4, 3)])
def test_interlaced_pictures_have_seven_passes(size: tuple[int, int], depth: int, colour: int, tmp_path: Path) -> None:
    """The passes of Adam7 as the specification lists them, written here pixel by pixel."""
    height, width = size
    samples = {0: 1, 2: 3, 6: 4, 3: 1}[colour]
    values = noise(0, height, width, samples) >> (8 - depth)
    rows = b""
    pattern = ("16462646", "77777777", "56565656", "77777777", "36463646", "77777777", "56565656", "77777777")
    for number in "1234567":
        for row in range(height):
            inside = [values[row, column] for column in range(width) if pattern[row % 8][column % 8] == number]
            if inside:
                bits = np.unpackbits(np.concatenate(inside)).reshape(-1, 8)[:, 8 - depth :]
                rows += b"\0" + np.packbits(bits.ravel()).tobytes()
    content = made(width, height, rows, depth=depth, colour=colour, interlaced=1)
    if colour == 3:
        palette = png_chunk(b"PLTE", bytes(range(48)))
        content = content[:33] + palette + content[33:]
    with Image.open(io.BytesIO(content)) as image:
        stored = np.asarray(image).reshape(height, width, samples)
    assert np.array_equal(stored, values.astype(bool) if depth == 1 else values), "made as Pillow reads it"
    read = read_picture(written(tmp_path, content), None)[0].transpose(1, 2, 0)
    if (depth, colour) in ((8, 0), (8, 2)):
        assert np.array_equal(read, values)
    elif depth == 1:
        assert np.array_equal(read, 255 * values)
    with pytest.raises(DataError, match="bytes of pixels"):
        read_picture(written(tmp_path, made(width, height, rows[:-1], depth=depth, colour=colour, interlaced=1)), None)


def test_long_texts_are_not_read(tmp_path: Path) -> None:
    pixels, text = noise(0, 8, 8, 3), PngImagePlugin.PngInfo()
    text.add_text("workflow", "a" * 2**21, zip=True)
    text.add_itxt("XML:com.adobe.xmp", "a" * 2**21, zip=True)
    written(tmp_path, saved(pixels, pnginfo=text))
    assert np.array_equal(open_images(tmp_path).pixels[0].numpy(), pixels.transpose(2, 0, 1))


XMP = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["XMP", "raw EXIF"])
def test_the_orientation_may_be_in_a_text(kind: str, packed: bool, tmp_path: Path) -> None:
    text = PngImagePlugin.PngInfo()
    if kind == "XMP":
        text.add_itxt("XML:com.adobe.xmp", XMP, zip=packed)
    else:
        exif = Image.Exif()
        exif[0x0112] = 6
        raw = exif.tobytes()
        text.add_text("Raw profile type exif", f"\nexif\n{len(raw):8}\n{raw.hex()}\n", zip=packed)
    pixels = noise(0, 4, 6)
    path = written(tmp_path, saved(pixels, pnginfo=text))
    assert np.array_equal(read_picture(path, None)[0, 0], np.rot90(pixels, -1))
    info = read_picture_info(path)
    assert (info.height, info.width) == (6, 4)


def test_of_an_animation_the_still_picture(tmp_path: Path) -> None:
    frames = [Image.fromarray(noise(seed, 6, 6, 3)) for seed in range(3)]
    frames[0].save(tmp_path / "a.apng", format="PNG", save_all=True, append_images=frames[1:])
    assert np.array_equal(open_images(tmp_path).pixels[0].numpy(), noise(0, 6, 6, 3).transpose(2, 0, 1))
    content = (tmp_path / "a.apng").read_bytes()
    place = content.rindex(b"fdAT") + 30  # in the last frame, which is not read
    (tmp_path / "a.apng").write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    with pytest.raises(DataError, match=r"a\.apng: damaged picture: the checksum of the chunk at byte"):
        open_images(tmp_path)


@pytest.mark.parametrize(("colour", "samples"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_sixteen_bits_are_refused(colour: int, samples: int, tmp_path: Path) -> None:
    path = written(tmp_path, made(3, 2, (b"\0" + bytes(3 * samples * 2)) * 2, depth=16, colour=colour))
    for read in (read_picture_info, lambda path: read_picture(path, 3)):
        with pytest.raises(DataError, match=r"a\.png: has more than 8 bits per channel"):
            read(path)


def indexed(depth: int, index: int, palette: bytes | None, interlaced: int = 0) -> bytes:
    """Two pixels, one above the other, of which the second has `index`."""
    rows = bytes([0, 0, 0, index << (8 - depth)])
    content = made(1, 2, rows, depth=depth, colour=3, interlaced=interlaced)
    return content if palette is None else content[:33] + png_chunk(b"PLTE", palette) + content[33:]


@pytest.mark.parametrize(
    ("palette", "saying"),
    [(None, "it has no palette"), (b"", "it has no palette"), (bytes(4), "it has a palette of 4 bytes")],
)
def test_indices_need_a_palette(palette: bytes | None, saying: str, tmp_path: Path) -> None:
    path = written(tmp_path, indexed(8, 0, palette))
    for read in (read_picture_info, lambda path: read_picture(path, 3)):
        with pytest.raises(DataError, match=rf"a\.png: damaged picture: {saying}"):
            read(path)


@pytest.mark.parametrize("interlaced", [0, 1])
@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_indices_beyond_the_palette_are_refused(depth: int, interlaced: int, tmp_path: Path) -> None:
    last = 2**depth - 1
    content = indexed(depth, last, bytes([7, 8, 9] * last), interlaced)
    with pytest.raises(DataError, match=rf"a\.png: damaged picture: it has the index {last} and a palette of {last} "):
        read_picture(written(tmp_path, content), 3)
    with Image.open(io.BytesIO(content)) as picture, pytest.raises(DataError, match="it has the index"):
        open_images([picture])
    whole = read_picture(written(tmp_path, indexed(depth, last, bytes([7, 8, 9] * (last + 1)), interlaced)), 3)
    assert whole.ravel().tolist() == [7, 7, 8, 8, 9, 9]


def test_nonsense_in_the_header(tmp_path: Path) -> None:
    for content in (
        made(0, 8, b""),
        made(8, 8, bytes(72), depth=7),
        made(8, 8, bytes(72), colour=5),
        made(8, 8, bytes(72), interlaced=2),
        SIGNATURE + png_chunk(b"IDAT", b"") + png_chunk(b"IEND", b""),
        SIGNATURE + png_chunk(b"IHDR", b"1") + png_chunk(b"IEND", b""),
        SIGNATURE + png_chunk(b"IEND", b""),
    ):
        for read in (read_picture_info, lambda path: read_picture(path, None)):
            with pytest.raises(DataError, match=r"a\.png: "):
                read(written(tmp_path, content))
