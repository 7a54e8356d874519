"""The door to all readers: it looks at what it is given, and says what it took it for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from fastebm.data.errors import DataError, explaining
from fastebm.data.formats.archives import is_tar
from fastebm.data.formats.byte_reader import MAX_BYTES, begins_as_gzip, open_bytes
from fastebm.data.formats.datasets import MapDataset, read_dataset
from fastebm.data.formats.folders import read_folder
from fastebm.data.formats.idx import idx_files, is_idx, read_idx, read_idx_folder
from fastebm.data.formats.known_datasets import read_bundle, recognise
from fastebm.data.formats.npz import imagenet_files, read_imagenet, read_npy, read_npz
from fastebm.data.formats.pictures import SUFFIXES
from fastebm.data.images import Images
from fastebm.data.preprocessing import Preprocessing


def open_images(
    source: str | os.PathLike[str] | MapDataset | Mapping[str, MapDataset],
    size: int | None = None,
    channels: int | None = None,
    split: str | None = None,
    *,
    fit: Literal["resize", "pad"] = "resize",
    crop: int | None = None,
    key: str | None = None,
    max_bytes: int = MAX_BYTES,
) -> Images:
    """The images of a file, a folder or a data set, in memory as bytes.

    The format is recognised by content and by names of files: .npz and .npy, CIFAR-10 and CIFAR-100 (binary and python
    version) and STL-10 (binary) as archives or folders, IDX and IDX.gz (MNIST), npz parts of the downsampled ImageNet,
    folders of pictures, and data sets of PyTorch or Hugging Face. docs/data.md describes each.

    Args:
        source: a path, or an object with a length and items by number, or a mapping of splits to such objects.
        size: the side of the images in memory; by default as they are, which pictures of several sizes are not.
        channels: 1 (grey, by the luma of ITU-R 601) or 3; by default what the images have.
        split: "train", "test" or what else the set has; by default "train", or all of a set without splits.
        fit: how an image gets that size. "resize": the largest square in the middle, averaged down if a pixel becomes
            of whole ones, else resampled by Lanczos' filter. "pad": black around the image, no pixel changed.
        crop: the side of a square in the middle that is cut out before.
        key: the array of an .npz file that holds the images, where the names do not say; its labels are not read.
        max_bytes: how many bytes the images may take.

    Raises:
        DataError: for what can't be read, with its name and what is wrong; and for a split that is not there.
        ValueError: for a size, crop, channels or fit out of range, or a key for what is no .npz file.

    Example:
        >>> import numpy as np, fastebm
        >>> np.savez("faces.npz", x_train=np.zeros((10, 16, 16, 3), np.uint8), x_test=np.ones((2, 16, 16, 3), np.uint8))
        >>> fastebm.data.open_images("faces.npz", size=8)
        faces.npz, train: npz, array x_train: 10 images of 3x8x8, 0.0 MiB
    """
    shaping = Preprocessing(size, channels, fit, crop, max_bytes)
    if not isinstance(source, str | os.PathLike):
        _refuse_key(key)
        if not isinstance(source, MapDataset):
            raise DataError(f"{type(source).__name__}: is neither a path nor has it a length and items by number")
        return read_dataset(source, shaping, split)
    return open_path(Path(source), shaping, split, key)


def open_path(path: Path, shaping: Preprocessing, split: str | None, key: str | None) -> Images:
    """The images of a file or folder, each through `shaping`. Raises DataError as `open_images` does."""
    if path.is_dir():
        _refuse_key(key)
        return _open_folder(path, shaping, split)
    if not path.exists():
        raise DataError(f"{path}: there is no such file or folder")
    if not path.is_file():
        raise DataError(f"{path}: is neither a file nor a folder")
    return _open_file(path, shaping, split, key)


def _open_folder(path: Path, shaping: Preprocessing, split: str | None) -> Images:
    with explaining(str(path), "can't be listed"):
        names = sorted(entry.name for entry in os.scandir(path) if entry.is_file())
    if recognise(names) is not None:
        return read_bundle(path, shaping, split)
    if idx := idx_files(path, names):
        return read_idx_folder(path, idx, shaping, split)
    if parts := imagenet_files(path, names):
        return read_imagenet(path, parts, shaping, split)
    return read_folder(path, shaping, split)


def _open_file(path: Path, shaping: Preprocessing, split: str | None, key: str | None) -> Images:
    with open_bytes(path, unpack=False) as reader:
        beginning = reader.some(512)
    if beginning[:2] == b"PK":
        return read_npz(path, shaping, split, key)
    _refuse_key(key)
    if beginning[:6] == b"\x93NUMPY":
        return read_npy(path, shaping, split)
    packed = begins_as_gzip(beginning)
    if packed:
        with open_bytes(path) as reader:
            beginning = b""
            while len(beginning) < 512 and (piece := reader.some(512 - len(beginning))):
                beginning += piece
    if is_tar(beginning):
        return read_bundle(path, shaping, split)
    if is_idx(beginning):
        return read_idx(path, shaping, split)
    raise DataError(f"{path}: {_unknown(path, beginning, packed)}")


def _unknown(path: Path, beginning: bytes, packed: bool) -> str:
    if recognise([path.name]) is not None:
        return "is a part of a data set: give the folder that it lies in"
    if path.name.lower().endswith(SUFFIXES):
        return "is a single picture: give a folder of them"
    content = f"begins with {beginning[:8].hex(' ')}{' when unpacked' if packed else ''}" if beginning else "is empty"
    return f"{content}, which is none of npz, npy, IDX, or a tar archive of CIFAR or STL-10"


def _refuse_key(key: str | None) -> None:
    if key is not None:
        raise ValueError(f"key = {key!r} chooses an array of an .npz file, and this is none")
