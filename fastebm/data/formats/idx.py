"""IDX files, the format of MNIST and its successors, plain or gzipped.

Source: "FILE FORMATS FOR THE MNIST DATABASE" on the page of MNIST: two zero bytes, the type of the elements, the number
of axes, their lengths as big-endian 32-bit numbers, then the elements.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastebm.data.errors import DataError
from fastebm.data.formats.byte_reader import ByteReader, open_bytes
from fastebm.data.images import Images, pick_split
from fastebm.data.preprocessing import Preprocessing

_UINT8 = 8
_PREFIXES = {"train": "train", "test": "t10k"}


def is_idx(beginning: bytes) -> bool:
    """Whether a file with this (unpacked) beginning holds bytes in IDX."""
    return beginning[:3] == bytes([0, 0, _UINT8])


def idx_files(folder: Path, names: Sequence[str]) -> dict[str, Path]:
    """The files with images of each split of MNIST among the `names` in a folder."""
    found = {}
    for split, prefix in _PREFIXES.items():
        stems = (f"{prefix}-images-idx3-ubyte", f"{prefix}-images.idx3-ubyte")
        there = [stem + end for end in ("", ".gz") for stem in stems if stem + end in names]
        if there:
            found[split] = folder / there[0]
    return found


def read_idx_folder(folder: Path, files: Mapping[str, Path], shaping: Preprocessing, split: str | None) -> Images:
    """The images of one split, with the labels beside them."""
    split = pick_split(str(folder), split, tuple(files))
    return _read(files[split], shaping, split, str(folder))


def read_idx(path: Path, shaping: Preprocessing, split: str | None) -> Images:
    """The images of one file, with the labels of the file beside it that is called like it, if there is one."""
    of_file = next((known for known, prefix in _PREFIXES.items() if path.name.startswith(f"{prefix}-")), "")
    return _read(path, shaping, pick_split(str(path), split, (of_file,) if of_file else ()), str(path))


def _read(path: Path, shaping: Preprocessing, split: str, name: str) -> Images:
    with open_bytes(path) as reader:
        count, height, width = _shape(reader, axes=3)
        rows = reader.rows(count, height * width)
        pixels = shaping.gather(str(path), count, (chunk.reshape(-1, 1, height, width) for chunk in rows))
        reader.finish()
    labels_path = _labels_beside(path)
    labels = None if labels_path is None else _labels(labels_path, count)
    return Images(pixels, labels, name, "IDX (MNIST)", split)


def _labels(path: Path, count: int) -> Tensor:
    with open_bytes(path) as reader:
        (labelled,) = _shape(reader, axes=1)
        if labelled != count:
            raise DataError(f"{path}: has {labelled:,} labels for {count:,} images")
        labels = np.frombuffer(reader.read(count), np.uint8).astype(np.int64)
        reader.finish()
    return torch.from_numpy(labels)


def _labels_beside(path: Path) -> Path | None:
    if "images" not in path.name:
        return None
    stem = path.name.replace("images", "labels").replace("idx3", "idx1").removesuffix(".gz")
    candidates = (path.with_name(stem), path.with_name(f"{stem}.gz"))
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def _shape(reader: ByteReader, axes: int) -> tuple[int, ...]:
    """The lengths of the axes, after a look at whether the elements can all be there."""
    magic = reader.read(4)
    if magic != bytes([0, 0, _UINT8, axes]):
        what = "images" if axes == 3 else "labels"
        raise DataError(f"{reader.name}: begins with {magic.hex()}, not with 000008{axes:02x} as {what} in IDX do")
    shape = struct.unpack(f">{axes}I", reader.read(4 * axes))
    reader.expect(math.prod(shape))
    return shape
