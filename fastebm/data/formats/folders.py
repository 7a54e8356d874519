"""Folders of pictures: nested as one likes, of any sizes, with the folders of the top as classes."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastebm.data.errors import DataError, MixedSizesError
from fastebm.data.formats.pictures import SUFFIXES, Facts, facts_of, read_picture
from fastebm.data.images import Images, pick_split
from fastebm.data.preprocessing import Preprocessing

_SPLITS = {"train", "test", "val", "valid", "validation", "unlabeled"}


def read_folder(root: Path, shaping: Preprocessing, split: str | None) -> Images:
    """All pictures below `root`, or below its folder `split`, in the order of their paths."""
    folders = {entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith(".")}
    # A folder "train" among others of any name is a class; among nothing but splits it is the training split.
    divided = "train" in folders and folders <= _SPLITS
    if split is not None or divided:
        split = pick_split(str(root), split, sorted(folders))
    top = root / split if split else root
    paths = _pictures(top)
    if not paths:
        raise DataError(f"{top}: no data set that is known here, and no pictures in it ({', '.join(SUFFIXES)})")
    shaping = _settled(top, paths, shaping)
    shaped = (shaping.apply(str(path), read_picture(path, shaping.channels)) for path in paths)
    pixels = shaping.collect(str(top), len(paths), shaped)
    labels, classes = _classes(top, paths)
    return Images(pixels, labels, str(root), "folder of pictures", split or "", classes)


def _pictures(top: Path) -> list[Path]:
    """Picture files below a folder, by suffix, sorted; hidden ones are left out. Links are followed, but not twice."""
    found: list[Path] = []
    visited: set[tuple[int, int]] = set()
    for here, folders, files in os.walk(top, onerror=_walk_failed, followlinks=True):
        facts = os.stat(here)
        if (facts.st_dev, facts.st_ino) in visited:
            folders.clear()
            continue
        visited.add((facts.st_dev, facts.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        found += [Path(here, name) for name in files if not name.startswith(".") and name.lower().endswith(SUFFIXES)]
    return sorted(found, key=lambda path: path.relative_to(top).parts)


def _walk_failed(error: OSError) -> None:
    raise DataError(f"{error.filename}: can't be listed: {error.strerror}") from error


def _settled(top: Path, paths: Sequence[Path], shaping: Preprocessing) -> Preprocessing:
    """The shaping with channels decided: colour if any picture has some. Reads headers only.

    Raises DataError for pictures of several sizes where no size is wanted: before the first is decoded.
    """
    if shaping.channels is not None and (shaping.size is not None or shaping.crop is not None):
        return shaping
    facts = [facts_of(path) for path in paths]
    if shaping.size is None and shaping.crop is None:
        odd = next((i for i, fact in enumerate(facts) if _sides(fact) != _sides(facts[0])), None)
        if odd is not None:
            raise MixedSizesError(
                f"{top}: pictures differ in size, {paths[0].relative_to(top)} is {_sides(facts[0])} and "
                f"{paths[odd].relative_to(top)} is {_sides(facts[odd])}: give a size"
            )
    if shaping.channels is None:
        shaping = dataclasses.replace(shaping, channels=max(fact.channels for fact in facts))
    return shaping


def _sides(facts: Facts) -> str:
    return f"{facts.height}x{facts.width}"


def _classes(top: Path, paths: Sequence[Path]) -> tuple[Tensor | None, tuple[str, ...]]:
    """Labels by the folders just below `top`, in the order of their names; none unless all pictures lie in two or
    more."""
    parts = [path.relative_to(top).parts for path in paths]
    names = sorted({part[0] for part in parts})
    if any(len(part) == 1 for part in parts) or len(names) < 2:
        return None, ()
    index = {name: label for label, name in enumerate(names)}
    return torch.tensor([index[part[0]] for part in parts]), tuple(names)
