"""Damaged, odd and hostile files: each is refused by one line with its name, or read to the images that are in it.

Mutations change a file itself, or the content of its container, which is then packed again so that its checksum does
not reveal the damage. Where a checksum covers the change, only the original images may come back. Folders are made of
whole and broken pictures under odd names, with links and junk among them, and files are put into each other.
"""

from __future__ import annotations

import gzip
import io
import os
import pickle
import shutil
import signal
import struct
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastebm.data import DataError, Images, image_format, open_images
from fastebm.data.errors import printable
from fastebm.data.formats.image_format import split_of
from fastebm.data.formats.pickles import read_pickle
from fastebm.data.formats.pictures import IMAGE_SUFFIXES
from tests.data import image_files
from tests.data.image_files import WRITERS

SECONDS = 20  # for what takes milliseconds: only what never ends takes longer
MAX_BYTES = 2**26


class Hangs(BaseException):
    """Not an Exception, which readers may turn into an error of theirs."""


@contextmanager
def time_limit() -> Iterator[None]:
    """Raises Hangs in a block that does not end. Without signals (not on Unix) the block is on its own."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: object) -> None:
        raise Hangs

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# Mutations ------------------------------------------------------------------------------------------------------------

EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1)


def mutated(content: bytes, random: np.random.Generator) -> bytes:
    """One to three changes at random places, half of them near either end, where headers and directories are."""
    changed = bytearray(content)
    for _ in range(random.integers(1, 4)):
        place = _place(len(changed), random)
        kind = random.integers(7)
        if kind == 0:
            changed[place : place + 1] = bytes([random.integers(256)])
        elif kind == 1 and changed:
            changed[min(place, len(changed) - 1)] ^= 1 << random.integers(8)
        elif kind == 2:
            del changed[place:]
        elif kind == 3:
            changed[place:place] = random.bytes(int(random.integers(1, 40)))
        elif kind == 4:
            del changed[place : place + int(random.integers(1, 40))]
        elif kind == 5:
            form = ("B", "<H", ">H", "<I", ">I")[random.integers(5)]
            number = EXTREMES[random.integers(len(EXTREMES))] % 2 ** (8 * struct.calcsize(form))
            changed[place : place + struct.calcsize(form)] = struct.pack(form, number)
        else:
            other = _place(len(changed), random)
            changed[place : place + 16] = changed[other : other + 16]
    return bytes(changed)


def _place(length: int, random: np.random.Generator) -> int:
    near = int(random.integers(min(length, 160) + 1))
    return (near, length - near, *random.integers(length + 1, size=2).tolist())[random.integers(4)]


def inside_npz(content: bytes, random: np.random.Generator) -> bytes:
    """A zip file whose members are mutated and whose directory and checksums fit them."""
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(packed, "w") as target:
        infos = source.infolist()
        chosen = random.integers(len(infos))
        for number, info in enumerate(infos):
            member = source.read(info)
            target.writestr(info, mutated(member, random) if number == chosen else member, info.compress_type)
    return packed.getvalue()


def inside_gzip(content: bytes, random: np.random.Generator) -> bytes:
    return gzip.compress(mutated(gzip.decompress(content), random), 1)


def inside_tar(content: bytes, random: np.random.Generator) -> bytes:
    """A tar archive one of whose members is mutated, with headers that fit."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(content)) as source, tarfile.open(fileobj=packed, mode="w:gz") as target:
        entries = [entry for entry in source.getmembers() if entry.isfile()]
        chosen = random.integers(len(entries))
        for number, entry in enumerate(entries):
            member = source.extractfile(entry).read()
            if number == chosen:
                member = mutated(member, random)
                entry.size = len(member)
            target.addfile(entry, io.BytesIO(member))
    return packed.getvalue()


