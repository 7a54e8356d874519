"""Image sets in .npz and .npy files: which array is which, and the parts of the downsampled ImageNet."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastebm.data.errors import DataError
from fastebm.data.formats.layout import channels_first
from fastebm.data.formats.npy import StoredArray, open_npy, open_npz
from fastebm.data.images import Images, pick_split
from fastebm.data.preprocessing import Preprocessing

# What writers in use call images and labels: Keras' MNIST and ours, and MedMNIST.
_NAMES = (("x_{}", "y_{}"), ("{}_images", "{}_labels"))
_SPLITS = ("train", "test", "val")
_LABELS = ("y", "labels", "label")
_IMAGENET_CLASSES = 1000
_PART = re.compile(r"train_data_batch_(\d{1,3})\.npz")
_HELD_OUT = "val_data.npz"


def read_npy(path: Path, shaping: Preprocessing, split: str | None) -> Images:
    """The images of a file with one array."""
    split = pick_split(str(path), split, ())
    with open_npy(path) as array:
        return Images(_pixels(array, shaping), None, str(path), "numpy array", split)


def read_npz(path: Path, shaping: Preprocessing, split: str | None, key: str | None = None) -> Images:
    """The images of an archive: those of `key`, of x_train or x_test, of an ImageNet part, or the only ones."""
    with open_npz(path) as arrays:
        if key is not None:
            if key not in arrays:
                raise DataError(f"{path}: has no array {key!r}; it has {_listing(arrays)}")
            split = pick_split(str(path), split, ())
            return Images(_pixels(arrays[key], shaping), None, str(path), f"npz, array {key}", split)
        if is_imagenet(arrays):
            split = pick_split(str(path), split, ())
            return _imagenet(str(path), [arrays], shaping, split)
        names, splits = _names(arrays)
        split = pick_split(str(path), split, splits)
        if names:
            images, labels = (pattern.format(split) for pattern in names)
            found = arrays.get(labels)
        else:
            images = _only_images(path, arrays)
            found = next((arrays[name] for name in _LABELS if name in arrays and name != images), None)
        pixels = _pixels(arrays[images], shaping)
        return Images(
            pixels, None if found is None else found.labels(len(pixels)), str(path), f"npz, array {images}", split
        )


def is_imagenet(arrays: Mapping[str, StoredArray]) -> bool:
    """Whether the arrays are those of a part of the downsampled ImageNet: rows of whole images under `data`."""
    data = arrays.get("data")
    return data is not None and "labels" in arrays and len(data.shape) == 2 and _side(data) > 0


def imagenet_files(folder: Path, names: Sequence[str]) -> dict[str, list[Path]]:
    """The files of the downsampled ImageNet among a folder's `names`, by split, parts in the order of their numbers.

    Raises DataError for a gap in the numbers: then a part is missing.
    """
    numbers = sorted(int(match[1]) for name in names if (match := _PART.fullmatch(name)))
    if numbers and numbers != list(range(1, len(numbers) + 1)):
        missing = min(set(range(1, numbers[-1])) - set(numbers), default=numbers[-1])
        raise DataError(f"{folder}: train_data_batch_{missing}.npz is missing or there twice")
    files = {"train": [folder / f"train_data_batch_{number}.npz" for number in numbers]}
    files["test"] = [folder / _HELD_OUT] if _HELD_OUT in names else []
    return {split: paths for split, paths in files.items() if paths}


def read_imagenet(
    folder: Path, files: Mapping[str, Sequence[Path]], shaping: Preprocessing, split: str | None
) -> Images:
    """All parts of one split as one set, read one after another into one tensor."""
    split = pick_split(str(folder), split, tuple(files))
    with ExitStack() as stack:
        parts = [stack.enter_context(open_npz(path)) for path in files[split]]
        for path, arrays in zip(files[split], parts, strict=True):
            if not is_imagenet(arrays):
                raise DataError(f"{path}: has no data (N, 3 * s * s) with labels; it has {_listing(arrays)}")
        if len({arrays["data"].shape[1] for arrays in parts}) > 1:
            raise DataError(f"{folder}: its parts hold images of several sizes")
        return _imagenet(str(folder), parts, shaping, split)


def _imagenet(name: str, parts: Sequence[Mapping[str, StoredArray]], shaping: Preprocessing, split: str) -> Images:
    side = _side(parts[0]["data"])
    rows = itertools.chain.from_iterable(arrays["data"].chunks() for arrays in parts)
    pixels = shaping.gather(
        parts[0]["data"].name if len(parts) == 1 else name,
        sum(arrays["data"].shape[0] for arrays in parts),
        (chunk.reshape(-1, 3, side, side) for chunk in rows),
    )
    labels = torch.cat([_imagenet_labels(arrays) for arrays in parts])
    return Images(pixels, labels, name, f"downsampled ImageNet ({side}x{side}), npz parts", split)


def _imagenet_labels(arrays: Mapping[str, StoredArray]) -> Tensor:
    labels = arrays["labels"].labels(arrays["data"].shape[0])
    return checked_labels(arrays["labels"].name, labels - 1, _IMAGENET_CLASSES, first=1)


def checked_labels(name: str, labels: Tensor, classes: int, first: int = 0) -> Tensor:
    """Labels in [0, classes), which the file counts from `first`; others are an error."""
    if len(labels) and not (int(labels.min()) >= 0 and int(labels.max()) < classes):
        wrong = next(label for label in labels.tolist() if not 0 <= label < classes)
        raise DataError(f"{name}: the label {wrong + first} is not in {first} to {classes - 1 + first}")
    return labels


def _side(data: StoredArray) -> int:
    """The side of the images whose rows `data` (N, 3 * side * side) holds; 0 if rows have no such length."""
    side = math.isqrt(data.shape[1] // 3)
    return side if 3 * side * side == data.shape[1] else 0


def _names(arrays: Mapping[str, StoredArray]) -> tuple[tuple[str, str] | None, tuple[str, ...]]:
    """The pattern by which images and labels are named, and the splits that are there."""
    for names in _NAMES:
        splits = tuple(split for split in _SPLITS if names[0].format(split) in arrays)
        if splits:
            return names, splits
    return None, ()


def _only_images(path: Path, arrays: Mapping[str, StoredArray]) -> str:
    candidates = [key for key, array in arrays.items() if array.dtype == np.uint8 and len(array.shape) in (3, 4)]
    if len(candidates) == 1:
        return candidates[0]
    if not candidates:
        raise DataError(f"{path}: no array is uint8 with 3 or 4 axes, as images are; it has {_listing(arrays)}")
    raise DataError(f"{path}: several arrays could be the images: say which by key; it has {_listing(arrays)}")


def _listing(arrays: Mapping[str, StoredArray]) -> str:
    shown = [f"{key}: {array}" for key, array in itertools.islice(arrays.items(), 10)]
    return ", ".join(shown) + (", ..." if len(arrays) > 10 else "")


def _pixels(array: StoredArray, shaping: Preprocessing) -> Tensor:
    if not array.shape:
        raise DataError(f"{array.name}: is a single number")
    return shaping.gather(array.name, array.shape[0], _channels_first(array))


def _channels_first(array: StoredArray) -> Iterator[NDArray[np.uint8]]:
    for chunk in array.chunks():
        yield channels_first(array.name, chunk)
