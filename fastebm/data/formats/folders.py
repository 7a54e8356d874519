"""Folders of picture files of any sizes, nested to any depth; their top folders are splits or classes."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastebm.data.errors import DataError, MixedSizesError, NoPicturesError, printable, raise_as_data_error
from fastebm.data.formats.archives import is_of_desktop
from fastebm.data.formats.pictures import IMAGE_SUFFIXES, read_picture, read_picture_info
from fastebm.data.images import Images, resolve_split
from fastebm.data.preprocessing import Preprocessing

_SPLITS = {"train", "test", "val", "valid", "validation", "unlabeled"}
_MAX_WRAPPERS = 8  # folders with nothing but one folder in them; a link may lead in circles
_TEXTS = (".txt", ".md", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".yaml", ".yml", ".html", ".log")
_LISTED = 10  # damaged pictures that an error names


def read_folder(root: Path, preprocessing: Preprocessing, split: str | None) -> Images:
    """All pictures below `root`, or below its folder `split`, in the order of their paths.

    Warns of other files that may be pictures, with their number. Raises NoPicturesError for a folder without pictures,
    DataError for a class without pictures, and one that lists all pictures that cannot be read.
    """
    root = _innermost(root, split)
    _, folders = list_folder(root)
    # A folder "train" is the training split if all folders beside it are splits, and otherwise a class of that name.
    if split is not None or ("train" in folders and set(folders) <= _SPLITS):
        split = resolve_split(str(root), split, folders)
    top = root / split if split else root
    paths, others = find_pictures(top)
    if not paths:
        raise NoPicturesError(f"{top}: no data set that is known here, and no pictures in it{_describe(others)}")
    labels, classes = _labels(top, paths)
    preprocessing = _resolve_channels(top, paths, preprocessing)
    pixels = preprocessing.collect_processed(str(top), len(paths), _read_all(top, paths, preprocessing))
    if others:
        warnings.warn(
            printable(f"{top}: read {len(paths):,} picture{'s' * (len(paths) > 1)}{_describe(others)}"), stacklevel=2
        )
    return Images(pixels, labels, str(root), "folder of pictures", split or "", classes)


def list_folder(path: Path) -> tuple[list[str], list[str]]:
    """The names of the files and of the folders in a folder, sorted, without hidden ones and those of desktops.

    A link that leads nowhere is neither.
    """
    files, folders = [], []
    with raise_as_data_error(str(path), "cannot be listed"), os.scandir(path) as entries:
        for entry in entries:
            if not is_of_desktop(entry.name):
                with suppress(OSError):
                    files += [entry.name] if entry.is_file() else []
                    folders += [entry.name] if entry.is_dir() else []
    return sorted(files), sorted(folders)


def _innermost(root: Path, split: str | None) -> Path:
    """The folder itself, or the one below it if nothing else is in it, as unpacked archives have it."""
    for _ in range(_MAX_WRAPPERS):
        names = [name for name in os.listdir(root) if not is_of_desktop(name)]
        if len(names) != 1 or names[0] in (*_SPLITS, split) or not (root / names[0]).is_dir():
            break
        root /= names[0]
    return root


def find_pictures(top: Path) -> tuple[list[Path], list[str]]:
    """Picture files below a folder, sorted, and the names of other files, which may be pictures of other formats.

    Hidden files, those of desktops, and texts are neither. Links are followed, but no folder is read twice.
    """
    found: list[Path] = []
    others: list[str] = []
    visited: set[tuple[int, int]] = set()
    for here, folders, files in os.walk(top, onerror=_raise_walk_error, followlinks=True):
        status = os.stat(here)
        if (status.st_dev, status.st_ino) in visited:
            folders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not is_of_desktop(name))
        for name in files:
            if name.lower().endswith(IMAGE_SUFFIXES) and not is_of_desktop(name):
                found.append(Path(here, name))
            elif not is_of_desktop(name) and not name.lower().endswith(_TEXTS):
                others.append(name)
    return sorted(found, key=lambda path: path.relative_to(top).parts), others


def _raise_walk_error(error: OSError) -> None:
    raise DataError(f"{error.filename}: cannot be listed: {error.strerror}") from error


def _describe(others: Sequence[str]) -> str:
    """The end of a sentence that says how many files were left out, and which suffixes they have."""
    if not others:
        return ""
    suffixes = Counter(sorted(Path(name).suffix.lower() or "without suffix" for name in others))
    shown = ", ".join(f"{count:,} {suffix}" for suffix, count in suffixes.most_common(5))
    left_out = f"{len(others):,} other file{'s are' if len(others) > 1 else ' is'} left out"
    return f"; {left_out} ({shown}{', ...' if len(suffixes) > 5 else ''})"


def _read_all(top: Path, paths: Sequence[Path], preprocessing: Preprocessing) -> Iterator[NDArray[np.uint8]]:
    """The preprocessed pictures. If one cannot be read, the others are tried too, and the error lists all of them."""
    problems: list[DataError] = []
    for path in paths:
        try:
            pixels = read_picture(path, preprocessing.channels, preprocessing.max_pixels)
            processed = preprocessing.apply(str(path), pixels)
        except DataError as error:
            problems.append(error)
            continue
        if not problems:
            yield processed
    if len(problems) == 1:
        raise problems[0]
    if problems:
        listed = "; ".join(str(problem).removeprefix(f"{top}{os.sep}") for problem in problems[:_LISTED])
        more = f"; and {len(problems) - _LISTED:,} more" if len(problems) > _LISTED else ""
        raise DataError(f"{top}: {len(problems):,} of {len(paths):,} pictures cannot be read: {listed}{more}")


def _resolve_channels(top: Path, paths: Sequence[Path], preprocessing: Preprocessing) -> Preprocessing:
    """The preprocessing with `channels` set: 3 if any picture has colour. Reads only the headers.

    Raises MixedSizesError, before any picture is decoded, if sizes differ and no size is requested.
    """
    sized = preprocessing.size is not None or preprocessing.crop is not None
    if sized and preprocessing.channels is not None:
        return preprocessing
    try:
        infos = [read_picture_info(path, preprocessing.max_pixels) for path in paths]
    except DataError:
        for _ in _read_all(top, paths, preprocessing):  # which raises for all that is damaged, not only in headers
            pass
        raise
    sizes = [f"{info.height}x{info.width}" for info in infos]
    if not sized and (odd := next((i for i, size in enumerate(sizes) if size != sizes[0]), None)):
        raise MixedSizesError(
            f"{top}: pictures differ in size, {paths[0].relative_to(top)} is {sizes[0]} and "
            f"{paths[odd].relative_to(top)} is {sizes[odd]}: give a size"
        )
    channels = preprocessing.channels or max(info.channels for info in infos)
    return dataclasses.replace(preprocessing, channels=channels)


def _labels(top: Path, paths: Sequence[Path]) -> tuple[Tensor | None, tuple[str, ...]]:
    """Labels and class names from the folders directly below `top`, if all pictures are in two or more of them.

    Raises DataError for a class without pictures, without which the later classes would have other numbers.
    """
    parts = [path.relative_to(top).parts for path in paths]
    _, names = list_folder(top)
    if any(len(part) == 1 for part in parts) or len(names) < 2:
        return None, ()
    if empty := sorted(set(names) - {part[0] for part in parts}):
        raise DataError(
            f"{top / empty[0]}: has no pictures that can be read, but the folders beside it are classes with pictures: "
            "fill or remove it, or give the folder with the pictures"
        )
    index = {name: label for label, name in enumerate(names)}
    return torch.tensor([index[part[0]] for part in parts], device="cpu"), tuple(names)
