"""Whether a tensor is a measurement of a degradation."""

from __future__ import annotations

import torch
from torch import Tensor

from fastebm.tasks.restoration.degradations import Degradation


def measured_images(y: Tensor, degradation: Degradation) -> Tensor:
    """A⁺y of measurements y (B, ...), (B, C, H, W).

    Raises TypeError unless y is float32 or float64; ValueError where its shape is not what the degradation gives for
    images of A⁺y, which would be broadcast, for B = 0 and for images of which something infinite or NaN was measured.
    """
    if not isinstance(degradation, Degradation):
        raise TypeError(f"a degradation is needed, got {type(degradation).__name__}")
    if not isinstance(y, Tensor) or y.dtype not in (torch.float32, torch.float64):
        kind = y.dtype if isinstance(y, Tensor) else type(y).__name__
        raise TypeError(f"y must be a tensor in float32 as degradation.A gives it, got {kind}")
    if y.layout != torch.strided or y.device.type == "meta":
        raise TypeError(f"y must be a dense tensor in memory, got {y.layout} on {y.device}")
    if y.ndim < 2 or 0 in y.shape:
        raise ValueError(f"y must hold at least one measurement, (B, ...), got {tuple(y.shape)}")
    name = " ".join(repr(degradation).split())
    devices = {buffer.device for buffer in degradation.buffers()}
    if devices - {y.device}:
        raise ValueError(f"y is on {y.device}, and the degradation on {devices.pop()}")
    try:
        base = degradation.pinv(y)
        measured = degradation.A(base).shape
    except (RuntimeError, IndexError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"y of the shape {tuple(y.shape)} is no measurement of {name}: {reason}") from error
    if measured != y.shape:
        raise ValueError(f"y has the shape {tuple(y.shape)}, but {name} gives {tuple(measured)}")
    if not base.isfinite().all():
        number = int((~base.isfinite().flatten(1).all(1)).nonzero()[0])
        raise ValueError(f"measurement {number} of y has values that are infinite or not a number")
    return base
