"""The images that belong to a run, and others in the form that it takes: the one reader of all tasks."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fastebm.data import Images, average_pool_to, digits, to_pixels
from fastebm.data.errors import NoSplitError
from fastebm.data.formats.pictures import IMAGE_SUFFIXES, read_picture
from fastebm.data.preprocessing import Preprocessing
from fastebm.data.sources import source_from_json
from fastebm.runs.folder import RunFolder
from fastebm.tasks.inputs import shape
from fastebm.training import CoarseToFineRun, DigitsSource, ImageSource, Run, RunError

HELD_OUT = "test"


def images_for(
    run: Run,
    data: str | Path | None = None,
    *,
    split: str | None = None,
    count: int | None = None,
    convert: bool = False,
) -> Tensor:
    """Images for a task of `run`, float32 (N, channels, size, size) in [-1, 1].

    Args:
        data: a set as `fastebm.data.open_images` reads it, or a single picture. By default the run's own images.
        split: the part of the set; by default "test", or what there is.
        count: the first so many, or all if there are fewer.
        convert: brings images of another size or of other colours to those of the run, as its training images were.

    Raises:
        DataError: for what can't be read.
        ValueError: for images of another size or other colours than the run's, without `convert`.
        RunError: where the run does not know its own images.
    """
    if count is not None and count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    if data is None:
        images = own_images(run, split)
    elif Path(data).suffix.lower() in IMAGE_SUFFIXES and Path(data).is_file():
        images = _single_picture(run, Path(data), convert)
    else:
        images = _opened(_shaped(run, _with_path(run, Path(data))) if convert else ImageSource(Path(data)), split)
    if not isinstance(images, Images):
        return images[:count]
    images = _pooled(images, run.size) if convert or data is None else images
    wanted = (run.config.channels, run.size, run.size)
    if tuple(images.pixels.shape[1:]) != wanted:
        raise ValueError(
            f"{images.name}: its images are {shape(images.pixels.shape[1:])}, and the run takes {shape(wanted)}: "
            "convert (--convert) brings them to that as its training images were"
        )
    return images.batch(slice(0, count))


def own_images(run: Run, split: str | None = None) -> Images | Tensor:
    """The images that a run was trained on, at its size so far; by default those it has not seen, if there are any."""
    source = source_of(run)
    if isinstance(source, DigitsSource):
        return digits("train" if split == "train" else "test", run.size)[0]
    if split is None:
        return _pooled(_opened(_shaped(run, source), None, otherwise=source.split), run.size)
    return _pooled(_opened(_shaped(run, source), split), run.size)


def source_of(run: Run) -> ImageSource | DigitsSource:
    """Where the run's images come from. Raises RunError if it was trained on tensors, whose origin nobody knows."""
    stored = _stored(run)
    if stored is None:
        raise RunError(f"{run.path} doesn't say where its images come from: give data")
    return stored


def training_images(run: Run) -> Images:
    """The images that the run learned from, as bytes. Raises as `source_of` and `open_images`."""
    source = source_of(run)
    return _digits("train") if isinstance(source, DigitsSource) else source.open()


def held_out_images(run: Run) -> Images:
    """The test split of the set that the run learned from. Raises DataError where it has none; else as above."""
    source = source_of(run)
    if isinstance(source, DigitsSource):
        return _digits("test")
    if source.split == HELD_OUT:
        raise RunError(f"{run.path} was trained on the test split of {source.path}: give images that it has not seen")
    return dataclasses.replace(source, split=HELD_OUT).open()


def images_of_the_kind(
    run: CoarseToFineRun,
    path: Path,
    split: str | None = None,
    *,
    prefer: str = HELD_OUT,
    fit: Literal["resize", "pad"] | None = None,
    recolour: bool = False,
) -> Images:
    """Images of a file or folder, brought to the run's size as those of training were; with `recolour` to its colours.

    Without a `split` it is the one called `prefer`, or what there is. A run that was not trained on files knows no way
    to its size: then `fit` is asked for. Raises as `open_images`, and ValueError for other colours.
    """
    if not isinstance(_stored(run), ImageSource):
        return open_for(run, path, split, fit=fit, recolour=recolour)
    channels = run.config.channels if recolour else None
    source = dataclasses.replace(_with_path(run, path), channels=channels, key=None)
    images = _opened(source, split, prefer)
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
            "recolour (--convert-colours) brings them to that"
        )


def _opened(source: ImageSource, split: str | None, prefer: str = HELD_OUT, otherwise: str | None = None) -> Images:
    if split is not None:
        return dataclasses.replace(source, split=split).open()
    try:
        return dataclasses.replace(source, split=prefer).open()
    except NoSplitError:
        return dataclasses.replace(source, split=otherwise).open()


def _stored(run: Run) -> ImageSource | DigitsSource | None:
    stored = RunFolder.existing(run.path).images()
    return None if stored is None else source_from_json(stored)


def _with_path(run: Run, path: Path) -> ImageSource:
    """Images at `path` brought to their size as the run's own; the largest square resized, where it doesn't say how."""
    source = _stored(run)
    if not isinstance(source, ImageSource):
        return ImageSource(path)
    return dataclasses.replace(source, path=path, key=source.key if path.resolve() == source.path.resolve() else None)


def _shaped(run: Run, source: ImageSource) -> ImageSource:
    """The same in the run's colours, at its size; padded ones at full size, which a run on the way sees pooled."""
    size = source.size if source.fit == "pad" and source.size is not None else run.size
    return dataclasses.replace(source, size=size, channels=run.config.channels)


def _pooled(images: Images, size: int) -> Images:
    height, width = images.pixels.shape[2:]
    if height != width or height <= size:
        return images
    pixels = average_pool_to(images.pixels.float(), size).round().to(torch.uint8)
    return dataclasses.replace(images, pixels=pixels)


def _single_picture(run: Run, path: Path, convert: bool) -> Images:
    pixels = read_picture(path, run.config.channels if convert else None)
    if convert:
        source = _shaped(run, _with_path(run, path))
        pixels = Preprocessing(source.size, run.config.channels, source.fit, source.crop).apply(str(path), pixels)
    return Images(torch.from_numpy(pixels.copy()), name=str(path), format="picture")


def _digits(split: Literal["train", "test"]) -> Images:
    return Images(to_pixels(digits(split)[0]), name="scikit-learn's digits", format="digits", split=split)
