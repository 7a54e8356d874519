"""Bytes of a file in order: counted, limited, and with every early, late or endless end an error with its name."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastebm.data.errors import DataError, explaining

MAX_BYTES = 2**34
"""How many bytes of pixels are kept in memory unless the caller raises it: all of ImageNet-32 four times over."""

MAX_PIXELS = 10**8
"""The largest single picture that is decoded: 10,000 x 10,000, a third of a gigabyte in colour."""

# Deflate reaches a factor of 1,032 and LZMA 7,000, on nothing but repetitions; real images of any kind stay below 100.
MAX_EXPANSION = 256
FREE_EXPANSION = 2**26

PIECE = 2**20  # read at once: large beside a call's cost, small beside any image set


def check_expansion(name: str, packed: int, unpacked: int) -> None:
    """Raises DataError where `packed` bytes claim to hold more than images ever do. Up to 64 MiB nothing is said."""
    if unpacked > max(FREE_EXPANSION, MAX_EXPANSION * packed):
        raise DataError(
            f"{name}: {packed:,} compressed bytes unpack to {unpacked:,} or more, over {MAX_EXPANSION} times as many: "
            "refused as a decompression bomb"
        )


class ByteReader:
    """Reads forward from `source`, a function that gives up to n bytes and b"" at the end.

    Attributes:
        name: of what is read, for messages.
        size: the number of bytes that are there, or None where only the end shows it.
        position: the number of bytes read so far.
    """

    def __init__(self, name: str, source: Callable[[int], bytes], size: int | None, packed: int | None = None) -> None:
        """`packed` is the size of the compressed file, where `source` unpacks one: it bounds what may come out."""
        self.name = name
        self.size = size
        self.position = 0
        self._source = source
        self._packed = packed

    def some(self, count: int) -> bytes:
        """Between 1 and `count` bytes, or b"" at the end."""
        with explaining(self.name, f"damaged after {self.position:,} bytes"):
            piece = self._source(min(count, PIECE))
        self.position += len(piece)
        if self._packed is not None:
            check_expansion(self.name, self._packed, self.position)
        return piece

    def read(self, count: int) -> bytes:
        """Exactly `count` bytes. Memory grows with what is there, not with what was asked for."""
        content = bytearray()
        while len(content) < count:
            piece = self.some(count - len(content))
            if not piece:
                missing = count - len(content)
                raise DataError(f"{self.name}: ends after {self.position:,} bytes, at least {missing:,} are missing")
            content += piece
        return bytes(content)

    def expect(self, count: int) -> None:
        """Raises DataError where `count` more bytes can't be there: to be asked before memory is set aside for them."""
        end = self.position + count
        if self.size is not None and end > self.size:
            raise DataError(f"{self.name}: has {self.size:,} bytes, {end:,} are needed")
        if self._packed is not None:
            check_expansion(self.name, self._packed, end)

    def rows(self, count: int, width: int) -> Iterator[NDArray[np.uint8]]:
        """uint8 (k, width) arrays of `count` rows, an image or record each, in all; about 1 MiB at a time."""
        if width < 1:
            raise DataError(f"{self.name}: has images without pixels")
        if width > 3 * MAX_PIXELS:
            raise DataError(f"{self.name}: a single image of {width:,} bytes is more than {3 * MAX_PIXELS:,}")
        at_once = max(1, PIECE // width)
        for first in range(0, count, at_once):
            k = min(at_once, count - first)
            yield np.frombuffer(self.read(k * width), dtype=np.uint8).reshape(k, width)

    def skip(self, count: int) -> None:
        """Reads `count` bytes and forgets them."""
        while count:
            piece = self.read(min(count, PIECE))
            count -= len(piece)

    def finish(self) -> None:
        """Raises DataError if anything follows. A compressed file checks its digest when its end is read."""
        if self.some(1):
            raise DataError(f"{self.name}: more follows after the {self.position - 1:,} bytes that belong there")


@contextmanager
def open_bytes(path: str | os.PathLike[str], unpack: bool = True) -> Iterator[ByteReader]:
    """A reader of the file; if it begins as gzip files do, of what is packed in it, unless `unpack` is False."""
    name = os.fspath(path)
    with explaining(name):
        size = os.path.getsize(path)
        file = Path(path).open("rb")  # noqa: SIM115  (closed below; errors of the block are not ours to explain)
    with file:
        if not (unpack and begins_as_gzip(file.peek(2))):
            yield ByteReader(name, file.read, size)
            return
        with gzip.GzipFile(fileobj=file) as unpacked:
            yield ByteReader(name, unpacked.read, None, packed=size)


def begins_as_gzip(content: bytes) -> bool:
    return content[:2] == b"\x1f\x8b"