def headers_of_tar(content: bytes, random: np.random.Generator) -> bytes:
    """A tar archive one of whose headers is mutated and has the checksum that fits."""
    archive = bytearray(gzip.decompress(content))
    places = [place for place in range(0, len(archive), 512) if archive[place + 257 : place + 262] == b"ustar"]
    place = places[random.integers(len(places))]
    header = bytearray(mutated(bytes(archive[place : place + 512]), random)[:512].ljust(512, b"\0"))
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    archive[place : place + 512] = header
    return gzip.compress(bytes(archive), 1)


def inside_png(content: bytes, random: np.random.Generator) -> bytes:
    """A PNG one of whose chunks is mutated, unpacked if it holds pixels, and has the checksum that fits."""
    chunks, place = [], 8
    while place < len(content):
        (length,) = struct.unpack_from(">I", content, place)
        chunks.append((content[place + 4 : place + 8], content[place + 8 : place + 8 + length]))
        place += 12 + length
    chosen = random.integers(len(chunks))
    kind, data = chunks[chosen]
    if kind == b"IDAT" and random.integers(2):
        data = zlib.compress(mutated(zlib.decompress(data), random))
    else:
        data = mutated(data, random)
    chunks[chosen] = kind, data
    return content[:8] + b"".join(image_files.png_chunk(*chunk) for chunk in chunks)


# Targets --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A file of a set to be mutated ("": the set is that file), how, and whether a checksum covers its images."""

    writer: Callable[[Path], image_files.Written]
    file: str = ""
    mutate: Callable[[bytes, np.random.Generator], bytes] = mutated
    checked: bool = False


def write_picture(suffix: str, kind: str | None = None, **options: object) -> Callable[[Path], image_files.Written]:
    def write(folder: Path) -> image_files.Written:
        ramp = np.broadcast_to(np.arange(0, 240, 20, dtype=np.uint8)[:, None, None], (12, 12, 3))
        (folder / "pictures").mkdir()
        Image.fromarray(ramp).save(folder / "pictures" / f"a.{suffix}", kind, **options)
        return image_files.Written(folder / "pictures", "folder of pictures", {})

    return write


def write_npy(folder: Path) -> image_files.Written:
    np.save(folder / "set.npy", image_files.noise(0, 4, 6, 6, 3))
    return image_files.Written(folder / "set.npy", "numpy array", {})


def write_pickled_imagenet(folder: Path) -> image_files.Written:
    (folder / "set").mkdir()
    arrays, _, _ = image_files.imagenet_part(0, 4)
    content = pickle.dumps({**arrays, "labels": arrays["labels"].tolist()})
    (folder / "set" / "train_data_batch_1").write_bytes(content)
    return image_files.Written(folder / "set", "", {})


def write_qmnist(folder: Path) -> image_files.Written:
    (folder / "set").mkdir()
    labels = np.tile(np.arange(8, dtype=">i4"), (4, 1))
    (folder / "set" / "qmnist-train-images-idx3-ubyte").write_bytes(image_files.idx(image_files.noise(0, 4, 5, 5)))
    content = bytes([0, 0, 12, 2]) + struct.pack(">2I", 4, 8) + labels.tobytes()
    (folder / "set" / "qmnist-train-labels-idx2-int").write_bytes(content)
    return image_files.Written(folder / "set", "", {})


