"""The images that belong to a run, and others in the form that it takes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from fastebm.data import Images, digits, to_pixels
from fastebm.data.errors import NoSplitError
from fastebm.training import CoarseToFineRun, DigitsSource, ImageSource, RunError
from fastebm.training.image_source import source_from_json
from fastebm.training.run import RunFolder

HELD_OUT = "test"


def source_of(run: CoarseToFineRun) -> ImageSource | DigitsSource:
    """Where the run's images come from. Raises RunError if it was trained on tensors, whose origin nobody knows."""
    stored = RunFolder.existing(run.path).images()
    if stored is None:
        raise RunError(f"{run.path} doesn't say where its images come from: give them")
    return source_from_json(stored)


def training_images(run: CoarseToFineRun) -> Images:
    """The images that the run learned from, as bytes. Raises as `source_of` and `open_images`."""
    source = source_of(run)
    if isinstance(source, DigitsSource):
        return _digits("train")
    return source.open()


def held_out_images(run: CoarseToFineRun) -> Images:
    """The test split of the set that the run learned from. Raises DataError where it has none; else as above."""
    source = source_of(run)
    if isinstance(source, DigitsSource):
        return _digits("test")
    if source.split == HELD_OUT:
        raise RunError(f"{run.path} was trained on the test split of {source.path}: give images that it has not seen")
    return dataclasses.replace(source, split=HELD_OUT).open()


def images_of_the_kind(
    run: CoarseToFineRun, path: Path, split: str | None = None, *, prefer: str = HELD_OUT, recolour: bool = False
) -> Images:
    """Images of a file or folder, brought to the run's size as those of training were; with `recolour` to its colours.

    Without a `split` it is the one called `prefer`, or what there is. Raises as `open_images`, and ValueError for other
    colours.
    """
    stored = RunFolder.existing(run.path).images()
    source = None if stored is None else source_from_json(stored)
    if not isinstance(source, ImageSource):
        return open_for(run, path, split, recolour=recolour)
    channels = run.config.channels if recolour else None
    images = _opened(dataclasses.replace(source, path=path, key=None, channels=channels), split, prefer)
    _check_colours(run, images)
    return images


def open_for(
    run: CoarseToFineRun,
    path: Path,
    split: str | None = None,
    *,
    fit: Literal["resize", "pad"] | None = None,
    recolour: bool = False,
) -> Images:
    """Images of a file or folder as they are; or with `fit` at the run's size, with `recolour` in its colours.

    Nothing of that happens unasked, because what resizing leaves behind may be all that is then detected. The split is
    chosen as in `images_of_the_kind`. Raises as `open_images`, and ValueError for images that don't fit, saying how
    they would.
    """
    size = None if fit is None else run.config.sizes[-1]
    channels = run.config.channels if recolour else None
    images = _opened(ImageSource(path, size, channels, fit=fit or "resize"), split)
    _check_colours(run, images)
    height, width = images.pixels.shape[2:]
    factor, rest = divmod(height, run.size)
    if height != width or rest or factor < 1 or factor & (factor - 1):
        raise ValueError(
            f"{path}: its images are {height}x{width}, and the run takes {run.size}x{run.size}, or that times a power "
            "of two: fit (--fit resize or --fit pad) brings them to that"
        )
    return images


def _check_colours(run: CoarseToFineRun, images: Images) -> None:
    if images.channels != run.config.channels:
        raise ValueError(
            f"{images.name}: its images have {images.channels} channels, and those of the run {run.config.channels}: "
            "recolour (--recolour) brings them to that"
        )


def _opened(source: ImageSource, split: str | None, prefer: str = HELD_OUT) -> Images:
    if split is not None:
        return dataclasses.replace(source, split=split).open()
    try:
        return dataclasses.replace(source, split=prefer).open()
    except NoSplitError:
        return dataclasses.replace(source, split=None).open()


def _digits(split: Literal["train", "test"]) -> Images:
    return Images(to_pixels(digits(split)[0]), name="scikit-learn's digits", format="digits", split=split)
