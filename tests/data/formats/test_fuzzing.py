"""Thousands of damaged files: each is refused by a DataError with its name, or read to arrays of the right shape.

Mutations change the file itself, or the content of its container, which is then packed again so that its checksum does
not reveal the damage. Seeds are fixed, and a failure names the number of its mutation.
"""

from __future__ import annotations

import gzip
import io
import signal
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastebm.data import DataError, open_images
from fastebm.data.formats.pickles import read_pickle
from tests.data import image_files
from tests.data.image_files import WRITERS

MUTATIONS = 240
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


# Targets --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A file of a set to be mutated ("": the set is that file), and how."""

    writer: Callable[[Path], image_files.Written]
    file: str = ""
    mutate: Callable[[bytes, np.random.Generator], bytes] = mutated


def write_picture(suffix: str, **options: object) -> Callable[[Path], image_files.Written]:
    def write(folder: Path) -> image_files.Written:
        ramp = np.broadcast_to(np.arange(0, 240, 20, dtype=np.uint8)[:, None, None], (12, 12, 3))
        (folder / "pictures").mkdir()
        Image.fromarray(ramp).save(folder / "pictures" / f"a.{suffix}", **options)
        return image_files.Written(folder / "pictures", "folder of pictures", {})

    return write


def write_npy(folder: Path) -> image_files.Written:
    np.save(folder / "set.npy", image_files.noise(0, 4, 6, 6, 3))
    return image_files.Written(folder / "set.npy", "numpy array", {})


TARGETS = {
    "npy": Target(write_npy),
    "npz": Target(WRITERS["npz"]),
    "npz, inside": Target(WRITERS["npz"], mutate=inside_npz),
    "npz stored": Target(WRITERS["npz-stored"]),
    "npz LZMA": Target(WRITERS["npz-lzma"]),
    "imagenet": Target(WRITERS["imagenet"], "train_data_batch_7.npz"),
    "imagenet, inside": Target(WRITERS["imagenet"], "train_data_batch_7.npz", inside_npz),
    "cifar10 binary": Target(WRITERS["cifar10-binary"], "data_batch_2.bin"),
    "cifar10 binary, names": Target(WRITERS["cifar10-binary"], "batches.meta.txt"),
    "cifar10 python": Target(WRITERS["cifar10-python"], "data_batch_2"),
    "cifar10 python, names": Target(WRITERS["cifar10-python"], "batches.meta"),
    "cifar100 python": Target(WRITERS["cifar100-python"], "train"),
    "cifar10 archive": Target(WRITERS["cifar10-binary-archive"]),
    "cifar10 archive, inside": Target(WRITERS["cifar10-python-archive"], mutate=inside_tar),
    "cifar10 archive, headers": Target(WRITERS["cifar10-binary-archive"], mutate=headers_of_tar),
    "cifar100 archive, unpacked": Target(WRITERS["cifar100-binary-archive"], mutate=inside_gzip),
    "stl10": Target(WRITERS["stl10"], "train_X.bin"),
    "stl10 labels": Target(WRITERS["stl10"], "train_y.bin"),
    "stl10 archive, headers": Target(WRITERS["stl10-archive"], mutate=headers_of_tar),
    "idx": Target(WRITERS["mnist"], "train-images-idx3-ubyte"),
    "idx labels": Target(WRITERS["mnist"], "train-labels-idx1-ubyte"),
    "idx.gz": Target(WRITERS["mnist-gz"], "train-images-idx3-ubyte.gz"),
    "idx.gz, inside": Target(WRITERS["mnist-gz"], "train-images-idx3-ubyte.gz", inside_gzip),
    "png": Target(write_picture("png"), "a.png"),
    "jpeg": Target(write_picture("jpg", quality=80), "a.jpg"),
    "gif": Target(write_picture("gif"), "a.gif"),
    "bmp": Target(write_picture("bmp"), "a.bmp"),
    "webp": Target(write_picture("webp", lossless=True), "a.webp"),
    "tiff": Target(write_picture("tiff"), "a.tiff"),
    "tiff, deflated": Target(write_picture("tiff", compression="tiff_adobe_deflate"), "a.tiff"),
    "ppm": Target(write_picture("ppm"), "a.ppm"),
}


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_files_are_refused_or_read(name: str, tmp_path: Path) -> None:
    target = TARGETS[name]
    path = target.writer(tmp_path).path
    file = path / target.file if target.file else path
    whole = file.read_bytes()
    assert isinstance(open_images(path).pixels, torch.Tensor)
    refusals = []
    for number in range(MUTATIONS):
        random = np.random.default_rng([number, len(name)])
        file.write_bytes(target.mutate(whole, random))
        try:
            with time_limit():
                images = open_images(path, max_bytes=MAX_BYTES)
        except DataError as error:
            refusals.append(str(error))
        except BaseException as error:
            raise AssertionError(f"mutation {number} of {name} is neither refused nor read") from error
        else:
            assert images.pixels.dtype == torch.uint8, f"mutation {number}"
            assert images.pixels.ndim == 4, f"mutation {number}"
            assert 0 < images.pixels.numel() <= MAX_BYTES, f"mutation {number}"
            assert images.labels is None or images.labels.shape == (len(images),), f"mutation {number}"
    assert [refusal for refusal in refusals if not refusal.startswith(str(path))] == []
    assert len(refusals) >= MUTATIONS // 20, "the mutations do reach the reader's checks"


def test_random_pickles_are_refused_or_read() -> None:
    """Mutated programs by themselves, a hundred times faster than in files: the machine below CIFAR's reader."""
    whole = image_files.python2_pickle(image_files.noise(0, 2, 4), [3, 1], b"labels")
    for number in range(5000):
        random = np.random.default_rng([number, 1])
        try:
            with time_limit():
                read_pickle("p", mutated(whole, random))
        except DataError:
            pass
        except BaseException as error:
            raise AssertionError(f"mutation {number} is neither refused nor read") from error
