"""Images for the tasks of a run: its own training and test images, and others in the format that it takes."""

from __future__ import annotations

import dataclasses
import os
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fastebm.data import Images, average_pool_to, digits, to_pixels
from fastebm.data.errors import DataError, NoSplitError
from fastebm.data.formats.image_format import split_of
from fastebm.data.formats.pictures import IMAGE_SUFFIXES, read_picture
from fastebm.data.preprocessing import Preprocessing
from fastebm.data.run_source import run_source, source_like
from fastebm.tasks.arguments import check_whole
from fastebm.tasks.inputs import shape
from fastebm.training import CoarseToFineRun, DigitsSource, ImageSource, Run, RunError

HELD_OUT = "test"
LEARNED = "these are images that it was trained on: on others results may be worse"


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
        split: the part of the set; by default "test", or the set itself if it has no parts. A single picture has none.
        count: only the first so many images.
        convert: brings images of another size or of other colours to those of the run, like its training images.

    Raises:
        DataError: for what can't be read.
        ValueError: for images of another size or other colours than the run's, without `convert`; for a split that
            there is not, and a count below 1.
        TypeError: for what is no run.
        RunError: where the run does not know its own images.
    """
    if not isinstance(run, Run):
        raise TypeError(f"images_for needs a run, as fastebm.load opens it, got {type(run).__name__}")
    if count is not None:
        check_whole("count", count)
    if data is None:
        images = dataset_images(run, split)
    elif Path(data).suffix.lower() in IMAGE_SUFFIXES and Path(data).is_file():
        if split is not None:
            raise ValueError(f"split {split!r} is of a set, and {data} is a single picture")
        images = _single_picture(run, Path(data), convert)
    else:
        images = _opened(_shaped(run, _with_path(run, Path(data))) if convert else ImageSource(Path(data)), split)
        _warn_of_learned(run, Path(data), images)
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


def dataset_images(run: Run, split: str | None = None) -> Images | Tensor:
    """Images of the set that a run was trained on, at its present size; by default the test split, if there is one.

    "train" is what the run was trained on, whatever that part is called. It warns where no split is asked for and there
    are no others.
    """
    source = source_of(run)
    if isinstance(source, DigitsSource):
        if split not in (None, "train", "test"):
            raise ValueError(f"scikit-learn's digits have no split {split!r}: its splits are train and test")
        return digits("train" if split == "train" else "test", run.size)[0]
    source = _shaped(run, source)
    if split == "train":
        images = source.open()
    elif split is not None:
        images = _opened(source, split)
    else:
        try:
            images = _held_out(run, source)
        except RunError:
            warnings.warn(
                f"{source.path} has no test split beside what the run was trained on, so {LEARNED}",
                RuntimeWarning,
                stacklevel=3,
            )
            images = source.open()
    return _pooled(images, run.size)


def source_of(run: Run) -> ImageSource | DigitsSource:
    """The source of the run's images. Raises RunError if it was trained on tensors, which have none."""
    if (source := run_source(run.path)) is None:
        raise RunError(f"{run.path} doesn't say where its images come from: give data")
    return source


def training_images(run: Run) -> Images:
    """The images that the run was trained on, as bytes. Raises RunError if it does not know them."""
    source = source_of(run)
    return _digits("train") if isinstance(source, DigitsSource) else source.open()


def held_out_images(run: Run) -> Images:
    """The test split of the set that the run was trained on. Raises RunError if it has none, and as above."""
    source = source_of(run)
    return _digits("test") if isinstance(source, DigitsSource) else _held_out(run, source)


def unseen_images(run: Run, count: int) -> Tensor:
    """The first of the test split as `images_for` has them. Raises RunError as `held_out_images`."""
    source = source_of(run)
    if isinstance(source, DigitsSource):
        return digits("test", run.size)[0][:count]
    return _pooled(_held_out(run, _shaped(run, source)), run.size).batch(slice(0, count))


def _held_out(run: Run, source: ImageSource) -> Images:
    """The test split of a run's source. Raises RunError where it has none, or the run was trained on that."""
    trained = split_of(source.path, source.split, key=source.key)
    if trained == HELD_OUT:
        raise RunError(
            f"{run.path} was trained on the test split of {source.path}: give images that it has not seen (--data)"
        )
    if trained:
        with suppress(NoSplitError):
            return dataclasses.replace(source, split=HELD_OUT).open()
    # A set that was read as a whole has no test split: a folder of that name in it is a class.
    part = f"the split {trained}" if trained else f"the array {source.key}" if source.key is not None else "all"
    raise RunError(
        f"{run.path} was trained on {part} of {source.path}, which has no test split: give images like these that it "
        "has not seen (--data)"
    )


def _warn_of_learned(run: Run, path: Path, images: Images) -> None:
    """Warns of images from the file or folder of the run's own that it was trained on."""
    source = run_source(run.path)
    if isinstance(source, ImageSource) and os.path.realpath(source.path) == os.path.realpath(path):
        with suppress(DataError):  # the run's own split may be gone
            if split_of(source.path, source.split, key=source.key) == images.split:
                warnings.warn(
                    f"the run knows {path}{images.split and f', {images.split}'}: {LEARNED}",
                    RuntimeWarning,
                    stacklevel=3,
                )


def matching_images(
    run: CoarseToFineRun,
    path: Path,
    split: str | None = None,
    *,
    prefer: str = HELD_OUT,
    fit: Literal["resize", "pad"] | None = None,
    recolour: bool = False,
) -> Images:
    """Images of a file or folder, resized like the run's training images; `recolour` converts their colours, too.

    Without a `split` it is the one called `prefer`, or the set itself. A run that was not trained on files has no such
    preprocessing; `fit` then says how images are resized. Raises as `open_images`, and ValueError for other colours.
    """
    if not isinstance(run_source(run.path), ImageSource):
        return outlier_images(run, path, split, fit=fit, recolour=recolour)
    channels = run.config.channels if recolour else None
    source = dataclasses.replace(_with_path(run, path), channels=channels, key=None)
    images = _opened(source, split, prefer)
    _check_colours(run, images)
    if prefer == HELD_OUT:
        _warn_of_learned(run, path, images)
    return images


def outlier_images(
    run: CoarseToFineRun,
    path: Path,
    split: str | None = None,
    *,
    fit: Literal["resize", "pad"] | None = None,
    recolour: bool = False,
) -> Images:
    """Images of a file or folder as they are; `fit` resizes them to the run's size, `recolour` converts their colours.

    Neither is done by default, because scores may then detect the traces of resizing alone. The split is chosen as in
    `matching_images`. Raises as `open_images`, and ValueError for other sizes and colours, saying which option helps.
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


def _opened(source: ImageSource, split: str | None, prefer: str = HELD_OUT) -> Images:
    if split is not None:
        return dataclasses.replace(source, split=split).open()
    try:
        return dataclasses.replace(source, split=prefer).open()
    except NoSplitError:
        return dataclasses.replace(source, split=None).open()


def _with_path(run: Run, path: Path) -> ImageSource:
    """Images at `path` preprocessed like the run's own; by default their largest square is resized."""
    source = run_source(run.path)
    return source_like(source, path) if isinstance(source, ImageSource) else ImageSource(path)


def _shaped(run: Run, source: ImageSource) -> ImageSource:
    """The source with the run's colours and present size; padded images keep their final size and are pooled later."""
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
