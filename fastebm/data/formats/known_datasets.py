"""CIFAR, STL-10 and pickled ImageNet: data sets of a few files with known names, in a folder or a tar archive."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastebm.data.errors import DataError
from fastebm.data.formats.archives import iterate_files
from fastebm.data.formats.byte_reader import ByteReader
from fastebm.data.formats.npz import check_labels
from fastebm.data.formats.pickles import read_pickle
from fastebm.data.images import Images, resolve_split
from fastebm.data.preprocessing import Preprocessing

_MAX_PICKLE = 2**29  # bytes; that of CIFAR-100 has 155 MB
_MAX_LABELS = 2**20
_MAX_CLASS_NAMES = 2**16
_CIFAR = (3, 32, 32)
_STL = (3, 96, 96)

Part = tuple[Tensor | None, Tensor | None]
"""The images (N, C, H, W) and the labels (N,) in one file, either of which may be in another file instead."""


@dataclass(frozen=True)
class DatasetLayout:
    """The files of one data set and how to read them.

    Attributes:
        format: the name of the data set, for messages.
        splits: the files of each split, in the order of their images.
        names_file: the file with the names of the classes, which may be missing.
        read: reads a file of a split.
        read_names: reads the file with the names.
        classes: the number of classes.
        first_label: the number of the first class in the files.
        any_parts: whether the last files of a split may be missing.
    """

    format: str
    splits: Mapping[str, tuple[str, ...]]
    names_file: str
    read: Callable[[ByteReader, Preprocessing], Part]
    read_names: Callable[[ByteReader], tuple[str, ...]]
    classes: int
    first_label: int = 0
    any_parts: bool = False


def find_layout(names: Iterable[str]) -> DatasetLayout | None:
    """The layout that contains the first of these file names known to any layout."""
    for name in names:
        for layout in LAYOUTS:
            if name in {layout.names_file}.union(*layout.splits.values()):
                return layout
    return None


def read_known_dataset(path: Path, preprocessing: Preprocessing, split: str | None) -> Images:
    """The images of a folder or archive, in one pass over its files, which may be in any order."""
    layout: DatasetLayout | None = None
    parts: dict[str, Part] = {}
    classes: tuple[str, ...] = ()
    for name, reader in iterate_files(path):
        if layout is None:
            if not (layout := find_layout([name])):
                continue
            split = resolve_split(str(path), split, tuple(layout.splits))
        if name == layout.names_file:
            classes = layout.read_names(reader)
            if len(classes) != layout.classes:
                raise DataError(
                    f"{reader.name}: names {len(classes)} classes, but {layout.format} has {layout.classes}"
                )
        elif name in layout.splits[split or ""]:
            pixels, labels = layout.read(reader, preprocessing)
            if labels is not None:
                labels = check_labels(reader.name, labels, layout.classes, layout.first_label)
            parts[name] = pixels, labels
    if layout is None:
        raise DataError(f"{path}: has none of the files of {', '.join(layout.format for layout in LAYOUTS)}")
    names = layout.splits[split or ""]
    if layout.any_parts:
        names = names[: max(1, len(parts))]
    if missing := [name for name in names if name not in parts]:
        raise DataError(f"{path}: {layout.format} without {', '.join(missing)}: incomplete")
    all_pixels = [pixels for pixels, _ in map(parts.__getitem__, names) if pixels is not None]
    all_labels = [labels for _, labels in map(parts.__getitem__, names) if labels is not None]
    if len({pixels.shape[1:] for pixels in all_pixels}) > 1:
        raise DataError(f"{path}: its parts hold images of several sizes: give a size")
    count, num_labels = sum(map(len, all_pixels)), sum(map(len, all_labels))
    if all_labels and num_labels != count:
        raise DataError(f"{path}: has {count} images but {num_labels} labels of split {split!r}")
    return Images(
        all_pixels[0] if len(all_pixels) == 1 else torch.cat(all_pixels),
        torch.cat(all_labels) if all_labels else None,
        str(path),
        layout.format,
        split or "",
        classes,
    )


def _count_records(reader: ByteReader, width: int) -> int:
    """The number of records of `width` bytes in a file."""
    if reader.size is None:
        raise DataError(f"{reader.name}: is compressed by itself; unpack it first")
    if reader.size == 0 or reader.size % width:
        raise DataError(f"{reader.name}: {reader.size:,} bytes are not a multiple of the {width:,} bytes of a record")
    return reader.size // width


def _read_name_lines(reader: ByteReader) -> tuple[str, ...]:
    """The lines of a short text that are not empty."""
    lines = reader.read_all(_MAX_CLASS_NAMES).decode("utf-8", "replace").splitlines()
    return tuple(line.strip() for line in lines if line.strip())


def _read_cifar_records(label_bytes: int, reader: ByteReader, preprocessing: Preprocessing) -> Part:
    """CIFAR's binary version: records of one or two label bytes, of which the last is the label, and the pixels."""
    width = label_bytes + math.prod(_CIFAR)
    count = _count_records(reader, width)
    labels: list[NDArray[np.uint8]] = []

    def pixels() -> Iterator[NDArray[np.uint8]]:
        for rows in reader.read_rows(count, width):
            labels.append(rows[:, label_bytes - 1])
            yield rows[:, label_bytes:].reshape(-1, *_CIFAR)

    collected = preprocessing.collect(reader.name, count, pixels())
    return collected, torch.from_numpy(np.concatenate(labels).astype(np.int64))


