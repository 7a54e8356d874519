"""IDX files, the format of MNIST and its successors, plain or gzipped.

Format ("FILE FORMATS FOR THE MNIST DATABASE" on MNIST's page): two zero bytes, the type of the elements, the number of
axes, the length of each axis as a big-endian 32-bit number, then the elements.

Some successors differ. The images of EMNIST are stored column by column, and its letters have the labels 1 to 26. The
labels of QMNIST are rows of eight 32-bit integers, of which the first is the class.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastebm.data.errors import DataError
from fastebm.data.formats.byte_reader import ByteReader, name_content, open_bytes
from fastebm.data.formats.npz import check_labels
from fastebm.data.images import Images, resolve_split
from fastebm.data.preprocessing import Preprocessing

_UINT8, _INT32 = 8, 12
_IMAGES = re.compile(r"(?:(?P<set>.+)-)?(?P<split>train|t10k|test)-images[-.]idx3-ubyte(?:\.gz)?")
_SPLITS = {"train": "train", "t10k": "test", "test": "test"}
_QMNIST_COLUMNS = 8
_LETTERS = 26


def is_idx(beginning: bytes) -> bool:
    """Whether a file with this (unpacked) beginning contains bytes in IDX."""
    return beginning[:3] == bytes([0, 0, _UINT8])


def find_idx_files(folder: Path, names: Sequence[str]) -> dict[str, Path]:
    """The image files of MNIST or a successor among the `names` in a folder, by split.

    The splits are "train" and "test", or for several sets in one folder, as in EMNIST's, "letters-train" and so on.
    """
    # An unpacked file comes after the packed one, and replaces it.
    matches = [match for name in sorted(names, reverse=True) if (match := _IMAGES.fullmatch(name))]
    several = len({match["set"] for match in matches}) > 1
    found = {}
    for match in matches:
        kind = f"{match['set'].removeprefix('emnist-')}-" if several and match["set"] else ""
        found[kind + _SPLITS[match["split"]]] = folder / match[0]
    return dict(sorted(found.items(), key=lambda item: (item[0].replace("train", ""), item[0])))


def read_idx_folder(folder: Path, files: Mapping[str, Path], preprocessing: Preprocessing, split: str | None) -> Images:
    """The images of one split and their labels."""
    split = resolve_split(str(folder), split, tuple(files))
    return _read(files[split], preprocessing, split, str(folder))


def read_idx(path: Path, preprocessing: Preprocessing, split: str | None) -> Images:
    """The images of one file, and the labels in the file of the corresponding name beside it, if there is one."""
    match = _IMAGES.fullmatch(path.name)
    splits = (_SPLITS[match["split"]],) if match else ()
    return _read(path, preprocessing, resolve_split(str(path), split, splits), str(path))


def _read(path: Path, preprocessing: Preprocessing, split: str, name: str) -> Images:
    by_columns = path.name.startswith("emnist-")
    with open_bytes(path) as reader:
        count, height, width = _read_shape(reader, axes=3)
        rows = reader.read_rows(count, height * width)
        chunks = (chunk.reshape(-1, 1, height, width) for chunk in rows)
        chunks = (chunk.swapaxes(2, 3) for chunk in chunks) if by_columns else chunks
        pixels = preprocessing.collect(str(path), count, chunks)
        reader.check_end()
    return Images(pixels, _read_labels(path, count), name, "IDX (MNIST)", split)


def _read_labels(path: Path, count: int) -> Tensor | None:
    """The labels that belong to a file of images, or None if there is no file with them."""
    stem = path.name.replace("images", "labels").removesuffix(".gz")
    stems = (stem.replace("idx3", "idx1"), stem.replace("idx3-ubyte", "idx2-int"))
    candidates = (path.with_name(stem + end) for stem in stems for end in ("", ".gz"))
    labels_path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if "images" not in path.name or labels_path is None:
        return None
    of_qmnist = "idx2-int" in labels_path.name
    with open_bytes(labels_path) as reader:
        num_labels, *columns = _read_shape(reader, axes=2, kind=_INT32) if of_qmnist else _read_shape(reader, axes=1)
        if num_labels != count or columns not in ([], [_QMNIST_COLUMNS]):
            form = f" of {columns[0]} numbers each, where {_QMNIST_COLUMNS} are needed," if columns else ""
            raise DataError(f"{labels_path}: has {num_labels:,} labels{form} for {count:,} images")
        content = reader.read(count * (4 * _QMNIST_COLUMNS if of_qmnist else 1))
        reader.check_end()
    numbers = np.frombuffer(content, ">i4" if of_qmnist else np.uint8).reshape(count, -1)[:, 0]
    labels = torch.from_numpy(numbers.astype(np.int64))
    is_letters = path.name.startswith("emnist-letters-")
    return check_labels(str(labels_path), labels, _LETTERS, first=1) if is_letters else labels


def _read_shape(reader: ByteReader, axes: int, kind: int = _UINT8) -> tuple[int, ...]:
    """The lengths of the axes, after a check that the file can hold as many elements."""
    magic, expected = reader.read(4), bytes([0, 0, kind, axes])
    if magic != expected:
        content = "images" if axes == 3 else "labels"
        what = name_content(magic + reader.read1(64))
        what = what or f"begins with {magic.hex()}, not with {expected.hex()} as {content} in IDX do"
        raise DataError(f"{reader.name}: {what}")
    shape = struct.unpack(f">{axes}I", reader.read(4 * axes))
    reader.check_remaining(math.prod(shape) * (4 if kind == _INT32 else 1))
    return shape
