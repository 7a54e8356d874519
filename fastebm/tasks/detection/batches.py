"""Inputs of outlier detection: the energy of a model, and batches of images that are checked first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from fastebm.compiler import EnergyGradient, energy_gradient
from fastebm.data import Images
from fastebm.progress import progress_bar
from fastebm.training import CoarseToFineRun, Run, load

Energy = Callable[[Tensor], Tensor]
Model = Run | str | Path | Energy | EnergyGradient
"""A run, its folder, or an energy `(B, C, H, W) -> (B,)`, low for real images."""
ImageBatches = Tensor | Images | Iterable[Tensor]


def energy_of(model: Model) -> Energy | EnergyGradient:
    """The energy of a model at full size. Raises ValueError for a run without one."""
    if isinstance(model, str | Path):
        return energy_of(load(model))
    if isinstance(model, CoarseToFineRun):
        return model.levels[model.size]
    if isinstance(model, Run):
        if (energy := getattr(model, "energy", None)) is None:
            raise ValueError(f"{model.path} has no energy, so that it can't score images")
        return energy
    return model


def gradient_of(energy: Energy | EnergyGradient, dtype: torch.dtype | None, engine: str) -> EnergyGradient:
    """The gradient of an energy; an `EnergyGradient` is returned as it is, with its own dtype and engine."""
    return energy if isinstance(energy, EnergyGradient) else energy_gradient(energy, dtype=dtype, engine=engine)


def image_batches(
    images: ImageBatches, batch_size: int, device: torch.device, progress: bool
) -> Iterator[tuple[int, Tensor]]:
    """Batches (B, C, H, W) on `device`, each with the number of its first image.

    Raises ValueError and TypeError for images that `outlier_scores` refuses.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    first = 0
    total = len(images) if isinstance(images, Tensor | Images) else None
    with progress_bar(total, "scores", "image", shown=progress) as bar:
        for batch in _split(images, batch_size):
            _check_images(batch, first)
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
    for batch in (images,) if isinstance(images, Tensor) else images:
        if len(batch):
            yield from batch.split(batch_size)


def _check_images(batch: Tensor, first: int) -> None:
    if batch.dtype != torch.float32:
        raise TypeError(
            f"images must be float32 in [-1, 1], got {batch.dtype}; fastebm.data.to_float converts bytes to it"
        )
    if batch.ndim != 4 or 0 in batch.shape:
        raise ValueError(f"images must be (N, C, H, W), none of them 0, got {tuple(batch.shape)}")
    low, high = batch.flatten(1).aminmax(dim=1)
    wrong = ~((low >= -1) & (high <= 1))  # so written, NaN is wrong as well
    if wrong.any():
        number = int(wrong.nonzero()[0])
        values = f"from {float(low[number]):g} to {float(high[number]):g}"
        raise ValueError(f"images must lie in [-1, 1], and image {first + number} has values {values}")


def check_finite(name: str, values: Tensor, first: int) -> None:
    """Raises ValueError with the number of the image where a value is not finite; `first` numbers the first value."""
    if not values.isfinite().all():
        number = int((~values.isfinite()).nonzero()[0])
        raise ValueError(f"the {name.replace('_', ' ')} of image {first + number} is {float(values[number])}")
