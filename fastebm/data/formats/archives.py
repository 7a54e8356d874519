"""The files of a data set, one after another, out of a folder or a tar archive; nothing is ever written to disk.

Of tar only what the data sets use is understood: plain files and folders, and pax headers, which are skipped. The
standard library's reader follows every extension there is, and hostile archives have sent it round in circles
(CVE-2024-6232, CVE-2025-8194).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from fastebm.data.errors import DataError
from fastebm.data.formats.byte_reader import ByteReader, open_bytes

_BLOCK = 512
_LONGEST_EXTENSION = 2**16
_FILES = (b"0", b"\0", b"7")
_FOLDER = b"5"
_EXTENSIONS = (b"x", b"g")
_KINDS = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"6": "a pipe",
    b"L": "a file with a name of over 100 bytes",
    b"S": "a sparse file",
}


def files_of(path: Path) -> Iterator[tuple[str, ByteReader]]:
    """Names without folders, and readers, of all files that lie in a folder itself or anywhere in a tar archive.

    A reader is good until the next one is asked for; it need not be read to its end.
    """
    return _files_of_folder(path) if path.is_dir() else _files_of_tar(path)


def is_tar(beginning: bytes) -> bool:
    """Whether a file with this (unpacked) beginning of 512 bytes is a tar archive."""
    return beginning[257:262] == b"ustar"


def _files_of_folder(path: Path) -> Iterator[tuple[str, ByteReader]]:
    for name in sorted(os.listdir(path)):
        if (path / name).is_file():
            with open_bytes(path / name, unpack=False) as reader:
                yield name, reader


def _files_of_tar(path: Path) -> Iterator[tuple[str, ByteReader]]:
    seen = set()
    with open_bytes(path) as archive:
        while True:
            header = archive.read(_BLOCK)
            if not any(header):
                break
            name, size, kind = _header(archive, header)
            archive.expect(size)
            member = ByteReader(f"{path}, {name}", _within(archive, size), size)
            if kind in _FILES and not name.endswith("/"):
                if (base := PurePosixPath(name).name) in seen:
                    raise DataError(f"{member.name}: the archive has two files of this name")
                seen.add(base)
                yield base, member
            elif kind in _EXTENSIONS:
                _check_extension(member)
            elif kind in _FILES or kind == _FOLDER:
                pass
            else:
                what = _KINDS.get(kind, f"an entry of type {kind!r}")
                raise DataError(f"{member.name}: is {what}, which no data set has: the archive is refused")
            archive.skip(size - member.position + -size % _BLOCK)
        # To the last byte, because only there does gzip check what came before.
        while archive.some(2**20):
            pass


def _header(archive: ByteReader, header: bytes) -> tuple[str, int, bytes]:
    """Name, size and kind of an entry, after a look at the header's checksum and at where the name would lead."""
    where = f"{archive.name}: the tar header before byte {archive.position:,}"
    if _octal(header[148:156], where) != sum(header) - sum(header[148:156]) + 8 * ord(" "):
        raise DataError(f"{where} is damaged: its checksum does not fit")
    name = header[:100].split(b"\0")[0].decode("utf-8", "replace")
    if header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].split(b"\0")[0].decode("utf-8", "replace") + "/" + name
    if name.startswith("/") or ".." in PurePosixPath(name).parts or "\\" in name:
        raise DataError(f"{archive.name}: the entry {name[:200]!r} leads out of the archive: it is refused")
    return name, _octal(header[124:136], where), header[156:157]


def _octal(field: bytes, where: str) -> int:
    digits = field.strip(b" \0")
    if not digits or digits.strip(b"01234567"):
        raise DataError(f"{where} is damaged: {field!r} is no octal number")
    return int(digits, 8)


def _check_extension(member: ByteReader) -> None:
    """Refuses pax headers that change how the archive is to be read; times and owners, which all others hold, pass."""
    if member.size is None or member.size > _LONGEST_EXTENSION:
        raise DataError(f"{member.name}: a pax header of over {_LONGEST_EXTENSION:,} bytes is refused")
    if b" size=" in member.read(member.size):
        raise DataError(f"{member.name}: a pax header that changes a size is refused")


def _within(archive: ByteReader, size: int) -> Callable[[int], bytes]:
    """The next `size` bytes of an archive as a source of their own."""
    left = size

    def read(count: int) -> bytes:
        nonlocal left
        if not left:
            return b""
        piece = archive.some(min(count, left))
        left -= len(piece)
        return piece

    return read
