"""Inputs of outlier detection: the energy of a model, and batches of images that are checked first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from fastebm.compiler import EnergyGradient, energy_gradient
from fastebm.data import Images
from fastebm.progress import progress_bar
from fastebm.tasks.arguments import check_layout, check_values, check_whole
from fastebm.training import CoarseToFineRun, Run, load

Energy = Callable[[Tensor], Tensor]
Model = Run | str | Path | Energy | EnergyGradient
"""A run, its folder, or an energy `(B, C, H, W) -> (B,)`, low for real images."""
ImageBatches = Tensor | Images | Iterable[Tensor]


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


def image_batches(
    images: ImageBatches, batch_size: int, device: torch.device, progress: bool | str
) -> Iterator[tuple[int, Tensor]]:
    """Batches (B, C, H, W) on `device`, each with the number of its first image.

    Raises ValueError and TypeError for images that `outlier_scores` refuses.
    """
    batch_size = check_whole("batch_size", batch_size)
    shape: torch.Size | None = None
    first = 0
    total = len(images) if isinstance(images, Tensor | Images) else None
    with progress_bar(total, progress if isinstance(progress, str) else "scores", "image", shown=bool(progress)) as bar:
        for batch in _split(images, batch_size):
            if shape is not None and batch.shape[1:] != shape:
                raise ValueError(f"images must have one shape, got {tuple(shape)} and then {tuple(batch.shape[1:])}")
            shape = batch.shape[1:]
            check_values("images", batch, first=first)
            yield first, batch.to(device)
            first += len(batch)
            bar.update(len(batch))
    if not first:
        raise ValueError("there are no images to score")


def _split(images: ImageBatches, batch_size: int) -> Iterator[Tensor]:
    if isinstance(images, Images):
        for first in range(0, len(images), batch_size):
            yield images.batch(slice(first, first + batch_size))
        return
    if not isinstance(images, Iterable):
        raise TypeError(f"images are a tensor, Images or an iterable of tensors, got {type(images).__name__}")
    for batch in (images,) if isinstance(images, Tensor) else images:
        if isinstance(batch, Tensor) and batch.ndim == 4 and not len(batch):
            continue
        check_layout("images", batch)
        yield from batch.split(batch_size)


def check_finite(name: str, values: Tensor, first: int) -> None:
    """Raises ValueError with the number of the image where a value is not finite; `first` numbers the first value."""
    if not values.isfinite().all():
        number = int((~values.isfinite()).nonzero()[0])
        raise ValueError(f"the {name.replace('_', ' ')} of image {first + number} is {float(values[number])}")
