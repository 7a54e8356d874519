"""PNG files checked as their format allows: every chunk has a checksum, and the header says how long the pixels are.

Pillow checks neither the chunks of pixels nor their length, and refuses a picture for a long text beside it. So the
chunks are read here, and Pillow gets only those that it needs, with the pixels unpacked: they are unpacked once.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

from fastebm.data.errors import DataError, raise_as_data_error
from fastebm.data.formats.byte_reader import check_pixels

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # per pixel, by the type of colour
_INDEXED = 3  # the type of colour whose pixels are numbers of a palette's colours
_WHOLE = ((0, 0, 1, 1),)  # first column, first row, and the steps between columns and rows
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_HOLDS_ORIENTATION = (b"Raw profile type exif", b"XML:com.adobe.xmp")
_MAX_TEXT = 2**20  # bytes that Pillow unpacks
_MAX_STORED = 2**30  # bytes; larger pixels are left packed, which takes less memory


def plain_png(name: str, content: bytes, max_pixels: int, with_pixels: bool = True) -> bytes:
    """A PNG with the picture of a PNG file: header, palette, transparency, orientation, and pixels if asked for.

    Raises DataError, with `name`, for a file that is cut short, a checksum that does not fit, pixels that are more or
    fewer than the header says, an indexed picture without a palette, and more than `max_pixels` pixels.
    """
    kept: list[bytes] = []
    packed: list[bytes] = []
    size, palette = 0, b""
    indexed = False
    for number, (kind, data) in enumerate(_chunks(name, content)):
        if (number == 0) != (kind == b"IHDR"):
            raise DataError(f"{name}: damaged picture: its header is missing or there twice")
        if kind == b"IHDR":
            size = _num_bytes(name, data, max_pixels)
            indexed = data[9] == _INDEXED
        if kind == b"PLTE":
            palette = data
        if kind == b"IDAT":
            packed.append(data)
        elif kind in (b"IHDR", b"PLTE", b"tRNS", b"eXIf") or _is_orientation(kind, data):
            kept.append(_chunk(kind, data))
    pixels = _unpacked(name, b"".join(packed), size) if with_pixels else b""
    if indexed and (not palette or len(palette) % 3):
        has = f"a palette of {len(palette):,} bytes" if palette else "no palette"
        raise DataError(
            f"{name}: damaged picture: it has {has} and its pixels are indices; 3 bytes a colour are needed"
        )
    return b"".join([SIGNATURE, *kept, _chunk(b"IDAT", pixels), _chunk(b"IEND", b"")])


def _chunks(name: str, content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(type, data) of every chunk to the last one."""
    place, kind = len(SIGNATURE), b""
    while kind != b"IEND":
        if len(content) < place + 12:
            raise DataError(f"{name}: damaged picture: it ends after {len(content):,} bytes, before its last chunk")
        length, kind = struct.unpack_from(">I4s", content, place)
        end = place + 8 + length
        if len(content) < end + 4:
            raise DataError(f"{name}: damaged picture: it ends after {len(content):,} bytes, inside of a chunk")
        typed = content[place + 4 : end]
        if content[end : end + 4] != struct.pack(">I", zlib.crc32(typed)):
            raise DataError(f"{name}: damaged picture: the checksum of the chunk at byte {place:,} does not fit")
        yield kind, typed[4:]
        place = end + 4


def _num_bytes(name: str, header: bytes, max_pixels: int) -> int:
    """The length of the unpacked pixels: for each row of each pass a byte that names its filter, and its samples."""
    with raise_as_data_error(name, "damaged picture"):
        width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", header)
        bits = depth * _SAMPLES[colour]
        passes = (_WHOLE, _ADAM7)[interlaced]
    check_pixels(name, width, height, max_pixels)
    sides = ((-((x - width) // dx), -((y - height) // dy)) for x, y, dx, dy in passes)
    return sum(rows * (1 + (columns * bits + 7) // 8) for columns, rows in sides if columns > 0 and rows > 0)


def _unpacked(name: str, packed: bytes, size: int) -> bytes:
    """A deflate stream of the pixels, stored as they are, after a check of their checksum and length."""
    inflater = zlib.decompressobj()
    with raise_as_data_error(name, "damaged picture"):
        pixels = inflater.decompress(packed, size + 1)
    if len(pixels) != size or not inflater.eof:
        has = f"more than {size:,}" if len(pixels) > size else f"{len(pixels):,} of {size:,}"
        raise DataError(f"{name}: damaged picture: it has {has} bytes of pixels{'' if inflater.eof else ' and no end'}")
    return zlib.compress(pixels, 0) if size < _MAX_STORED else packed


def _is_orientation(kind: bytes, data: bytes) -> bool:
    """Whether a chunk is text of the kinds that say how a picture is turned, short enough for Pillow."""
    keyword, _, rest = data.partition(b"\0")
    if kind not in (b"tEXt", b"zTXt", b"iTXt") or keyword not in _HOLDS_ORIENTATION:
        return False
    if kind == b"zTXt" or (kind == b"iTXt" and rest[:1] == b"\1"):
        text = rest[1:] if kind == b"zTXt" else rest[2:].split(b"\0", 2)[-1]
        inflater = zlib.decompressobj()
        try:
            inflater.decompress(text, _MAX_TEXT)
        except zlib.error:
            return False
        return inflater.eof
    return len(rest) <= _MAX_TEXT


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(data, zlib.crc32(kind)))
