"""Members of zip files as limited byte readers.

`zipfile` reads the directory and the headers, unpacks stored and deflated members and verifies their checksums. It does
not unpack LZMA members here, because its LZMA reader expands each piece of the file without a limit: a hostile megabyte
would become gigabytes in memory.
"""

from __future__ import annotations

import copy
import lzma
import zipfile
import zlib
from collections.abc import Callable
from typing import IO

from fastebm.data.errors import DataError, raise_as_data_error
from fastebm.data.formats.byte_reader import ByteReader, check_expansion

_LZMA_MEMORY = 2**28  # limit of the dictionary, whose size the file chooses; common writers use at most 64 MiB


def open_member(archive: zipfile.ZipFile, archive_size: int, info: zipfile.ZipInfo, name: str) -> ByteReader:
    """A reader of one member. Reading its end raises DataError unless the checksum is that of the directory."""
    check_expansion(name, info.compress_size, info.file_size)
    if info.header_offset + info.compress_size > archive_size:
        raise DataError(f"{name}: its {info.compress_size:,} bytes reach beyond the end of the file")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA):
        raise DataError(
            f"{name}: is compressed by method {info.compress_type}; stored, deflated and LZMA members can be read"
        )
    with raise_as_data_error(name, "cannot be opened"):
        if info.compress_type == zipfile.ZIP_LZMA:
            source = _lzma_source(archive, info)
        else:
            source = archive.open(info).read
    return ByteReader(name, source, info.file_size)


def _lzma_source(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Callable[[int], bytes]:
    """A source of the unpacked bytes of an LZMA member, which expands no more than it is asked for.

    The stream of such a member is that of an .lzma file, except that the length between properties and data is missing.
    """
    packed = _open_packed(archive, info)
    header = packed.read(9)
    if len(header) != 9 or header[2:4] != b"\x05\x00":
        raise ValueError("damaged LZMA header")
    decompressor = lzma.LZMADecompressor(lzma.FORMAT_ALONE, memlimit=_LZMA_MEMORY)
    decompressor.decompress(header[4:] + b"\xff" * 8, 0)  # 64 ones: the length is unknown
    left, checksum = info.file_size, 0

    def read(count: int) -> bytes:
        nonlocal left, checksum
        piece, ended = b"", decompressor.eof
        while not piece and not ended:
            needs_input = decompressor.needs_input
            data = packed.read(2**16) if needs_input else b""
            piece = decompressor.decompress(data, count)
            ended = decompressor.eof or (needs_input and not data)
        left -= len(piece)
        checksum = zlib.crc32(piece, checksum)
        if left < 0 or (left > 0 and not piece):
            raise ValueError(f"{'more' if left < 0 else 'fewer'} bytes than the {info.file_size:,} of the directory")
        if left == 0 and checksum != info.CRC:
            raise ValueError("the checksum does not fit")
        return piece

    return read


def _open_packed(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> IO[bytes]:
    """The compressed bytes of a member as they are in the file."""
    stored = copy.copy(info)
    stored.compress_type = zipfile.ZIP_STORED
    stored.file_size = stored.compress_size
    del stored.CRC  # the checksum of the unpacked bytes; without one, zipfile verifies none
    return archive.open(stored)