ANIMATED = {"save_all": True, "append_images": [Image.new("RGB", (12, 12), "red")]}
TARGETS = {
    "npy": Target(write_npy),
    "npz": Target(WRITERS["npz"], checked=True),
    "npz, inside": Target(WRITERS["npz"], mutate=inside_npz),
    "npz stored": Target(WRITERS["npz-stored"], checked=True),
    "npz LZMA": Target(WRITERS["npz-lzma"], checked=True),
    "imagenet": Target(WRITERS["imagenet"], "train_data_batch_7.npz", checked=True),
    "imagenet, inside": Target(WRITERS["imagenet"], "train_data_batch_7.npz", inside_npz),
    "imagenet, pickled": Target(write_pickled_imagenet, "train_data_batch_1"),
    "cifar10 binary": Target(WRITERS["cifar10-binary"], "data_batch_2.bin"),
    "cifar10 binary, names": Target(WRITERS["cifar10-binary"], "batches.meta.txt"),
    "cifar10 python": Target(WRITERS["cifar10-python"], "data_batch_2"),
    "cifar10 python, names": Target(WRITERS["cifar10-python"], "batches.meta"),
    "cifar100 python": Target(WRITERS["cifar100-python"], "train"),
    "cifar10 archive": Target(WRITERS["cifar10-binary-archive"], checked=True),
    "cifar10 archive, inside": Target(WRITERS["cifar10-python-archive"], mutate=inside_tar),
    "cifar10 archive, headers": Target(WRITERS["cifar10-binary-archive"], mutate=headers_of_tar),
    "cifar100 archive, unpacked": Target(WRITERS["cifar100-binary-archive"], mutate=inside_gzip),
    "stl10": Target(WRITERS["stl10"], "train_X.bin"),
    "stl10 labels": Target(WRITERS["stl10"], "train_y.bin"),
    "stl10 archive, headers": Target(WRITERS["stl10-archive"], mutate=headers_of_tar),
    "idx": Target(WRITERS["mnist"], "train-images-idx3-ubyte"),
    "idx labels": Target(WRITERS["mnist"], "train-labels-idx1-ubyte"),
    "idx labels of integers": Target(write_qmnist, "qmnist-train-labels-idx2-int"),
    "idx.gz": Target(WRITERS["mnist-gz"], "train-images-idx3-ubyte.gz", checked=True),
    "idx.gz labels": Target(WRITERS["mnist-gz"], "train-labels-idx1-ubyte.gz", checked=True),
    "idx.gz, inside": Target(WRITERS["mnist-gz"], "train-images-idx3-ubyte.gz", inside_gzip),
    "png": Target(write_picture("png"), "a.png", checked=True),
    "png, inside": Target(write_picture("png"), "a.png", inside_png),
    "apng": Target(write_picture("apng", "PNG", **ANIMATED), "a.apng", checked=True),
    "jpeg": Target(write_picture("jpg", quality=80), "a.jpg"),
    "jpeg, progressive": Target(write_picture("jfif", "JPEG", progressive=True), "a.jfif"),
    "gif": Target(write_picture("gif"), "a.gif"),
    "gif, animated": Target(write_picture("gif", **ANIMATED), "a.gif"),
    "bmp": Target(write_picture("bmp"), "a.bmp"),
    "dib": Target(write_picture("dib"), "a.dib"),
    "webp": Target(write_picture("webp", lossless=True), "a.webp"),
    "tiff": Target(write_picture("tiff"), "a.tiff"),
    "tiff, deflated": Target(write_picture("tiff", compression="tiff_adobe_deflate"), "a.tiff"),
    "ppm": Target(write_picture("ppm"), "a.ppm"),
    "avif": Target(write_picture("avif"), "a.avif"),
    "jp2": Target(write_picture("jp2"), "a.jp2"),
}


def check_message(message: str, path: Path) -> None:
    assert message.startswith(printable(str(path)))
    assert message.isprintable(), "one line without commands to a terminal"


