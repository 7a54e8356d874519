"""The files of a data set, read one after another from a folder or a tar archive without unpacking to disk.

`tarfile.TarInfo` parses the header blocks. The loop over them is our own and accepts only what data sets contain: plain
files, folders, and pax headers, which are skipped. The loop of `tarfile.TarFile` follows every extension of the format,
and hostile archives have made it loop or stall (CVE-2024-6232, CVE-2025-8194).
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from fastebm.data.errors import DataError, raise_as_data_error
from fastebm.data.formats.byte_reader import PIECE, ByteReader, open_bytes

_BLOCK = tarfile.BLOCKSIZE
_MAX_EXTENSION = 2**16
_REFUSED = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.GNUTYPE_LONGNAME: "a file with a name of over 100 bytes",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}


def iterate_files(path: Path) -> Iterator[tuple[str, ByteReader]]:
    """(name, reader) of every file directly in a folder, or anywhere in a tar archive. Names are without folders.

    A reader is valid until the next one is requested, and need not be read to its end.
    """
    return _iterate_folder(path) if path.is_dir() else _iterate_tar(path)


def is_tar(beginning: bytes) -> bool:
    """Whether a file with this (unpacked) beginning of 512 bytes is a tar archive."""
    return beginning[257:262] == b"ustar"


def is_of_desktop(path: str) -> bool:
    """Whether a file or folder belongs to the desktop of its last owner, or is hidden, and not to a data set."""
    names = path.split("/")
    return (
        any(name in ("__MACOSX", "@eaDir") for name in names)
        or names[-1].startswith(".")
        or names[-1].lower() in ("thumbs.db", "desktop.ini", "icon\r")
    )


def _iterate_folder(path: Path) -> Iterator[tuple[str, ByteReader]]:
    for name in sorted(os.listdir(path)):
        if (path / name).is_file():
            with open_bytes(path / name, unpack=False) as reader:
                yield name, reader


def _iterate_tar(path: Path) -> Iterator[tuple[str, ByteReader]]:
    names = set()
    with open_bytes(path) as archive:
        while any(block := archive.read(_BLOCK)):
            entry = _parse_header(archive, block)
            archive.check_remaining(entry.size)
            member = ByteReader(f"{path}, {entry.name}", _limited_source(archive, entry.size), entry.size)
            if entry.type in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE):
                name = PurePosixPath(entry.name).name
                if not is_of_desktop(entry.name):
                    if name in names:
                        raise DataError(f"{member.name}: the archive has two files of this name")
                    names.add(name)
                    yield name, member
            elif entry.type in (tarfile.XHDTYPE, tarfile.XGLTYPE):
                if b" size=" in member.read_all(_MAX_EXTENSION):
                    raise DataError(f"{member.name}: a pax header that changes a size is refused")
            elif entry.type != tarfile.DIRTYPE:
                kind = _REFUSED.get(entry.type, f"an entry of type {entry.type!r}")
                raise DataError(f"{member.name}: is {kind}, which no data set has: the archive is refused")
            archive.skip(entry.size - member.position + -entry.size % _BLOCK)
        # Read to the last byte, because only there does gzip verify what came before.
        while archive.read1(PIECE):
            pass


def _parse_header(archive: ByteReader, block: bytes) -> tarfile.TarInfo:
    """The entry of a header block, which must have a valid checksum and a name and size inside the archive."""
    problem = f"the tar header before byte {archive.position:,} is damaged"
    with raise_as_data_error(archive.name, problem):
        entry = tarfile.TarInfo.frombuf(block, "utf-8", "replace")
    if entry.size < 0:
        raise DataError(f"{archive.name}: {problem}: it has the size {entry.size:,}")
    if entry.isreg() and not block[124:136].strip(b"\0 "):
        raise DataError(f"{archive.name}: {problem}: it has no size")
    if entry.name.startswith("/") or ".." in PurePosixPath(entry.name).parts or "\\" in entry.name:
        raise DataError(f"{archive.name}: the entry {entry.name[:200]!r} leads out of the archive: it is refused")
    return entry


def _limited_source(archive: ByteReader, size: int) -> Callable[[int], bytes]:
    """The next `size` bytes of an archive as a source of their own."""
    left = size

    def read(count: int) -> bytes:
        nonlocal left
        piece = archive.read1(min(count, left)) if left else b""
        left -= len(piece)
        return piece

    return read
