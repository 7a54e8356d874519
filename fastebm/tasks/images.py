"""The images that a task starts from: read for a run, and checked before any work is done on them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from fastebm.data import DataError, Images, open_images
from fastebm.data.pictures import SUFFIXES, read_picture
from fastebm.data.shaping import Shaping
from fastebm.tasks.model import Model, device_of_model
from fastebm.training import CoarseToFineRun, DigitsSource, ImageSource, RunError
from fastebm.training.image_source import source_from_json
from fastebm.training.run import RunFolder


def checked_images(name: str, images: Tensor, model: Model, *, bounded: bool = True) -> Tensor:
    """`images` on the model's device, after a look at whether the model can work on them.

    Args:
        name: of the images in messages.
        images: float32 (N, C, H, W), N >= 1, finite, in [-1, 1]; of a run's own size and channels.
        bounded: False lets values outside of [-1, 1] pass, as noise leads to.

    Raises TypeError for another dtype, ValueError for anything else that is wrong.
    """
    if not isinstance(images, Tensor) or images.dtype != torch.float32:
        kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"{name} must be a float32 tensor, got {kind}")
    if images.ndim != 4 or 0 in images.shape:
        raise ValueError(f"{name} must be (N, C, H, W), none of them 0, got {tuple(images.shape)}")
    if isinstance(model, CoarseToFineRun):
        wanted = (model.config.channels, model.size, model.size)
        if images.shape[1:] != wanted:
            raise ValueError(f"{name} are {shape(images.shape[1:])}, and the run takes {shape(wanted)}")
    if not images.isfinite().all():
        broken = int((~images.isfinite().flatten(1).all(1)).nonzero()[0])
        raise ValueError(f"{name} must be finite, but image {broken} has pixels that are infinite or not a number")
    low, high = images.aminmax()
    if bounded and not (low >= -1 and high <= 1):
        raise ValueError(f"{name} must lie in [-1, 1], got values from {float(low):g} to {float(high):g}")
    return images.detach().to(device_of_model(model))


def images_for(
    run: CoarseToFineRun,
    data: str | Path | None = None,
    *,
    split: str | None = None,
    count: int | None = None,
    convert: bool = False,
) -> Tensor:
    """Images for a task of `run`, float32 (N, channels, size, size) in [-1, 1].

    Args:
        data: a set as `fastebm.data.open_images` reads it, or a single picture. By default the run's own images, those
            of the split "test" where there is one.
        split: the part of the set.
        count: the first so many, or all if there are fewer.
        convert: brings images of another size or of other colours to those of the run, as its training images were.

    Raises:
        DataError: for what can't be read.
        ValueError: for images of another size or other colours than the run's, without `convert`.
        RunError: where the run does not know its own images.
    """
    if count is not None and count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    images = own_images(run, split) if data is None else _opened(run, Path(data), split, convert)
    if isinstance(images, Images):
        wanted = (run.config.channels, run.size, run.size)
        if tuple(images.pixels.shape[1:]) != wanted:
            raise ValueError(
                f"{images.name}: images are {shape(images.pixels.shape[1:])}, and the run takes {shape(wanted)}: "
                "convert brings them to that as its training images were"
            )
        return images.batch(slice(0, count))
    return images[:count]


def own_images(run: CoarseToFineRun, split: str | None = None) -> Images | Tensor:
    """The images that a run was trained on, at its size so far; by default those it has not seen, if there are any."""
    stored = RunFolder.existing(run.path).images()
    if stored is None:
        raise RunError(f"{run.path} doesn't say where its images come from: give data")
    source = source_from_json(stored)
    if isinstance(source, DigitsSource):
        from fastebm.data import digits

        return digits("train" if split == "train" else "test", run.size)[0]
    if split is not None:
        return _of_source(source, run, source.path, split)
    try:
        return _of_source(source, run, source.path, "test")
    except DataError:
        return _of_source(source, run, source.path, source.split)


def _opened(run: CoarseToFineRun, path: Path, split: str | None, convert: bool) -> Images:
    if path.suffix.lower() in SUFFIXES and path.is_file():
        return _single_picture(run, path, convert)
    if not convert:
        return open_images(path, split=split)
    return _of_source(_own_source(run), run, path, split)


def _single_picture(run: CoarseToFineRun, path: Path, convert: bool) -> Images:
    pixels = read_picture(path, run.config.channels if convert else None)
    if convert:
        source = _own_source(run)
        pixels = Shaping(run.size, run.config.channels, source.fit, source.crop).apply(str(path), pixels)
    return Images(torch.from_numpy(pixels.copy()), name=str(path), format="picture")


def _of_source(source: ImageSource, run: CoarseToFineRun, path: Path, split: str | None) -> Images:
    """The set at `path`, shaped as `source` says, at the size that the run has reached."""
    key = source.key if path.resolve() == source.path.resolve() else None
    size, channels = run.size, run.config.channels
    if source.fit == "pad" and source.size is not None and source.size != size:
        # Padded to the full size first: a run that is not there yet sees those averaged down.
        from fastebm.data import average_pool_to

        full = open_images(path, source.size, channels, split, fit="pad", crop=source.crop, key=key)
        pooled = average_pool_to(full.pixels.float(), size).round().to(torch.uint8)
        return Images(pooled, full.labels, full.name, full.format, full.split, full.classes)
    return open_images(path, size, channels, split, fit=source.fit, crop=source.crop, key=key)


def _own_source(run: CoarseToFineRun) -> ImageSource:
    """How the run's images got their size; the largest square resized, where the run doesn't say."""
    stored = RunFolder.existing(run.path).images()
    source = DigitsSource() if stored is None else source_from_json(stored)
    return source if isinstance(source, ImageSource) else ImageSource(run.path)


def shape(sides: tuple[int, ...] | torch.Size) -> str:
    """Channels, height and width in words."""
    return "x".join(map(str, sides))
