"""Arrays as numpy's .npy and .npz files hold them: header first, then row by row. Nothing is ever unpickled."""

from __future__ import annotations

import math
import os
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib import format as npy_format
from numpy.typing import NDArray
from torch import Tensor

from fastebm.data.errors import DataError, explaining
from fastebm.data.formats.byte_reader import MAX_BYTES, ByteReader, open_bytes
from fastebm.data.formats.zip_members import open_member

_LONGEST_HEADER = 10_000  # that of a plain array has about 100 bytes


@dataclass(frozen=True)
class StoredArray:
    """An array whose header is read and whose elements are not yet. They can be read once."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    fortran_order: bool
    reader: ByteReader

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"

    def chunks(self) -> Iterator[NDArray[np.uint8]]:
        """The elements of a uint8 array (N, ...) as arrays (k, ...), about 1 MiB each."""
        self._check_plain()
        if self.dtype != np.uint8:
            raise DataError(f"{self.name}: is {self.dtype} {self.shape}; images must be uint8, from 0 to 255")
        if self.fortran_order and len(self.shape) > 1:
            # The first axis runs fastest: no image is complete before the last byte.
            if math.prod(self.shape) > MAX_BYTES:
                raise DataError(
                    f"{self.name}: in Fortran order it can't be read in parts and is over {MAX_BYTES:,} bytes"
                )
            yield np.frombuffer(self.reader.read(math.prod(self.shape)), np.uint8).reshape(self.shape, order="F")
        else:
            for rows in self.reader.rows(self.shape[0], math.prod(self.shape[1:])):
                yield rows.reshape(-1, *self.shape[1:])
        self.reader.finish()

    def labels(self, count: int) -> Tensor:
        """The elements of an integer array (count,) or (count, 1), as int64 (count,)."""
        self._check_plain()
        if self.shape not in ((count,), (count, 1)) or self.dtype.kind not in "ui":
            raise DataError(f"{self.name}: {self.dtype} {self.shape} are no labels of {count} images: integers are")
        content = self.reader.read(count * self.dtype.itemsize)
        self.reader.finish()
        numbers = np.frombuffer(content, self.dtype)
        if count and numbers.max() > np.iinfo(np.int64).max:
            raise DataError(f"{self.name}: the label {numbers.max()} does not fit in int64")
        return torch.from_numpy(numbers.astype(np.int64))

    def _check_plain(self) -> None:
        if self.dtype.hasobject:
            raise DataError(f"{self.name}: holds Python objects, which are never unpickled because they can run code")
        size = self.reader.size
        if size is None:
            raise DataError(f"{self.name}: is compressed as a whole; unpack it first")
        needed = math.prod(self.shape) * self.dtype.itemsize
        if self.reader.position + needed != size:
            raise DataError(
                f"{self.name}: {self.dtype} {self.shape} take {needed:,} bytes, but "
                f"{size - self.reader.position:,} follow the header"
            )


def read_header(reader: ByteReader) -> StoredArray:
    """The array that begins at the reader's next byte."""
    with explaining(reader.name, "is no array of numpy"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of headers that Python 2 wrote, and of odd escapes
        source: Any = _Header(reader)
        version = npy_format.read_magic(source)
        if version == (1, 0):
            header = npy_format.read_array_header_1_0(source, max_header_size=_LONGEST_HEADER)
        elif version == (2, 0):
            header = npy_format.read_array_header_2_0(source, max_header_size=_LONGEST_HEADER)
        else:
            raise DataError(f"{reader.name}: is of version {version} of numpy's format; 1.0 and 2.0 are read")
    shape, fortran_order, dtype = header
    if any(type(length) is not int or length < 0 for length in shape):
        raise DataError(f"{reader.name}: has the impossible shape {shape}")
    return StoredArray(reader.name, dtype, shape, fortran_order, reader)


class _Header:
    """A file as numpy's header reader wants it: one that gives no more than a header's bytes, however long it claims
    to be."""

    def __init__(self, reader: ByteReader) -> None:
        self._reader = reader

    def read(self, count: int) -> bytes:
        if count > _LONGEST_HEADER:
            raise ValueError(f"its header claims {count:,} bytes")
        return self._reader.read(count)


@contextmanager
def open_npy(path: str | os.PathLike[str]) -> Iterator[StoredArray]:
    """The array of a .npy file."""
    with open_bytes(path) as reader:
        yield read_header(reader)


@contextmanager
def open_npz(path: str | os.PathLike[str]) -> Iterator[Mapping[str, StoredArray]]:
    """The arrays of a .npz file by name, stored, deflated or LZMA-compressed."""
    name = os.fspath(path)
    with Path(path).open("rb") as file:
        with explaining(name, "is no whole zip file"):
            infos = zipfile.ZipFile(file).infolist()
        size = os.fstat(file.fileno()).st_size
        infos = [info for info in infos if info.filename.endswith(".npy")]
        keys = [info.filename.removesuffix(".npy") for info in infos]
        if len(set(keys)) != len(keys):
            raise DataError(f"{name}: has two arrays of one name")
        if not keys:
            raise DataError(f"{name}: is a zip file without arrays (names that end in .npy)")
        yield {
            key: read_header(open_member(file, size, info, f"{name}, {key}"))
            for key, info in zip(keys, infos, strict=True)
        }
