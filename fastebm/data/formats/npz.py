"""Image sets in .npz and .npy files, by the names of their arrays; also the parts of the downsampled ImageNet."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastebm.data.errors import DataError
from fastebm.data.formats.axes import channels_first
from fastebm.data.formats.byte_reader import open_bytes
from fastebm.data.formats.npy import StoredArray, open_npz, read_array_header
from fastebm.data.images import Images, resolve_split
from fastebm.data.preprocessing import Preprocessing

# Names of images and labels in Keras' MNIST and our own sets, and in MedMNIST.
_NAME_PATTERNS = (("x_{}", "y_{}"), ("{}_images", "{}_labels"))
_SPLITS = ("train", "test", "val")
_LABELS = ("y", "labels", "label")
_IMAGENET_CLASSES = 1000
_IMAGENET_TRAIN = re.compile(r"train_data_batch_(\d{1,3})\.npz")
_IMAGENET_TEST = "val_data.npz"


def read_npy(path: Path, preprocessing: Preprocessing, split: str | None) -> Images:
    """The images of a file with one array."""
    split = resolve_split(str(path), split, ())
    with open_bytes(path) as reader:
        return Images(_read_pixels(read_array_header(reader), preprocessing), None, str(path), "numpy array", split)


def read_npz(path: Path, preprocessing: Preprocessing, split: str | None, key: str | None = None) -> Images:
    """The images of an archive: those of `key`, of x_train or x_test, of an ImageNet part, or the only ones."""
    with open_npz(path) as arrays:
        if key is None and is_imagenet(arrays):
            return _read_imagenet_parts(str(path), [arrays], preprocessing, resolve_split(str(path), split, ()))
        labels = None
        if key is not None:
            if key not in arrays:
                raise DataError(f"{path}: has no array {key!r}; it has {_describe(arrays)}")
            split = resolve_split(str(path), split, ())
        elif pattern := next((names for names in _NAME_PATTERNS if _available_splits(names[0], arrays)), None):
            split = resolve_split(str(path), split, _available_splits(pattern[0], arrays))
            key, labels_key = (name.format(split) for name in pattern)
            labels = arrays.get(labels_key)
        else:
            split = resolve_split(str(path), split, ())
            key = _find_images(path, arrays)
            labels = next((arrays[name] for name in _LABELS if name in arrays and name != key), None)
        pixels = _read_pixels(arrays[key], preprocessing)
        numbers = None if labels is None else labels.labels(len(pixels))
        return Images(pixels, numbers, str(path), f"npz, array {key}", split)


def is_imagenet(arrays: Mapping[str, StoredArray]) -> bool:
    """Whether the arrays are a part of the downsampled ImageNet: labels, and `data` with one row per image."""
    data = arrays.get("data")
    return data is not None and "labels" in arrays and len(data.shape) == 2 and _side(data) > 0


def find_imagenet_files(folder: Path, names: Sequence[str]) -> dict[str, list[Path]]:
    """The files of the downsampled ImageNet among a folder's `names`, by split, parts in the order of their numbers.

    Raises DataError for a gap in the numbers, because a part is missing.
    """
    numbers = sorted(int(match[1]) for name in names if (match := _IMAGENET_TRAIN.fullmatch(name)))
    if numbers and numbers != list(range(1, len(numbers) + 1)):
        missing = min(set(range(1, numbers[-1])) - set(numbers), default=numbers[-1])
        raise DataError(f"{folder}: train_data_batch_{missing}.npz is missing or there twice")
    files = {"train": [folder / f"train_data_batch_{number}.npz" for number in numbers]}
    files["test"] = [folder / _IMAGENET_TEST] if _IMAGENET_TEST in names else []
    return {split: paths for split, paths in files.items() if paths}


def read_imagenet(
    folder: Path, files: Mapping[str, Sequence[Path]], preprocessing: Preprocessing, split: str | None
) -> Images:
    """All parts of one split, read one after another into one tensor."""
    split = resolve_split(str(folder), split, tuple(files))
    with ExitStack() as stack:
        parts = [stack.enter_context(open_npz(path)) for path in files[split]]
        for path, arrays in zip(files[split], parts, strict=True):
            if not is_imagenet(arrays):
                raise DataError(f"{path}: has no data (N, 3 * s * s) with labels; it has {_describe(arrays)}")
        if len({arrays["data"].shape[1] for arrays in parts}) > 1:
            raise DataError(f"{folder}: its parts hold images of several sizes")
        return _read_imagenet_parts(str(folder), parts, preprocessing, split)


def _read_imagenet_parts(
    name: str, parts: Sequence[Mapping[str, StoredArray]], preprocessing: Preprocessing, split: str
) -> Images:
    side = _side(parts[0]["data"])
    rows = itertools.chain.from_iterable(arrays["data"].chunks() for arrays in parts)
    pixels = preprocessing.collect(
        parts[0]["data"].name if len(parts) == 1 else name,
        sum(arrays["data"].shape[0] for arrays in parts),
        (chunk.reshape(-1, 3, side, side) for chunk in rows),
    )
    labels = [
        check_labels(part["labels"].name, part["labels"].labels(part["data"].shape[0]), _IMAGENET_CLASSES, first=1)
        for part in parts
    ]
    return Images(pixels, torch.cat(labels), name, f"downsampled ImageNet ({side}x{side}), npz parts", split)


def check_labels(name: str, labels: Tensor, classes: int, first: int = 0) -> Tensor:
    """Labels counted from 0, of labels that are counted from `first`. Raises DataError for a label out of range."""
    wrong = labels[(labels < first) | (labels >= first + classes)]
    if len(wrong):
        raise DataError(f"{name}: the label {int(wrong[0])} is not in {first} to {classes - 1 + first}")
    return labels - first


def _side(data: StoredArray) -> int:
    """The side of the images in the rows of `data` (N, 3 * side * side); 0 if the rows have no such length."""
    side = math.isqrt(data.shape[1] // 3)
    return side if 3 * side * side == data.shape[1] else 0


def _available_splits(pattern: str, arrays: Mapping[str, StoredArray]) -> tuple[str, ...]:
    return tuple(split for split in _SPLITS if pattern.format(split) in arrays)


def _find_images(path: Path, arrays: Mapping[str, StoredArray]) -> str:
    """The name of the only array that can be images."""
    candidates = [key for key, array in arrays.items() if array.dtype == np.uint8 and len(array.shape) in (3, 4)]
    if len(candidates) == 1:
        return candidates[0]
    if not candidates:
        raise DataError(f"{path}: no array is uint8 with 3 or 4 axes, as images are; it has {_describe(arrays)}")
    raise DataError(f"{path}: several arrays could be the images: say which by key; it has {_describe(arrays)}")


def _describe(arrays: Mapping[str, StoredArray]) -> str:
    shown = [f"{key}: {array}" for key, array in itertools.islice(arrays.items(), 10)]
    return ", ".join(shown) + (", ..." if len(arrays) > 10 else "")


def _read_pixels(array: StoredArray, preprocessing: Preprocessing) -> Tensor:
    if not array.shape:
        raise DataError(f"{array.name}: is a single number")
    chunks = (channels_first(array.name, chunk) for chunk in array.chunks())
    return preprocessing.collect(array.name, array.shape[0], chunks)
