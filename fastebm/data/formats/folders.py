"""Folders of picture files of any sizes, nested to any depth; their top folders are splits or classes."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastebm.data.errors import DataError, MixedSizesError
from fastebm.data.formats.pictures import IMAGE_SUFFIXES, read_picture, read_picture_info
from fastebm.data.images import Images, resolve_split
from fastebm.data.preprocessing import Preprocessing

_SPLITS = {"train", "test", "val", "valid", "validation", "unlabeled"}


def read_folder(root: Path, preprocessing: Preprocessing, split: str | None) -> Images:
    """All pictures below `root`, or below its folder `split`, in the order of their paths."""
    folders = {entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith(".")}
    # A folder "train" is the training split if all folders beside it are splits, and otherwise a class of that name.
    if split is not None or ("train" in folders and folders <= _SPLITS):
        split = resolve_split(str(root), split, sorted(folders))
    top = root / split if split else root
    paths = _find_pictures(top)
    if not paths:
        raise DataError(f"{top}: no data set that is known here, and no pictures in it ({', '.join(IMAGE_SUFFIXES)})")
    preprocessing = _resolve_channels(top, paths, preprocessing)
    processed = (preprocessing.apply(str(path), read_picture(path, preprocessing.channels)) for path in paths)
    pixels = preprocessing.collect_processed(str(top), len(paths), processed)
    labels, classes = _labels(top, paths)
    return Images(pixels, labels, str(root), "folder of pictures", split or "", classes)


def _find_pictures(top: Path) -> list[Path]:
    """Picture files below a folder, sorted, without hidden ones. Links are followed, but no folder is read twice."""
    found: list[Path] = []
    visited: set[tuple[int, int]] = set()
    for here, folders, files in os.walk(top, onerror=_raise_walk_error, followlinks=True):
        status = os.stat(here)
        if (status.st_dev, status.st_ino) in visited:
            folders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        names = (name for name in files if not name.startswith(".") and name.lower().endswith(IMAGE_SUFFIXES))
        found += [Path(here, name) for name in names]
    return sorted(found, key=lambda path: path.relative_to(top).parts)


def _raise_walk_error(error: OSError) -> None:
    raise DataError(f"{error.filename}: cannot be listed: {error.strerror}") from error


def _resolve_channels(top: Path, paths: Sequence[Path], preprocessing: Preprocessing) -> Preprocessing:
    """The preprocessing with `channels` set: 3 if any picture has colour. Reads only the headers.

    Raises MixedSizesError, before any picture is decoded, if sizes differ and no size is requested.
    """
    sized = preprocessing.size is not None or preprocessing.crop is not None
    if sized and preprocessing.channels is not None:
        return preprocessing
    infos = [read_picture_info(path) for path in paths]
    sizes = [f"{info.height}x{info.width}" for info in infos]
    if not sized and (odd := next((i for i, size in enumerate(sizes) if size != sizes[0]), None)):
        raise MixedSizesError(
            f"{top}: pictures differ in size, {paths[0].relative_to(top)} is {sizes[0]} and "
            f"{paths[odd].relative_to(top)} is {sizes[odd]}: give a size"
        )
    channels = preprocessing.channels or max(info.channels for info in infos)
    return dataclasses.replace(preprocessing, channels=channels)


def _labels(top: Path, paths: Sequence[Path]) -> tuple[Tensor | None, tuple[str, ...]]:
    """Labels and class names from the folders directly below `top`, if all pictures are in two or more of them."""
    parts = [path.relative_to(top).parts for path in paths]
    names = sorted({part[0] for part in parts})
    if any(len(part) == 1 for part in parts) or len(names) < 2:
        return None, ()
    index = {name: label for label, name in enumerate(names)}
    return torch.tensor([index[part[0]] for part in parts]), tuple(names)