def seen(path: Path) -> Images | None:
    """The images at a path, or None if they are refused as they should be: by one line that begins with the path.

    What comes back is well formed, and its headers alone say the same.
    """
    try:
        with time_limit(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            images = open_images(path, max_bytes=MAX_BYTES)
    except DataError as error:
        check_message(str(error), path)
        for reads_less in (image_format, split_of):
            with time_limit(), suppress(DataError):
                reads_less(path)
        return None
    assert images.pixels.dtype == torch.uint8
    assert images.pixels.ndim == 4
    assert 0 < images.pixels.numel() <= MAX_BYTES
    assert images.labels is None or images.labels.shape == (len(images),)
    with time_limit():
        assert image_format(path) == tuple(images.pixels.shape[1:])
        assert split_of(path) == images.split
    return images


@contextmanager
def try_number(number: int) -> Iterator[None]:
    """Names the try in whatever escapes."""
    try:
        yield
    except BaseException as error:
        raise AssertionError(f"try {number}: {type(error).__name__}: {error}") from error


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_files_are_refused_or_read(name: str, tmp_path: Path, tries: int) -> None:
    target = TARGETS[name]
    path = target.writer(tmp_path).path
    file = path / target.file if target.file else path
    whole = file.read_bytes()
    original = seen(path)
    assert original is not None
    refused = 0
    for number in range(tries):
        file.write_bytes(target.mutate(whole, np.random.default_rng([number, len(name)])))
        with try_number(number):
            images = seen(path)
            refused += images is None
            if target.checked and images is not None:
                assert torch.equal(images.pixels, original.pixels)
                assert (images.labels is None) == (original.labels is None)
                assert images.labels is None or torch.equal(images.labels, original.labels)
    assert refused >= tries // 20, "the mutations do reach the reader's checks"


def test_random_pickles_are_refused_or_read(tries: int) -> None:
    """Mutated programs by themselves, a hundred times faster than in files: the machine below CIFAR's reader."""
    whole = image_files.python2_pickle(image_files.noise(0, 2, 4), [3, 1], b"labels")
    for number in range(50 * tries):
        with try_number(number), time_limit(), suppress(DataError):
            read_pickle("p", mutated(whole, np.random.default_rng([number, 1])))


# Names, places and wrappers -------------------------------------------------------------------------------------------

ODD_NAMES = (
    "a",
    "-rf",
    " ",
    "ä",
    "日本",
    "a\nb",
    "\x1b[2J",
    "\u202ea",
    "%s",
    "{}",
    "'",
    "a" * 200,
    "a.png",
    "COM1",
    "*",
)
JUNK = (
    b"",
    b"\0",
    b"PK\3\4",
    b"\x1f\x8b",
    b"\x89PNG\r\n\x1a\n",
    b"<!DOCTYPE html>",
    b"II*\0",
    b"GIF89a",
    b"\xff\xd8\xff",
)


def odd_name(random: np.random.Generator) -> bytes:
    name = os.fsencode(ODD_NAMES[random.integers(len(ODD_NAMES))])
    return b"\xff" + name if random.integers(8) == 0 else name


def grow_tree(root: bytes, random: np.random.Generator, pictures: dict[bytes, int]) -> bool:
    """Fills a folder at random and adds each whole picture to `pictures`, with its color. False if any is broken."""
    whole = True
    for number in range(random.integers(1, 5)):
        path = os.path.join(root, odd_name(random) + b"%d" % number)
        kind = random.integers(10)
        if kind < 2:
            os.mkdir(path)
            whole &= grow_tree(path, random, pictures)
            if not os.listdir(path):
                os.rmdir(path)
        elif kind < 7:
            color, form = len(pictures), ("PNG", "TIFF", "BMP", "GIF", "PPM")[random.integers(5)]
            # The suffix need not be that of the format.
            path += os.fsencode(IMAGE_SUFFIXES[random.integers(len(IMAGE_SUFFIXES))])
            path = path.upper() if random.integers(2) and path.isascii() and root.isupper() else path
            with open(path, "wb") as file:
                Image.new("L", (3, 2), color).save(file, form)
            pictures[path] = color
        elif kind == 7:
            with open(path + (b".txt", b".heic", b"")[random.integers(3)], "wb") as file:
                file.write(JUNK[random.integers(len(JUNK))])
        elif kind == 8:
            os.symlink((b".", b"nowhere", os.path.basename(path), root)[random.integers(4)], path)
        elif random.integers(4) == 0:
            with open(path + b".png", "wb") as file:
                file.write(JUNK[random.integers(len(JUNK))])
            whole = False
    return whole


def test_trees_of_odd_names_are_read_in_order(tmp_path: Path, tries: int) -> None:
    outcomes = {"read": 0, "refused": 0}
    for number in range(tries):
        random = np.random.default_rng([number, 2])
        root = tmp_path / str(number)
        root.mkdir()
        pictures: dict[bytes, int] = {}
        whole = grow_tree(os.fsencode(root), random, pictures)
        with try_number(number):
            images = seen(root)
            top = root if images is None else Path(images.name)
            paths = sorted(map(Path, map(os.fsdecode, pictures)), key=lambda path: path.relative_to(root).parts)
            classes = {path.relative_to(top).parts[0] for path in paths if path.is_relative_to(top)}
            if images is None:
                folders = {entry.name for entry in os.scandir(root) if not entry.is_symlink() and entry.is_dir()}
                assert not whole or not pictures or folders, "a folder of whole pictures is read"
            else:
                assert whole, "no broken picture is left out"
                assert images.pixels[:, 0, 0, 0].tolist() == [pictures[os.fsencode(path)] for path in paths]
                if images.labels is not None:
                    assert images.classes == tuple(sorted(classes))
                    folders = [images.classes[label] for label in images.labels.tolist()]
                    assert folders == [path.relative_to(top).parts[0] for path in paths]
        outcomes["refused" if images is None else "read"] += 1
        shutil.rmtree(root)
    assert min(outcomes.values()) >= tries // 20


def in_gzip(name: str, content: bytes) -> bytes:
    return gzip.compress(content, 1)


def in_tar(name: str, content: bytes) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        entry = tarfile.TarInfo(name)
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    return packed.getvalue()


def in_zip(name: str, content: bytes) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return packed.getvalue()


WRAPPERS = (in_gzip, in_tar, in_zip)
SINGLE_FILES = {
    "npy": write_npy,
    "npz": WRITERS["npz"],
    "cifar": WRITERS["cifar10-binary-archive"],
    "idx": lambda folder: image_files.Written(WRITERS["mnist"](folder).path / "train-images-idx3-ubyte", "", {}),
}
SUFFIXES = (".npz", ".npy", ".tar.gz", ".gz", ".png", ".bin", "", ".", ".idx", "-images-idx3-ubyte", ".txt")


def test_files_of_any_name_and_files_in_files(tmp_path: Path, tries: int) -> None:
    """A name says nothing where the content does; an archive in an archive is refused, or read as what is in it."""
    whole, original = {}, {}
    for name, write in SINGLE_FILES.items():
        (tmp_path / name).mkdir()
        path = write(tmp_path / name).path
        whole[name], original[name] = path.read_bytes(), open_images(path)
    read = 0
    for number in range(tries):
        random = np.random.default_rng([number, 3])
        name = list(whole)[random.integers(len(whole))]
        content = whole[name]
        wrappers = [WRAPPERS[random.integers(len(WRAPPERS))] for _ in range(random.integers(4))]
        for wrapper in wrappers:
            inner = ("data_batch_1.bin", "train_X.bin", "x_train.npy", "a.npz", "meta")[random.integers(5)]
            content = wrapper(inner, content)
        path = tmp_path / os.fsdecode(odd_name(random) + os.fsencode(SUFFIXES[random.integers(len(SUFFIXES))]))
        path.write_bytes(content)
        with try_number(number):
            images = seen(path)
            assert images is not None or wrappers, "a whole file is read whatever its name"
            if images is not None:
                assert torch.equal(images.pixels, original[name].pixels)
                read += 1
        path.unlink()
    assert read >= tries // 10


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="everything is readable for root")
def test_what_may_not_be_read(tmp_path: Path) -> None:
    for name in ("npz", "pictures", "mnist", "cifar10-binary"):
        folder = tmp_path / name
        folder.mkdir()
        written = WRITERS[name](folder)
        for path in [*written.path.rglob("*"), written.path] if written.path.is_dir() else [written.path]:
            path.chmod(0)
            try:
                assert seen(written.path) is None or path.name in ("notes.txt", "thumb.png", ".cache", "readme.html")
            finally:
                path.chmod(0o700)
