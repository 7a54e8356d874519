"""Members of a zip file, unpacked piece by piece, whatever their directory claims.

The standard library reads the directory. It is not used to unpack: with LZMA its reader expands a whole piece of the
file at once, which a hostile one makes gigabytes of.
"""

from __future__ import annotations

import lzma
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import BinaryIO, Protocol

from fastebm.data.errors import DataError, explaining
from fastebm.data.formats.byte_reader import ByteReader, check_expansion

_LZMA_MEMORY = 2**28  # for the dictionary, whose size the file names; writers in use stay at or below 64 MiB
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_ENCRYPTED = 1


class _Decompressor(Protocol):
    @property
    def eof(self) -> bool: ...

    def decompress(self, data: bytes, max_length: int) -> bytes: ...


def open_member(file: BinaryIO, file_size: int, info: zipfile.ZipInfo, name: str) -> ByteReader:
    """A reader of one member, whose end is an error unless length and checksum are those of the directory."""
    check_expansion(name, info.compress_size, info.file_size)
    start = _start(file, info, name)
    if start + info.compress_size > file_size:
        raise DataError(f"{name}: its {info.compress_size:,} bytes reach beyond the end of the file")
    if info.flag_bits & _ENCRYPTED:
        raise DataError(f"{name}: is encrypted")
    unpack = _unpack(_Packed(file, start, info.compress_size), info.compress_type, name)
    return ByteReader(name, _checked(unpack, info), info.file_size)


def _start(file: BinaryIO, info: zipfile.ZipInfo, name: str) -> int:
    """Where the member's bytes begin, from the header before them."""
    with explaining(name, "damaged header"):
        file.seek(info.header_offset)
        fields = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
        signature, name_length, extra_length = fields[0], fields[-2], fields[-1]
        own_name = file.read(name_length)
    if signature != b"PK\x03\x04" or own_name not in (
        info.orig_filename.encode(encoding, "replace") for encoding in ("utf-8", "cp437")
    ):
        raise DataError(f"{name}: the header before its bytes is not the one that the directory describes")
    return info.header_offset + _LOCAL_HEADER.size + name_length + extra_length


class _Packed:
    """The compressed bytes of one member. It seeks for every piece, because readers of one file may take turns."""

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        self._file, self._next, self._left = file, start, size

    def read(self, count: int) -> bytes:
        self._file.seek(self._next)
        piece = self._file.read(min(count, self._left))
        self._next += len(piece)
        self._left -= len(piece)
        return piece


class _Deflate:
    """zlib's decompressor with the interface of lzma's."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(-zlib.MAX_WBITS)

    @property
    def eof(self) -> bool:
        return self._inner.eof

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self._inner.decompress(self._inner.unconsumed_tail + data, max_length)


def _unpack(packed: _Packed, method: int, name: str) -> Callable[[int], bytes]:
    if method == zipfile.ZIP_STORED:
        return packed.read
    if method == zipfile.ZIP_DEFLATED:
        return _inflating(packed, _Deflate())
    if method == zipfile.ZIP_LZMA:
        return _inflating(packed, _lzma(packed, name))
    raise DataError(f"{name}: is compressed by method {method}; stored, deflated and LZMA members can be read")


def _lzma(packed: _Packed, name: str) -> _Decompressor:
    """A decompressor that has the member's properties. A zip's LZMA stream is that of an .lzma file, which has the
    unpacked length (or 64 ones: up to the end mark) between the properties and the stream."""
    header = packed.read(9)
    if len(header) != 9 or header[2:4] != b"\x05\x00":
        raise DataError(f"{name}: damaged LZMA header")
    decompressor = lzma.LZMADecompressor(lzma.FORMAT_ALONE, memlimit=_LZMA_MEMORY)
    with explaining(name, "damaged LZMA header"):
        decompressor.decompress(header[4:] + b"\xff" * 8, 0)
    return decompressor


def _inflating(packed: _Packed, decompressor: _Decompressor) -> Callable[[int], bytes]:
    def read(count: int) -> bytes:
        while not decompressor.eof:
            # It is asked without input first: it may still hold output that did not fit before.
            piece = decompressor.decompress(b"", count)
            if piece:
                return piece
            data = packed.read(2**16)
            piece = decompressor.decompress(data, count)
            if piece or not data:
                return piece
        return b""

    return read


def _checked(unpack: Callable[[int], bytes], info: zipfile.ZipInfo) -> Callable[[int], bytes]:
    """`unpack`, with an error for a member of another length or checksum than the directory has."""
    left, checksum = info.file_size, 0

    def read(count: int) -> bytes:
        nonlocal left, checksum
        piece = unpack(count)
        left -= len(piece)
        checksum = zlib.crc32(piece, checksum)
        if left < 0 or (left > 0 and not piece):
            raise ValueError(f"{'more' if left < 0 else 'fewer'} bytes than the {info.file_size:,} of the directory")
        if left == 0 and checksum != info.CRC:
            raise ValueError("the checksum does not fit")
        return piece

    return read
