"""Tar archives: plain files are read, and links, devices, sparse files and lying headers are refused."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from fastebm.data import DataError, open_images
from fastebm.data.formats.archives import iterate_files
from tests.data.image_files import cifar10_files, tar_of

Change = Callable[[tarfile.TarInfo], None]


def archive(path: Path, *changes: Change, content: bytes = b"", form: int = tarfile.GNU_FORMAT) -> Path:
    """A gzipped archive of one good file and then, for each change, an entry that was changed."""
    with tarfile.open(path / "set.tar.gz", "w:gz", format=form) as out:
        for number, change in enumerate((lambda entry: None, *changes)):
            entry = tarfile.TarInfo(f"data/file_{number}")
            entry.size = len(content)
            change(entry)
            out.addfile(entry, io.BytesIO(content))
    return path / "set.tar.gz"


def setting(**values: object) -> Change:
    def change(entry: tarfile.TarInfo) -> None:
        for name, value in values.items():
            setattr(entry, name, value)

    return change


def contents(path: Path) -> dict[str, bytes]:
    return {name: reader.read(reader.size or 0) for name, reader in iterate_files(path)}


def test_names_and_contents(tmp_path: Path) -> None:
    tar_of(tmp_path / "a.tar.gz", {"one": b"1" * 512, "two": b"", "three": b"3" * 513}, "folder")
    assert contents(tmp_path / "a.tar.gz") == {"one": b"1" * 512, "two": b"", "three": b"3" * 513}
    for _, reader in iterate_files(tmp_path / "a.tar.gz"):  # none read: they are skipped
        assert reader.position == 0


def test_the_prefix_of_ustar(tmp_path: Path) -> None:
    path = archive(tmp_path, setting(name="d" * 90 + "/" + "e" * 40), content=b"x", form=tarfile.USTAR_FORMAT)
    assert list(contents(path)) == ["file_0", "e" * 40]


@pytest.mark.parametrize(
    ("change", "saying"),
    [
        (setting(type=tarfile.SYMTYPE, linkname="/etc/passwd", size=0), "file_1: is a symbolic link"),
        (setting(type=tarfile.LNKTYPE, linkname="data/file_0", size=0), "file_1: is a hard link"),
        (setting(type=tarfile.CHRTYPE, size=0), "file_1: is a device"),
        (setting(type=tarfile.FIFOTYPE, size=0), "file_1: is a pipe"),
        (setting(type=b"Z"), "file_1: is an entry of type b'Z'"),
        (setting(type=tarfile.GNUTYPE_SPARSE), "file_1: is a sparse file"),
        (setting(name="../../file"), r"entry '\.\./\.\./file' leads out of the archive"),
        (setting(name="data/../file"), r"entry 'data/\.\./file' leads out of the archive"),
        (setting(name="/etc/file"), "entry '/etc/file' leads out of the archive"),
        (setting(name="data\\..\\file"), "leads out of the archive"),
        (setting(name="n" * 150), "is a file with a name of over 100 bytes"),
        (setting(name="other/file_0"), "file_0: the archive has two files of this name"),
    ],
)
def test_refuses_what_no_data_set_has(change: Change, saying: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=saying):
        contents(archive(tmp_path, change))


def repaired(header: bytearray) -> bytes:
    """The header with the checksum that fits."""
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


@pytest.mark.parametrize(
    ("size", "saying"),
    [
        (b"-0000000512", "it has the size -330"),
        (b"77777777777", "refused as a decompression bomb|are needed"),
        (b"\x80" + b"\xff" * 10, "refused as a decompression bomb|are needed"),
        (b"\0" * 11, "is damaged: it has no size"),
        (b"00000040000", "ends after|are needed"),
    ],
)
@pytest.mark.parametrize("packed", [True, False])
def test_sizes_that_lie(size: bytes, saying: str, packed: bool, tmp_path: Path) -> None:
    content = bytearray(gzip.decompress(archive(tmp_path, content=b"x").read_bytes()))
    content[124:135] = size
    content[:512] = repaired(content[:512])
    (tmp_path / "set.tar").write_bytes(gzip.compress(content) if packed else content[:1024])
    with pytest.raises(DataError, match=saying):
        contents(tmp_path / "set.tar")


def test_a_file_needs_a_size(tmp_path: Path) -> None:
    content = bytearray(gzip.decompress(archive(tmp_path).read_bytes()))
    for size in (b"\0" * 12, b" " * 12):
        content[124:136] = size
        content[:512] = repaired(content[:512])
        (tmp_path / "set.tar").write_bytes(content)
        with pytest.raises(DataError, match="it has no size"):
            contents(tmp_path / "set.tar")


def test_what_desktops_pack_beside_the_files(tmp_path: Path) -> None:
    files, splits = cifar10_files(None)
    more = {f"__MACOSX/cifar/._{name}": b"?" for name in files} | {"cifar/.DS_Store": b"?", ".DS_Store": b"?"}
    more |= {"a/Thumbs.db": b"?", "b/Thumbs.db": b"?"}
    tar_of(tmp_path / "cifar.tar.gz", more | {f"cifar/{name}": content for name, content in files.items()}, ".")
    assert len(open_images(tmp_path / "cifar.tar.gz")) == len(splits["train"][0])


def test_damaged_headers(tmp_path: Path) -> None:
    content = bytearray(gzip.decompress(archive(tmp_path).read_bytes()))
    content[3] ^= 1
    (tmp_path / "set.tar").write_bytes(content)
    with pytest.raises(DataError, match=r"set\.tar: the tar header before byte 512 is damaged: bad checksum"):
        contents(tmp_path / "set.tar")


def test_an_archive_without_its_end(tmp_path: Path) -> None:
    content = gzip.decompress(archive(tmp_path, content=b"x").read_bytes())[:1024]
    (tmp_path / "set.tar.gz").write_bytes(gzip.compress(content))
    with pytest.raises(DataError, match=r"set\.tar\.gz: ends after 1,024 bytes"):
        contents(tmp_path / "set.tar.gz")


def test_pax_headers_may_not_change_sizes(tmp_path: Path) -> None:
    path = archive(tmp_path, setting(pax_headers={"size": "1"}), content=b"x", form=tarfile.PAX_FORMAT)
    with pytest.raises(DataError, match="a pax header that changes a size is refused"):
        contents(path)
    path = archive(tmp_path, setting(pax_headers={"comment": "x" * 70_000}), content=b"x", form=tarfile.PAX_FORMAT)
    with pytest.raises(DataError, match="has more than 65,536 bytes, the limit"):
        contents(path)


def test_damage_behind_the_files_is_found(tmp_path: Path) -> None:
    files, _ = cifar10_files(None)
    tar_of(tmp_path / "cifar.tar.gz", files, "cifar")
    content = bytearray((tmp_path / "cifar.tar.gz").read_bytes())
    content[-8] ^= 1  # gzip's checksum of everything before
    (tmp_path / "cifar.tar.gz").write_bytes(content)
    with pytest.raises(DataError, match=r"cifar\.tar\.gz: damaged after .*CRC"):
        open_images(tmp_path / "cifar.tar.gz")


def test_messages_hold_no_commands_to_a_terminal(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="symbolic link") as caught:
        contents(archive(tmp_path, setting(type=tarfile.SYMTYPE, name="a\x1b[2J\n\u202eb", size=0)))
    assert r"a\x1b[2J\n\u202eb: is a symbolic link" in str(caught.value)
