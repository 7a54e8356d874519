"""The images that a task starts from, checked before any work is done on them."""

from __future__ import annotations

import torch
from torch import Tensor

from fastebm.tasks.energies import Model, device_of_model
from fastebm.training import CoarseToFineRun


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


def shape(sides: tuple[int, ...] | torch.Size) -> str:
    """Channels, height and width in words."""
    return "x".join(map(str, sides))