def _read_pickled_batch(labels_key: str, side: int | None, reader: ByteReader, preprocessing: Preprocessing) -> Part:
    """CIFAR's python version, and ImageNet of any `side`: a pickled dict of rows of pixels and a list of labels."""
    content = _read_dict(reader)
    data, labels = content.get("data"), content.get(labels_key)
    width = data.shape[1] if isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.ndim == 2 else 0
    wanted = "3 * s * s" if side is None else 3 * side * side
    side = math.isqrt(width // 3) if side is None else side
    if not isinstance(data, np.ndarray) or width < 1 or width != 3 * side * side:
        raise DataError(f"{reader.name}: has no uint8 array (N, {wanted}) under 'data'")
    if not (isinstance(labels, list) and len(labels) == len(data) and all(type(i) is int for i in labels)):
        raise DataError(f"{reader.name}: has no list of {len(data)} integers under {labels_key!r}")
    pixels = preprocessing.collect(reader.name, len(data), [data.reshape(-1, 3, side, side)])
    return pixels, torch.tensor(labels, dtype=torch.int64, device="cpu")


def _read_pickled_names(key: str, reader: ByteReader) -> tuple[str, ...]:
    names = _read_dict(reader).get(key)
    if isinstance(names, list):
        names = [name.decode("latin-1") if isinstance(name, bytes) else name for name in names]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{reader.name}: has no list of names under {key!r}")
    return tuple(names)


def _read_dict(reader: ByteReader) -> dict[Any, Any]:
    content = read_pickle(reader.name, reader.read_all(_MAX_PICKLE))
    if not isinstance(content, dict):
        raise DataError(f"{reader.name}: holds a {type(content).__name__}, where a dict is needed")
    return content


def _read_stl(reader: ByteReader, preprocessing: Preprocessing) -> Part:
    """STL-10's binary version: pixels in one file, labels in another."""
    if reader.name.endswith("_y.bin"):
        return None, torch.from_numpy(np.frombuffer(reader.read_all(_MAX_LABELS), np.uint8).astype(np.int64))
    width = math.prod(_STL)
    count = _count_records(reader, width)
    # Stored as (channel, x, y), column by column.
    chunks = (rows.reshape(-1, *_STL).swapaxes(2, 3) for rows in reader.read_rows(count, width))
    return preprocessing.collect(reader.name, count, chunks), None


def _cifar_layouts(
    classes: int, train: tuple[str, ...], test: str, names_files: tuple[str, str], key_prefix: str, label_bytes: int
) -> tuple[DatasetLayout, DatasetLayout]:
    """The binary and the python version, whose files of images are called alike but for a suffix."""
    splits = {"train": train, "test": (test,)}
    return (
        DatasetLayout(
            f"CIFAR-{classes}, binary version",
            {split: tuple(f"{name}.bin" for name in names) for split, names in splits.items()},
            names_files[0],
            partial(_read_cifar_records, label_bytes),
            _read_name_lines,
            classes,
        ),
        DatasetLayout(
            f"CIFAR-{classes}, python version",
            splits,
            names_files[1],
            partial(_read_pickled_batch, f"{key_prefix}labels", _CIFAR[1]),
            partial(_read_pickled_names, f"{key_prefix}label_names"),
            classes,
        ),
    )


LAYOUTS = (
    *_cifar_layouts(
        10,
        tuple(f"data_batch_{number}" for number in range(1, 6)),
        "test_batch",
        names_files=("batches.meta.txt", "batches.meta"),
        key_prefix="",
        label_bytes=1,
    ),
    *_cifar_layouts(
        100, ("train",), "test", names_files=("fine_label_names.txt", "meta"), key_prefix="fine_", label_bytes=2
    ),
    DatasetLayout(
        "STL-10, binary version",
        {
            "train": ("train_X.bin", "train_y.bin"),
            "test": ("test_X.bin", "test_y.bin"),
            "unlabeled": ("unlabeled_X.bin",),
        },
        "class_names.txt",
        _read_stl,
        _read_name_lines,
        10,
        first_label=1,
    ),
    DatasetLayout(
        "downsampled ImageNet, pickled parts",
        {"train": tuple(f"train_data_batch_{number}" for number in range(1, 100)), "test": ("val_data",)},
        "",
        partial(_read_pickled_batch, "labels", None),
        _read_name_lines,
        1000,
        first_label=1,
        any_parts=True,
    ),
)
