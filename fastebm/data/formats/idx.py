"""IDX files, the format of MNIST and its successors, plain or gzipped.

Format ("FILE FORMATS FOR THE MNIST DATABASE" on MNIST's page): two zero bytes, the type of the elements, the number of
axes, the length of each axis as a big-endian 32-bit number, then the elements.
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
from fastebm.data.images import Images, resolve_split
from fastebm.data.preprocessing import Preprocessing

_UINT8 = 8
_PREFIXES = {"train": "train", "test": "t10k"}


def is_idx(beginning: bytes) -> bool:
    """Whether a file with this (unpacked) beginning contains bytes in IDX."""
    return beginning[:3] == bytes([0, 0, _UINT8])


def find_idx_files(folder: Path, names: Sequence[str]) -> dict[str, Path]:
    """MNIST's image files among the `names` in a folder, by split."""
    found = {}
    for split, prefix in _PREFIXES.items():
        stems = (f"{prefix}-images-idx3-ubyte", f"{prefix}-images.idx3-ubyte")
        candidates = (stem + end for end in ("", ".gz") for stem in stems)
        if name := next((name for name in candidates if name in names), None):
            found[split] = folder / name
    return found


def read_idx_folder(folder: Path, files: Mapping[str, Path], preprocessing: Preprocessing, split: str | None) -> Images:
    """The images of one split and their labels."""
    split = resolve_split(str(folder), split, tuple(files))
    return _read(files[split], preprocessing, split, str(folder))


def read_idx(path: Path, preprocessing: Preprocessing, split: str | None) -> Images:
    """The images of one file, and the labels in the file of the corresponding name beside it, if there is one."""
    splits = tuple(split for split, prefix in _PREFIXES.items() if path.name.startswith(f"{prefix}-"))
    return _read(path, preprocessing, resolve_split(str(path), split, splits), str(path))


def _read(path: Path, preprocessing: Preprocessing, split: str, name: str) -> Images:
    with open_bytes(path) as reader:
        count, height, width = _read_shape(reader, axes=3)
        rows = reader.read_rows(count, height * width)
        pixels = preprocessing.collect(str(path), count, (chunk.reshape(-1, 1, height, width) for chunk in rows))
        reader.check_end()
    return Images(pixels, _read_labels(path, count), name, "IDX (MNIST)", split)


def _read_labels(path: Path, count: int) -> Tensor | None:
    """The labels that belong to a file of images, or None if there is no file with them."""
    stem = path.name.replace("images", "labels").replace("idx3", "idx1").removesuffix(".gz")
    candidates = (path.with_name(stem), path.with_name(f"{stem}.gz"))
    labels_path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if "images" not in path.name or labels_path is None:
        return None
    with open_bytes(labels_path) as reader:
        (num_labels,) = _read_shape(reader, axes=1)
        if num_labels != count:
            raise DataError(f"{labels_path}: has {num_labels:,} labels for {count:,} images")
        labels = np.frombuffer(reader.read(count), np.uint8).astype(np.int64)
        reader.check_end()
    return torch.from_numpy(labels)


def _read_shape(reader: ByteReader, axes: int) -> tuple[int, ...]:
    """The lengths of the axes, after a check that the file can hold as many elements."""
    magic = reader.read(4)
    if magic != bytes([0, 0, _UINT8, axes]):
        kind = "images" if axes == 3 else "labels"
        raise DataError(f"{reader.name}: begins with {magic.hex()}, not with 000008{axes:02x} as {kind} in IDX do")
    shape = struct.unpack(f">{axes}I", reader.read(4 * axes))
    reader.check_remaining(math.prod(shape))
    return shape
