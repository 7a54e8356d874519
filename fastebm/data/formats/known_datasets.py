"""Data sets that are a handful of files of known names: CIFAR-10, CIFAR-100 and STL-10, as folders or tar archives."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastebm.data.errors import DataError
from fastebm.data.formats.archives import files_of
from fastebm.data.formats.byte_reader import ByteReader
from fastebm.data.formats.npz import checked_labels
from fastebm.data.formats.pickles import read_pickle
from fastebm.data.images import Images, pick_split
from fastebm.data.preprocessing import Preprocessing

_LARGEST_PICKLE = 2**29  # that of CIFAR-100 has 155 MB
_LARGEST_LIST = 2**16  # of names of classes
_CIFAR = (3, 32, 32)
_STL = (3, 96, 96)


@dataclass(frozen=True)
class Part:
    """What one file holds: images, labels, or both."""

    pixels: Tensor | None
    labels: Tensor | None


@dataclass(frozen=True)
class Layout:
    """One kind of data set: names of its files, in the order of their images, and how they are read.

    Attributes:
        splits: the files of each split.
        names: the file with the names of the classes, which may be missing.
        read: makes images and labels of a split's file.
        read_names: makes names of the file with names.
        classes: how many there are.
    """

    format: str
    splits: Mapping[str, tuple[str, ...]]
    names: str
    read: Callable[[ByteReader, Preprocessing], Part]
    read_names: Callable[[ByteReader], tuple[str, ...]]
    classes: int

    def files(self) -> set[str]:
        return {self.names}.union(*self.splits.values())


def recognise(names: Iterable[str]) -> Layout | None:
    """The layout to which the first of these names belongs that any layout knows."""
    for name in names:
        for layout in LAYOUTS:
            if name in layout.files():
                return layout
    return None


def read_bundle(path: Path, shaping: Preprocessing, split: str | None) -> Images:
    """Images of a folder or archive, in one pass over its files, which may come in any order."""
    files = files_of(path)
    first, layout = _first_known(path, files)
    split = pick_split(str(path), split, tuple(layout.splits))
    wanted = layout.splits[split]
    parts: dict[str, Part] = {}
    classes: tuple[str, ...] = ()
    for name, reader in itertools.chain([first], files):
        if name == layout.names:
            classes = layout.read_names(reader)
            if len(classes) != layout.classes:
                raise DataError(
                    f"{reader.name}: names {len(classes)} classes, but {layout.format} has {layout.classes}"
                )
        elif name in wanted:
            parts[name] = layout.read(reader, shaping)
    missing = [name for name in wanted if name not in parts]
    if missing:
        raise DataError(f"{path}: {layout.format} without {', '.join(missing)}: incomplete")
    return _together(path, layout, split, [parts[name] for name in wanted], classes)


def _first_known(path: Path, files: Iterator[tuple[str, ByteReader]]) -> tuple[tuple[str, ByteReader], Layout]:
    """The first file that belongs to a layout, and that layout; the files before it are left behind."""
    for name, reader in files:
        if layout := recognise([name]):
            return (name, reader), layout
    raise DataError(f"{path}: has none of the files of {', '.join(layout.format for layout in LAYOUTS)}")


def _together(path: Path, layout: Layout, split: str, parts: list[Part], classes: tuple[str, ...]) -> Images:
    pixels = [part.pixels for part in parts if part.pixels is not None]
    labels = [part.labels for part in parts if part.labels is not None]
    images = sum(map(len, pixels))
    if labels and sum(map(len, labels)) != images:
        raise DataError(f"{path}: has {images} images but {sum(map(len, labels))} labels of split {split!r}")
    return Images(
        pixels[0] if len(pixels) == 1 else torch.cat(pixels),
        torch.cat(labels) if labels else None,
        str(path),
        layout.format,
        split,
        classes,
    )


# CIFAR, binary version: records of one or two labels and 3,072 pixels -------------------------------------------------


def _cifar_records(label_bytes: int, classes: int) -> Callable[[ByteReader, Preprocessing], Part]:
    """A reader of records whose last label byte is the (fine) label."""
    width = label_bytes + 3072

    def read(reader: ByteReader, shaping: Preprocessing) -> Part:
        count = _count(reader, width)
        labels: list[NDArray[np.uint8]] = []

        def pixels() -> Iterator[NDArray[np.uint8]]:
            for rows in reader.rows(count, width):
                labels.append(rows[:, label_bytes - 1])
                yield rows[:, label_bytes:].reshape(-1, *_CIFAR)

        gathered = shaping.gather(reader.name, count, pixels())
        numbers = torch.from_numpy(np.concatenate(labels).astype(np.int64))
        return Part(gathered, checked_labels(reader.name, numbers, classes))

    return read


def _count(reader: ByteReader, width: int) -> int:
    """How many records of a width a file holds."""
    size = reader.size
    if size is None:
        raise DataError(f"{reader.name}: is compressed by itself; unpack it first")
    if size == 0 or size % width:
        raise DataError(f"{reader.name}: {size:,} bytes are no whole number of records of {width:,}")
    return size // width


def _lines(reader: ByteReader) -> tuple[str, ...]:
    """The lines of a short text that are not empty."""
    content = _whole(reader, _LARGEST_LIST).decode("utf-8", "replace")
    return tuple(line.strip() for line in content.splitlines() if line.strip())


def _whole(reader: ByteReader, largest: int) -> bytes:
    if reader.size is None or reader.size > largest:
        raise DataError(f"{reader.name}: has more than the {largest:,} bytes that are expected there at most")
    return reader.read(reader.size)


# CIFAR, python version: pickled dicts of rows and labels --------------------------------------------------------------


def _cifar_pickle(labels_key: str, classes: int) -> Callable[[ByteReader, Preprocessing], Part]:
    def read(reader: ByteReader, shaping: Preprocessing) -> Part:
        content = _pickled_dict(reader)
        data, labels = content.get("data"), content.get(labels_key)
        if not (isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.ndim == 2 and data.shape[1] == 3072):
            raise DataError(f"{reader.name}: has no uint8 array (N, 3072) under 'data'")
        if not (isinstance(labels, list) and len(labels) == len(data) and all(type(i) is int for i in labels)):
            raise DataError(f"{reader.name}: has no list of {len(data)} whole numbers under {labels_key!r}")
        pixels = shaping.gather(reader.name, len(data), [data.reshape(-1, *_CIFAR)])
        return Part(pixels, checked_labels(reader.name, torch.tensor(labels, dtype=torch.int64), classes))

    return read


def _pickled_names(key: str) -> Callable[[ByteReader], tuple[str, ...]]:
    def read(reader: ByteReader) -> tuple[str, ...]:
        names = _pickled_dict(reader).get(key)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise DataError(f"{reader.name}: has no list of names under {key!r}")
        return tuple(names)

    return read


def _pickled_dict(reader: ByteReader) -> dict[Any, Any]:
    content = read_pickle(reader.name, _whole(reader, _LARGEST_PICKLE))
    if not isinstance(content, dict):
        raise DataError(f"{reader.name}: holds a {type(content).__name__}, where CIFAR has a dict")
    return content


# STL-10, binary: images in one file, labels in another ----------------------------------------------------------------


def _stl(reader: ByteReader, shaping: Preprocessing) -> Part:
    if reader.name.endswith("_y.bin"):
        labels = np.frombuffer(_whole(reader, _LARGEST_LIST * 16), np.uint8).astype(np.int64)
        return Part(None, checked_labels(reader.name, torch.from_numpy(labels) - 1, 10, first=1))
    count = _count(reader, 3 * 96 * 96)
    # Columns come first: what is stored is (channel, x, y).
    chunks = (rows.reshape(-1, *_STL).swapaxes(2, 3) for rows in reader.rows(count, 3 * 96 * 96))
    return Part(shaping.gather(reader.name, count, chunks), None)


_TEN_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))

LAYOUTS = (
    Layout(
        "CIFAR-10, binary version",
        {"train": tuple(f"{name}.bin" for name in _TEN_BATCHES), "test": ("test_batch.bin",)},
        "batches.meta.txt",
        _cifar_records(1, 10),
        _lines,
        10,
    ),
    Layout(
        "CIFAR-100, binary version",
        {"train": ("train.bin",), "test": ("test.bin",)},
        "fine_label_names.txt",
        _cifar_records(2, 100),
        _lines,
        100,
    ),
    Layout(
        "CIFAR-10, python version",
        {"train": _TEN_BATCHES, "test": ("test_batch",)},
        "batches.meta",
        _cifar_pickle("labels", 10),
        _pickled_names("label_names"),
        10,
    ),
    Layout(
        "CIFAR-100, python version",
        {"train": ("train",), "test": ("test",)},
        "meta",
        _cifar_pickle("fine_labels", 100),
        _pickled_names("fine_label_names"),
        100,
    ),
    Layout(
        "STL-10, binary version",
        {
            "train": ("train_X.bin", "train_y.bin"),
            "test": ("test_X.bin", "test_y.bin"),
            "unlabeled": ("unlabeled_X.bin",),
        },
        "class_names.txt",
        _stl,
        _lines,
        10,
    ),
)
