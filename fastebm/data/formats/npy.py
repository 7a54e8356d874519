"""Arrays in .npy and .npz files, read in pieces: numpy parses the header, and objects are never unpickled."""

from __future__ import annotations

import math
import os
import struct
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, Literal

import numpy as np
import torch
from numpy.lib import format as npy_format
from numpy.typing import NDArray
from torch import Tensor

from fastebm.data.errors import DataError, raise_as_data_error
from fastebm.data.formats.archives import is_of_desktop
from fastebm.data.formats.byte_reader import MAX_BYTES, ByteReader
from fastebm.data.formats.class_numbers import class_numbers
from fastebm.data.formats.zip_members import open_member

_ZIP_END, _COUNT_IN_END, _COUNT_OF_ZIP64 = b"PK\5\6", 10, 0xFFFF
_MAX_ZIP_END = 22 + 0xFFFF  # bytes, with the longest comment
_MAX_HEADER = 10_000  # a plain array's header has about 100 bytes


@dataclass(frozen=True)
class StoredArray:
    """An array whose header has been read. Its elements are read on demand, once."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    fortran_order: bool
    reader: ByteReader

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"

    def chunks(self) -> Iterator[NDArray[np.uint8]]:
        """The elements of a uint8 array (N, ...), as arrays (k, ...) of about 1 MiB each."""
        self._check_plain()
        if self.dtype != np.uint8:
            raise DataError(f"{self.name}: is {self.dtype} {self.shape}; images must be uint8, from 0 to 255")
        if self.fortran_order and len(self.shape) > 1:
            # The first axis varies fastest, so that no image is complete before the last byte.
            if math.prod(self.shape) > MAX_BYTES:
                raise DataError(
                    f"{self.name}: is in Fortran order, which cannot be read in parts, and over {MAX_BYTES:,} bytes"
                )
            yield np.frombuffer(self.reader.read(math.prod(self.shape)), np.uint8).reshape(self.shape, order="F")
        else:
            for rows in self.reader.read_rows(self.shape[0], math.prod(self.shape[1:])):
                yield rows.reshape(-1, *self.shape[1:])
        self.reader.check_end()

    def numbers(self) -> NDArray[Any]:
        """The elements of an array of real numbers, whole, in the machine's byte order and at most 64 bits each."""
        self._check_plain()
        needed = math.prod(self.shape) * self.dtype.itemsize
        if self.dtype.kind not in "uif" or needed > MAX_BYTES:
            raise DataError(
                f"{self.name}: is {self.dtype} {self.shape}; real numbers up to {MAX_BYTES:,} bytes are read"
            )
        values = np.frombuffer(self.reader.read(needed), self.dtype)
        self.reader.check_end()
        order: Literal["F", "C"] = "F" if self.fortran_order else "C"
        kind = np.float64 if self.dtype.itemsize > 8 else self.dtype.newbyteorder("=")
        return values.astype(kind).reshape(self.shape, order=order)

    def labels(self, count: int) -> Tensor:
        """The elements of an array (count,) or (count, 1) of class numbers, as int64 (count,)."""
        self._check_plain()
        if self.shape not in ((count,), (count, 1)):
            raise DataError(
                f"{self.name}: {self.dtype} {self.shape} are no labels of {count} images; one class number for each "
                "is needed"
            )
        content = self.reader.read(count * self.dtype.itemsize)
        self.reader.check_end()
        return torch.from_numpy(class_numbers(self.name, np.frombuffer(content, self.dtype)))

    def _check_plain(self) -> None:
        if self.dtype.hasobject:
            raise DataError(f"{self.name}: holds Python objects, which are never unpickled because they can run code")
        size = self.reader.size
        if size is None:
            raise DataError(f"{self.name}: is gzipped; unpack it first")
        needed = math.prod(self.shape) * self.dtype.itemsize
        if self.reader.position + needed != size:
            raise DataError(
                f"{self.name}: {self.dtype} {self.shape} take {needed:,} bytes, but "
                f"{size - self.reader.position:,} follow the header"
            )


def read_array_header(reader: ByteReader) -> StoredArray:
    """The array that begins at the reader's next byte. Raises DataError for a damaged or overlong header."""

    def read(count: int) -> bytes:  # numpy checks its limit only after reading as many bytes as the header claims
        if count > _MAX_HEADER:
            raise ValueError(f"its header claims {count:,} bytes")
        return reader.read(count)

    with raise_as_data_error(reader.name, "is no array of numpy"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of headers that Python 2 wrote, and of invalid escapes
        file: Any = SimpleNamespace(read=read)
        version = npy_format.read_magic(file)
        if version == (1, 0):
            shape, fortran_order, dtype = npy_format.read_array_header_1_0(file, max_header_size=_MAX_HEADER)
        elif version == (2, 0):
            shape, fortran_order, dtype = npy_format.read_array_header_2_0(file, max_header_size=_MAX_HEADER)
        else:
            raise DataError(f"{reader.name}: is of version {version} of numpy's format; 1.0 and 2.0 are read")
    if any(type(length) is not int or length < 0 for length in shape):
        raise DataError(f"{reader.name}: has the impossible shape {shape}")
    return StoredArray(reader.name, dtype, shape, fortran_order, reader)


def _check_directory(archive: zipfile.ZipFile, file: IO[bytes]) -> None:
    """Raises an error for a directory that has lost or renamed members: it has no checksum, and another array of the
    file would be taken for the lost one. Its end has their number, and each name is at its member as well.
    """
    for info in archive.infolist():
        # Those of arrays are compared when they are opened; the others may be packed in any way.
        if not info.filename.endswith(".npy"):
            with suppress(NotImplementedError, RuntimeError):
                archive.open(info).close()
    file.seek(-min(os.fstat(file.fileno()).st_size, _MAX_ZIP_END), os.SEEK_END)
    end = file.read()
    (count,) = struct.unpack_from("<H", end, end.rindex(_ZIP_END) + _COUNT_IN_END)
    if count not in (len(archive.infolist()), _COUNT_OF_ZIP64):
        raise ValueError(f"its directory has {len(archive.infolist()):,} of {count:,} members")


@contextmanager
def open_npz(path: Path) -> Iterator[Mapping[str, StoredArray]]:
    """The arrays of an .npz file by name; its members may be stored, deflated or LZMA-compressed."""
    with path.open("rb") as file:
        with raise_as_data_error(str(path), "is no complete zip file"):
            archive = zipfile.ZipFile(file)
            _check_directory(archive, file)
        infos = [info for info in archive.infolist() if info.filename.endswith(".npy")]
        # A desktop that packs a folder again puts the folder's name before each member, and members of its own.
        infos = [info for info in infos if not is_of_desktop(info.filename)]
        folders = {info.filename.rpartition("/")[0] for info in infos}
        folder = f"{folders.pop()}/" if len(folders) == 1 else ""
        keys = [info.filename.removeprefix(folder).removesuffix(".npy") for info in infos]
        if len(set(keys)) != len(keys):
            raise DataError(f"{path}: has two arrays of one name")
        if not keys:
            raise DataError(
                f"{path}: is a zip file without arrays (names that end in .npy); if it holds a folder of pictures or a "
                "data set, unpack it and give the folder"
            )
        size = os.fstat(file.fileno()).st_size
        yield {
            key: read_array_header(open_member(archive, size, info, f"{path}, {key}"))
            for key, info in zip(keys, infos, strict=True)
        }
