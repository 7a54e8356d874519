"""`open_images`: recognises the format of a file, folder or data set and calls its reader."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from fastebm.data.errors import DataError, NoPicturesError, NoSplitError, raise_as_data_error
from fastebm.data.formats.archives import is_tar
from fastebm.data.formats.byte_reader import MAX_BYTES, MAX_PIXELS, is_gzip, name_content, open_bytes
from fastebm.data.formats.datasets import MapDataset, read_dataset
from fastebm.data.formats.folders import find_pictures, list_folder, read_folder
from fastebm.data.formats.idx import find_idx_files, is_idx, read_idx, read_idx_folder
from fastebm.data.formats.known_datasets import find_layout, read_known_dataset
from fastebm.data.formats.npz import find_imagenet_files, read_imagenet, read_npy, read_npz
from fastebm.data.formats.pictures import IMAGE_SUFFIXES
from fastebm.data.images import Images
from fastebm.data.preprocessing import Preprocessing

_DATA_SET_SUFFIXES = (".npz", ".npy", ".tar", ".tar.gz", ".tgz", "-ubyte", "-ubyte.gz")


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
    max_pixels: int = MAX_PIXELS,
) -> Images:
    """Reads the images of a file, a folder or a data set into memory as bytes.

    The format is recognised by content and file names: .npz and .npy; CIFAR-10 and CIFAR-100 (binary and python
    version) and STL-10 (binary), as archives or folders; IDX and IDX.gz (MNIST); npz parts of the downsampled ImageNet;
    folders of pictures; data sets of PyTorch or Hugging Face. docs/data.md describes each.

    Args:
        source: a path, or an object with a length and items by number, or a mapping of splits to such objects.
        size: the side of the images in memory. By default it is unchanged, and all images must have the same size.
        channels: 1 (grey, by the luma of ITU-R 601) or 3; by default as many as the images have.
        split: "train", "test" or another split of the set; by default "train", or everything in a set without splits.
        fit: how images are brought to `size`. "resize" takes the largest square in the middle and averages whole pixels
            where the sizes divide, else resamples with Lanczos' filter. "pad" puts black around the image.
        crop: the side of a square that is first cut out of the middle.
        key: the array of an .npz file that contains the images, if the names do not say; its labels are not read.
        max_bytes: the limit of memory for the images, in bytes.
        max_pixels: the limit of a single picture, in pixels, which keeps small files from becoming huge pictures.

    Raises:
        DataError: for a source that cannot be read, with its name and what is wrong; also for a missing split.
        ValueError: for size, crop, channels, fit or a limit out of range, or a key for another format than .npz.

    Example:
        >>> import numpy as np, fastebm
        >>> np.savez("faces.npz", x_train=np.zeros((10, 16, 16, 3), np.uint8), x_test=np.ones((2, 16, 16, 3), np.uint8))
        >>> fastebm.data.open_images("faces.npz", size=8)
        faces.npz, train: npz, array x_train: 10 images of 3x8x8, 0.0 MiB
    """
    preprocessing = Preprocessing(size, channels, fit, crop, max_bytes, max_pixels)
    if not isinstance(source, str | os.PathLike):
        _refuse_key(key)
        if not isinstance(source, MapDataset):
            raise DataError(f"{type(source).__name__}: is neither a path nor has it a length and items by number")
        return read_dataset(source, preprocessing, split)
    return open_path(Path(source), preprocessing, split, key)


def open_path(path: Path, preprocessing: Preprocessing, split: str | None, key: str | None) -> Images:
    """The preprocessed images of a file or folder. Raises DataError as `open_images` does."""
    with raise_as_data_error(str(path)):
        kind = path.stat().st_mode
    if stat.S_ISDIR(kind):
        _refuse_key(key)
        return _open_folder(path, preprocessing, split)
    if not stat.S_ISREG(kind):
        raise DataError(f"{path}: is neither a file nor a folder")
    return _open_file(path, preprocessing, split, key)


def _open_folder(path: Path, preprocessing: Preprocessing, split: str | None) -> Images:
    names, _ = list_folder(path)
    if find_layout(names) is not None:
        return read_known_dataset(path, preprocessing, split)
    if idx_files := find_idx_files(path, names):
        return read_idx_folder(path, idx_files, preprocessing, split)
    if parts := find_imagenet_files(path, names):
        return read_imagenet(path, parts, preprocessing, split)
    try:
        return read_folder(path, preprocessing, split)
    except (NoPicturesError, NoSplitError) as error:
        # Somebody may have given a folder above, such as torchvision's root.
        below = [] if isinstance(error, NoSplitError) and find_pictures(path)[0] else _data_sets_below(path)
        if not below:
            raise
        if len(below) > 1:
            raise DataError(f"{path}: holds several data sets, give one: {', '.join(map(str, below[:10]))}") from error
        return open_path(below[0], preprocessing, split, None)


def _data_sets_below(path: Path, depth: int = 2) -> list[Path]:
    """Folders of data sets in a folder without pictures, up to `depth` folders down; if there are none, files of such.

    A file is found by its name alone.
    """
    names, folders = list_folder(path)
    if find_layout(names) is not None or find_idx_files(path, names) or find_imagenet_files(path, names):
        return [path]
    if below := [found for name in folders * (depth > 0) for found in _data_sets_below(path / name, depth - 1)]:
        return below
    return [path / name for name in names if name.lower().endswith(_DATA_SET_SUFFIXES)]


def _open_file(path: Path, preprocessing: Preprocessing, split: str | None, key: str | None) -> Images:
    beginning = _read_beginning(path, unpack=False)
    if beginning[:2] == b"PK":
        return read_npz(path, preprocessing, split, key)
    _refuse_key(key)
    if beginning[:6] == b"\x93NUMPY":
        return read_npy(path, preprocessing, split)
    packed = is_gzip(beginning)
    beginning = _read_beginning(path)
    if is_tar(beginning):
        return read_known_dataset(path, preprocessing, split)
    if is_idx(beginning):
        return read_idx(path, preprocessing, split)
    raise DataError(f"{path}: {_explain_unknown(path, beginning, packed)}")


def _read_beginning(path: Path, unpack: bool = True) -> bytes:
    """Up to 512 bytes, the length of a tar header."""
    beginning = b""
    with open_bytes(path, unpack) as reader:
        while len(beginning) < 512 and (piece := reader.read1(512 - len(beginning))):
            beginning += piece
    return beginning


def _explain_unknown(path: Path, beginning: bytes, packed: bool) -> str:
    if find_layout([path.name]) is not None:
        return "is a part of a data set: give the folder that contains it"
    if what := name_content(beginning):
        return f"{what}{' (seen when unpacked)' if packed else ''}"
    if path.name.lower().endswith(IMAGE_SUFFIXES):
        return "is a single picture: give a folder of them"
    content = f"begins with {beginning[:8].hex(' ')}{' when unpacked' if packed else ''}" if beginning else "is empty"
    return f"{content}, which is none of npz, npy, IDX, or a tar archive of CIFAR or STL-10"


def _refuse_key(key: str | None) -> None:
    if key is not None:
        raise ValueError(f"key = {key!r} chooses an array of an .npz file; this source is none")
