"""Readers for evaluation: samples from arrays and pictures, and the real images to compare them with."""

from __future__ import annotations

import dataclasses
import zipfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastebm.data import DataError, ImageFormat, Images, average_pool_to, digits, image_format, open_images, to_pixels
from fastebm.data.errors import raise_as_data_error
from fastebm.data.formats.axes import channels_first
from fastebm.data.formats.byte_reader import open_bytes
from fastebm.data.formats.npy import open_npz, read_array_header
from fastebm.data.run_source import source_like
from fastebm.data.value_range import ValueRange, to_signed
from fastebm.evaluation.metrics.comparison import RealImages
from fastebm.training import DigitsSource, ImageSource

_PART = 1000


def read_samples(path: Path, value_range: ValueRange | None = None) -> Tensor:
    """Samples, float32 (N, C, S, S) in [-1, 1], from an array in an .npz or .npy file, or from anything that
    `open_images` reads.

    The array is `images`, as `fastebm sample` writes it, or the only one with 3 or 4 axes; its layout is recognised as
    by `open_images`.

    Args:
        value_range: the values of black and white in the array, as in `to_signed`, by default as its values show.

    Raises ValueError for samples that are not square, as `to_signed`, and for a `value_range` of what is no array;
    DataError as `open_images`.
    """
    array = _number_array(path)
    if array is None:
        if value_range is not None and path.exists():
            raise ValueError(f"{path}: a value_range (--range) is of samples in one array, and here is none")
        images = open_images(path)
        _ = images.size  # raises where they are not square
        return images.batch(slice(None))
    # The reader finds out the axes without looking at the values.
    samples = torch.from_numpy(np.ascontiguousarray(channels_first(str(path), array)))
    if samples.shape[1] not in (1, 3) or samples.shape[2] != samples.shape[3] or not samples.numel():
        raise ValueError(f"{path}: samples must be (N, 1 or 3, S, S), got {tuple(samples.shape)}")
    return to_signed(samples, value_range, f"{path}: samples")


def _number_array(path: Path) -> NDArray[Any] | None:
    """The array `images` of an .npz or .npy file, or the only one that can be images; None where there is none."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        beginning = file.read(6)
    if beginning == b"\x93NUMPY":
        with open_bytes(path) as reader:
            return read_array_header(reader).numbers()
    if beginning[:2] != b"PK":
        return None
    with open_npz(path) as arrays:
        found = [name for name, array in arrays.items() if name == "images" or len(array.shape) in (3, 4)]
        name = "images" if "images" in found else found[0] if len(found) == 1 else None
        return None if name is None else arrays[name].numbers()


def holds_statistics(path: Path) -> bool:
    """Whether a file is an .npz with arrays `mu` and `sigma`, which `FeatureStatistics.load` reads."""
    if not zipfile.is_zipfile(path):
        return False
    with raise_as_data_error(str(path), "is no complete zip file"), zipfile.ZipFile(path) as archive:
        return {"mu.npy", "sigma.npy"} <= set(archive.namelist())


def real_image_source(
    path: Path,
    samples: ImageFormat,
    *,
    own: ImageSource | None = None,
    full: int | None = None,
    split: str | None = None,
    fit: Literal["resize", "pad"] | None = None,
    crop: int | None = None,
    convert: bool = False,
) -> ImageSource:
    """The source of the real images at `path` for samples in the format `samples`.

    Without `fit` and `convert` it accepts images in the format of the samples, or at the size `full`, which `open_real`
    averages down. It also accepts images in the format that the run's own images have before preprocessing; they are
    preprocessed in the same way.

    Args:
        own: the source of the run's training images, if the samples are of a run that knows it.
        full: the run's final size; by default that of the samples.
        split, fit, crop: as in `ImageSource`, by default as in `own`. With `fit`, images of any size are accepted.
        convert: accepts images of any size and colours, and preprocesses them like the run's own, or resizes them.

    Raises ValueError for images of another format, DataError as `open_images`.
    """
    full = full or samples.height
    given = {"split": split, "fit": fit, "crop": crop}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    shaped = ImageSource(path, full, samples.channels)
    if own is not None:
        shaped = dataclasses.replace(source_like(own, path), size=own.size or full, channels=samples.channels)
    shaped = dataclasses.replace(shaped, **changes)
    if convert:
        return shaped
    found = image_format(path, shaped.split, crop=crop, key=shaped.key)
    learned = None if own is None or crop is not None else _format_before_preprocessing(own)
    as_learned = learned is not None and found[1:] == learned[1:]
    fits = found[1:] in (samples[1:], (full, full))
    colours = found.channels == samples.channels or (learned is not None and found.channels == learned.channels)
    if not (colours and (fits or as_learned or fit is not None)):
        raise ValueError(
            f"{path}: its images are {found}, and the samples {samples}: --convert brings them to that"
            + ("" if own is None else " as the run's own were")
            + ("" if fit is not None or fits else "; --fit resize or --fit pad changes their size alone")
        )
    if as_learned or fit is not None:
        return shaped
    channels = (
        None if found.channels == samples.channels else samples.channels
    )  # None keeps the colours, also of the test split
    return ImageSource(path, None, channels, shaped.split, crop=crop, key=shaped.key)


def _format_before_preprocessing(own: ImageSource) -> ImageFormat | None:
    """The format of a run's own images in their files; None where they can't be read any more."""
    try:
        return image_format(own.path, own.split, key=own.key)
    except DataError:
        return None


def open_real(source: ImageSource | DigitsSource, size: int, seed: int = 0) -> RealImages:
    """The images of a source, averaged down to `size`, together with their test split if there is one.

    Raises DataError and ValueError as `open_images` does, and ValueError for images that are too small.
    """
    if isinstance(source, DigitsSource):
        train, test = (
            Images(to_pixels(images), labels, "digits", "scikit-learn", split)
            for split, (images, labels) in (("train", digits("train")), ("test", digits("test")))
        )
        return RealImages(_averaged(train, size), _averaged(test, size), seed)
    images = source.open()
    return RealImages(_averaged(images, size), _held_out(source, images, size), seed)


def _held_out(source: ImageSource, images: Images, size: int) -> Images | None:
    if images.split != "train":
        return None
    try:
        held_out = dataclasses.replace(source, split="test").open()
    except DataError:
        return None  # it has none
    formats = [ImageFormat(*part.pixels.shape[1:]) for part in (images, held_out)]
    if formats[0] != formats[1]:
        raise ValueError(
            f"{images.name}: its train images are {formats[0]} and its test images {formats[1]}: --convert"
        )
    return _averaged(held_out, size)


def _averaged(images: Images, size: int) -> Images:
    if images.size == size:
        return images
    if images.size < size:
        raise ValueError(f"{images.name}: its images of {images.size}x{images.size} are smaller than {size}x{size}")
    parts = [
        to_pixels(average_pool_to(images.batch(slice(first, first + _PART)), size))
        for first in range(0, len(images), _PART)
    ]
    return dataclasses.replace(images, pixels=torch.cat(parts))
