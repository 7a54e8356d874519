"""Members of zip files as limited byte readers.

`zipfile` reads the directory and the headers. Members are unpacked here, because the readers of `zipfile` end where the
directory says, also if more follows, and because its LZMA reader expands each piece of the file without a limit: a
hostile megabyte would become gigabytes in memory.
"""

from __future__ import annotations

import copy
import lzma
import zipfile
import zlib
from collections.abc import Callable
from typing import IO, Protocol

from fastebm.data.errors import DataError, raise_as_data_error
from fastebm.data.formats.byte_reader import ByteReader, check_expansion

_LZMA_MEMORY = 2**28  # limit of the dictionary, whose size the file chooses; common writers use at most 64 MiB
_PACKED_PIECE = 2**16  # bytes


class _Decompressor(Protocol):
    """The interface of `lzma.LZMADecompressor`."""

    @property
    def eof(self) -> bool: ...

    @property
    def needs_input(self) -> bool: ...

    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


def open_member(archive: zipfile.ZipFile, archive_size: int, info: zipfile.ZipInfo, name: str) -> ByteReader:
    """A reader of one member.

    Reading its end raises DataError unless length and checksum are those of the directory and the packed bytes end too.
    """
    check_expansion(name, info.compress_size, info.file_size)
    if info.header_offset + info.compress_size > archive_size:
        raise DataError(f"{name}: its {info.compress_size:,} bytes reach beyond the end of the file")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA):
        raise DataError(
            f"{name}: is compressed by method {info.compress_type}; stored, deflated and LZMA members can be read"
        )
    with raise_as_data_error(name, "cannot be opened"):
        packed = _open_packed(archive, info)
        if info.compress_type == zipfile.ZIP_LZMA:
            decompressor: _Decompressor = _lzma_decompressor(packed)
        else:
            decompressor = _Stored() if info.compress_type == zipfile.ZIP_STORED else _Inflater()
    return ByteReader(name, _checked_source(packed, decompressor, info), info.file_size)


def _checked_source(packed: IO[bytes], decompressor: _Decompressor, info: zipfile.ZipInfo) -> Callable[[int], bytes]:
    """A source of the unpacked bytes of a member, which expands no more than it is asked for."""
    left, checksum = info.file_size, 0

    def read(count: int) -> bytes:
        nonlocal left, checksum
        piece, ended = b"", decompressor.eof
        while not piece and not ended:
            needs_input = decompressor.needs_input
            data = packed.read(_PACKED_PIECE) if needs_input else b""
            piece = decompressor.decompress(data, count)
            ended = decompressor.eof or (needs_input and not data)
        left -= len(piece)
        checksum = zlib.crc32(piece, checksum)
        if left < 0 or (left > 0 and not piece):
            raise ValueError(f"{'more' if left < 0 else 'fewer'} bytes than the {info.file_size:,} of the directory")
        if left == 0 and checksum != info.CRC:
            raise ValueError("the checksum does not fit")
        if not piece and packed.read(1):
            raise ValueError("more compressed bytes than belong to it")
        return piece

    return read


class _Stored:
    """Bytes that are not compressed."""

    eof = False
    needs_input = True

    def __init__(self) -> None:
        self._held = b""

    def decompress(self, data: bytes, max_length: int, /) -> bytes:
        content = self._held + data
        piece, self._held = content[:max_length], content[max_length:]
        self.needs_input = not self._held
        return piece


class _Inflater:
    """zlib's decompressor of a raw deflate stream."""

    needs_input = True

    def __init__(self) -> None:
        self._stream = zlib.decompressobj(-zlib.MAX_WBITS)

    @property
    def eof(self) -> bool:
        return self._stream.eof

    def decompress(self, data: bytes, max_length: int, /) -> bytes:
        piece = self._stream.decompress(self._stream.unconsumed_tail + data, max_length)
        if self._stream.unused_data:
            raise ValueError("more compressed bytes than belong to it")
        self.needs_input = not self._stream.unconsumed_tail and len(piece) < max_length
        return piece


def _lzma_decompressor(packed: IO[bytes]) -> lzma.LZMADecompressor:
    """A decompressor of an LZMA member, whose header it has read.

    The stream is that of an .lzma file, except that the length between properties and data is missing.
    """
    header = packed.read(9)
    if len(header) != 9 or header[2:4] != b"\x05\x00":
        raise ValueError("damaged LZMA header")
    decompressor = lzma.LZMADecompressor(lzma.FORMAT_ALONE, memlimit=_LZMA_MEMORY)
    decompressor.decompress(header[4:] + b"\xff" * 8, 0)  # 64 ones: the length is unknown
    return decompressor


def _open_packed(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> IO[bytes]:
    """The compressed bytes of a member as they are in the file."""
    stored = copy.copy(info)
    stored.compress_type = zipfile.ZIP_STORED
    stored.file_size = stored.compress_size
    del stored.CRC  # the checksum of the unpacked bytes; without one, zipfile verifies none
    return archive.open(stored)
