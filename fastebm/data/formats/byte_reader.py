"""A forward-only byte reader with limits: truncated files and decompression bombs become errors with the file name."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastebm.data.errors import DataError, raise_as_data_error

MAX_BYTES = 2**34
"""The default limit of an image set in memory, in bytes: four times ImageNet at 32x32."""

MAX_PIXELS = 10**8
"""The default limit of a single picture: 10,000 x 10,000 pixels, a third of a gigabyte in colour."""

# Deflate expands repetitions by up to 1,032 and LZMA by up to 7,000; real images stay below 100.
MAX_EXPANSION = 256
FREE_EXPANSION = 2**26

PIECE = 2**20  # bytes per read: large compared with a call's cost, small compared with an image set


def check_expansion(name: str, packed: int, unpacked: int) -> None:
    """Raises DataError if `packed` bytes expand to over 64 MiB and by over 256 times, as no images do."""
    if unpacked > max(FREE_EXPANSION, MAX_EXPANSION * packed):
        raise DataError(
            f"{name}: {packed:,} compressed bytes unpack to {unpacked:,} or more, over {MAX_EXPANSION} times as many: "
            "refused as a decompression bomb"
        )


_OTHER_CONTENT = (
    (b"<!doctype", "is a web page, not the file it should be: download it again"),
    (b"<html", "is a web page, not the file it should be: download it again"),
    (b"<?xml", "is XML, perhaps the error message of a server: download it again"),
    (b"version https://git-lfs", "is a pointer of Git LFS: fetch the file itself (git lfs pull)"),
    (b"bzh", "is packed by bzip2: unpack it first"),
    (b"\xfd7zxz", "is packed by xz: unpack it first"),
    (b"\x28\xb5\x2f\xfd", "is packed by Zstandard: unpack it first"),
    (b"7z\xbc\xaf", "is packed by 7-Zip: unpack it first"),
    (b"rar!", "is packed by RAR: unpack it first"),
    (b"\x89hdf", "is HDF5, which is not read: save the images as .npz"),
    (b"par1", "is Parquet, which is not read: load it with Hugging Face's datasets and give the data set"),
)
"""Beginnings of files that are given by mistake, in lower case, and what they are."""


def name_content(beginning: bytes) -> str | None:
    """What a file with this (unpacked) beginning is and what to do about it; None unless it is of a known kind."""
    text = beginning.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    return next((what for start, what in _OTHER_CONTENT if text.startswith(start)), None)


def check_pixels(name: str, width: int, height: int, max_pixels: int) -> None:
    """Raises DataError for a picture of no pixels, or of more than `max_pixels`."""
    if width * height < 1:
        raise DataError(f"{name}: a picture of {width}x{height} has no pixels")
    if width * height > max_pixels:
        raise DataError(
            f"{name}: {width}x{height} are more than max_pixels = {max_pixels:,} pixels: refused as a decompression "
            "bomb. If it is none, make the picture smaller, or open it from Python with a larger max_pixels"
        )


class ByteReader:
    """Reads forward from a source and raises DataError for whatever it cannot deliver.

    Args:
        name: the name of the file or member, for messages.
        source: a function like `file.read`, which returns up to n bytes, and b"" at the end.
        size: the number of bytes of the source, or None if only its end shows it.
        packed: the size of the compressed file if `source` unpacks one; it bounds what may come out.

    Attributes:
        name, size: as given.
        position: the number of bytes read so far.
    """

    def __init__(self, name: str, source: Callable[[int], bytes], size: int | None, packed: int | None = None) -> None:
        self.name = name
        self.size = size
        self.position = 0
        self._source = source
        self._packed = packed

    def read1(self, count: int) -> bytes:
        """Between 1 and `count` bytes, or b"" at the end."""
        with raise_as_data_error(self.name, f"damaged after {self.position:,} bytes"):
            piece = self._source(min(count, PIECE))
        self.position += len(piece)
        if self._packed is not None:
            check_expansion(self.name, self._packed, self.position)
        return piece

    def read(self, count: int) -> bytes:
        """Exactly `count` bytes. Memory grows with the bytes that arrive, not with `count`."""
        content = bytearray()
        while len(content) < count:
            piece = self.read1(count - len(content))
            if not piece:
                missing = count - len(content)
                raise DataError(f"{self.name}: ends after {self.position:,} bytes, at least {missing:,} are missing")
            content += piece
        return bytes(content)

    def read_all(self, limit: int) -> bytes:
        """All bytes of a source of known size, of which at most `limit` are accepted."""
        if self.size is None or self.size > limit:
            raise DataError(f"{self.name}: has more than {limit:,} bytes, the limit for such a file")
        return self.read(self.size)

    def read_rows(self, count: int, width: int) -> Iterator[NDArray[np.uint8]]:
        """`count` rows of `width` bytes, an image or record each, as uint8 (k, width) arrays of about 1 MiB."""
        if width < 1:
            raise DataError(f"{self.name}: has images without pixels")
        step = max(1, PIECE // width)
        for first in range(0, count, step):
            k = min(step, count - first)
            yield np.frombuffer(self.read(k * width), dtype=np.uint8).reshape(k, width)

    def skip(self, count: int) -> None:
        """Reads `count` bytes and drops them."""
        while count:
            count -= len(self.read(min(count, PIECE)))

    def check_remaining(self, count: int) -> None:
        """Raises DataError if `count` more bytes cannot follow; call it before allocating memory for them."""
        end = self.position + count
        if self.size is not None and end > self.size:
            raise DataError(f"{self.name}: has {self.size:,} bytes, {end:,} are needed")
        if self._packed is not None:
            check_expansion(self.name, self._packed, end)

    def check_end(self) -> None:
        """Raises DataError if anything follows. Reading the end also makes compressed files verify their checksum."""
        if self.read1(1):
            raise DataError(f"{self.name}: more follows after the {self.position - 1:,} bytes that belong there")


@contextmanager
def open_bytes(path: str | os.PathLike[str], unpack: bool = True) -> Iterator[ByteReader]:
    """A reader of a file; of the unpacked content if the file begins like gzip, unless `unpack` is False."""
    name = os.fspath(path)
    with raise_as_data_error(name):
        size = os.path.getsize(path)
        file = Path(path).open("rb")  # noqa: SIM115  (closed below; errors of the caller's block must pass unchanged)
    with file:
        if not (unpack and is_gzip(file.peek(2))):
            yield ByteReader(name, file.read, size)
            return
        with gzip.GzipFile(fileobj=file) as unpacked:
            yield ByteReader(name, unpacked.read, None, packed=size)


def is_gzip(beginning: bytes) -> bool:
    """Whether a file with this beginning is gzipped."""
    return beginning[:2] == b"\x1f\x8b"
