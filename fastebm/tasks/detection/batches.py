"""Inputs of outlier detection: the energy of a model, and batches of images that are checked first."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from fastebm.compiler import EnergyGradient, energy_gradient
from fastebm.data import ImagePyramid, Images
from fastebm.distributed import shared_rows
from fastebm.progress import progress_bar
from fastebm.tasks.arguments import check_layout, check_values, check_whole
from fastebm.training import CoarseToFineRun, Run, load

Result = TypeVar("Result")
Energy = Callable[[Tensor], Tensor]
Model = Run | str | Path | Energy | EnergyGradient
"""A run, its folder, or an energy `(B, C, H, W) -> (B,)`, low for real images."""


@dataclass(frozen=True)
class AtSize:
    """Images that are averaged down to `size` batch by batch."""

    images: Images
    size: int

    def __len__(self) -> int:
        return len(self.images)

    @functools.cached_property
    def levels(self) -> ImagePyramid:
        return ImagePyramid(self.images, self.size)

    def batch(self, rows: slice) -> Tensor:
        return self.levels.batch(self.size, torch.arange(len(self), device="cpu")[rows])


ImageBatches = Tensor | Images | AtSize | Iterable[Tensor]


def energy_of(model: Model) -> Energy | EnergyGradient:
    """The energy of a model at full size. Raises ValueError for a run without one, TypeError for what is no model."""
    if isinstance(model, str | Path):
        return energy_of(load(model))
    if isinstance(model, CoarseToFineRun):
        return model.levels[model.size]
    if isinstance(model, Run):
        if (energy := getattr(model, "energy", None)) is None:
            raise ValueError(f"{model.path} has no energy, so that it can't score images")
        return energy
    if isinstance(model, type) or not callable(model):
        kind = model.__name__ if isinstance(model, type) else type(model).__name__
        raise TypeError(f"a model is a run, the folder of one, or an energy of images, got {kind}")
    return model


def gradient_of(energy: Energy | EnergyGradient, dtype: torch.dtype | None, engine: str) -> EnergyGradient:
    """The gradient of an energy; an `EnergyGradient` is returned as it is, with its own dtype and engine."""
    return energy if isinstance(energy, EnergyGradient) else energy_gradient(energy, dtype=dtype, engine=engine)


def over_images(images: ImageBatches, compute: Callable[[range | None], Result]) -> Result:
    """`shared_rows` of a set of images; of an iterable, whose images can't be counted, `compute(None)`: of all."""
    return shared_rows(len(images), compute) if isinstance(images, Tensor | Images | AtSize) else compute(None)


def image_batches(
    images: ImageBatches, batch_size: int, device: torch.device, progress: bool | str, rows: range | None = None
) -> Iterator[tuple[int, Tensor]]:
    """Batches (B, C, H, W) on `device`, each with the number of its first image; of `rows` alone, if they are given.

    Raises ValueError and TypeError for images that `outlier_scores` refuses.
    """
    batch_size = check_whole("batch_size", batch_size)
    shape: torch.Size | None = None
    first = 0 if rows is None else rows.start
    with progress_bar(
        None if rows is None else len(rows),
        progress if isinstance(progress, str) else "scores",
        "image",
        shown=bool(progress),
    ) as bar:
        for batch in _split(images, batch_size, rows):
            if shape is not None and batch.shape[1:] != shape:
                raise ValueError(f"images must have one shape, got {tuple(shape)} and then {tuple(batch.shape[1:])}")
            shape = batch.shape[1:]
            check_values("images", batch, first=first)
            yield first, batch.to(device)
            first += len(batch)
            bar.update(len(batch))
    if shape is None:
        raise ValueError("there are no images to score")


def _split(images: ImageBatches, batch_size: int, rows: range | None) -> Iterator[Tensor]:
    if isinstance(images, Tensor) and (images.ndim != 4 or len(images)):
        check_layout("images", images)
    if rows is not None and isinstance(images, Tensor | Images | AtSize):
        for part in (rows[first : first + batch_size] for first in range(0, len(rows), batch_size)):
            at = slice(part.start, part.stop)
            yield images[at] if isinstance(images, Tensor) else images.batch(at)
        return
    if not isinstance(images, Iterable):
        raise TypeError(f"images are a tensor, Images or an iterable of tensors, got {type(images).__name__}")
    for batch in images:
        if isinstance(batch, Tensor) and batch.ndim == 4 and not len(batch):
            continue
        check_layout("images", batch)
        yield from batch.split(batch_size)


def check_finite(name: str, values: Tensor, first: int) -> None:
    """Raises ValueError with the number of the image where a value is not finite; `first` numbers the first value."""
    if not values.isfinite().all():
        number = int((~values.isfinite()).nonzero()[0])
        raise ValueError(f"the {name.replace('_', ' ')} of image {first + number} is {float(values[number])}")
