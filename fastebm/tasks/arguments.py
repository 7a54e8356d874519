"""Checks of what tasks are given: numbers, seeds, images, and whether the results fit into memory.

Each raises ValueError, or TypeError for another type, with one line that says what was given and what is needed.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastebm import memory, rng

MAX_STEPS = 2**24
"""The largest number of steps of a level or a search; their schedule is then a table of 128 MiB."""
_COPIES = 4  # of all chains that a task holds at a time: starts, what is known, ends, results


def check_whole(name: str, value: Any, least: int = 1, most: int = rng.MAX_CHAIN) -> int:
    """`value` as an int in [least, most]."""
    whole = rng.as_int(name, value)
    if whole < least:
        raise ValueError(f"{name} must be at least {least}, got {whole}")
    if whole > most:
        raise ValueError(f"{name} must be at most {most:,}, got {whole}")
    return whole


def check_number(name: str, value: Any, least: float = -math.inf, *, above: float = -math.inf) -> float:
    """`value` as a float that is finite in float32, at least `least` and greater than `above`."""
    try:
        if isinstance(value, bool | str | bytes):
            raise TypeError
        number = float(value)
    except OverflowError:
        number = math.inf
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be a number, got a {type(value).__name__}") from None
    if not abs(number) <= torch.finfo(torch.float32).max:
        raise ValueError(f"{name} must be finite{' in float32' if math.isfinite(number) else ''}, got {number}")
    if number < least:
        raise ValueError(f"{name} must {'not be negative' if least == 0 else f'be at least {least:g}'}, got {number}")
    if number <= above:
        raise ValueError(f"{name} must be {'positive' if above == 0 else f'more than {above:g}'}, got {number}")
    return number


def check_flag(name: str, value: Any) -> bool:
    """`value`, if it is True or False."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got a {type(value).__name__}")
    return bool(value)


def settle(options: Any, **checked: Any) -> None:
    """Sets fields of a frozen dataclass to their checked values, for its `__post_init__`."""
    for name, value in checked.items():
        object.__setattr__(options, name, value)


def check_seed(seed: Any) -> int:
    """`seed` as an int in the range of `torch.manual_seed`, [-2^63, 2^64)."""
    rng.make_key(seed)
    return rng.as_int("seed", seed)


def check_batch_size(batch_size: int | None) -> None:
    """A batch size is a positive int, or None for all at once."""
    if batch_size is not None:
        check_whole("batch_size", batch_size)


def check_memory(what: str, numbers: int, device: torch.device) -> None:
    """Raises ValueError where `what`, of so many float32 numbers, does not fit into the memory of a device."""
    memory.check_memory(what, 4 * _COPIES * numbers, device)


def check_layout(name: str, images: Any) -> None:
    """Images are a float32 tensor (N, C, H, W), none of them 0, in memory."""
    if not isinstance(images, Tensor):
        raise TypeError(f"{name} must be a float32 tensor, got {type(images).__name__}")
    if images.dtype != torch.float32:
        remedy = ": fastebm.data.to_float makes one of bytes" if images.dtype == torch.uint8 else ""
        raise TypeError(f"{name} must be a float32 tensor, got {images.dtype}{remedy}")
    if images.layout != torch.strided or images.device.type == "meta":
        raise TypeError(f"{name} must be a dense tensor in memory, got {images.layout} on {images.device}")
    if images.ndim != 4 or 0 in images.shape:
        raise ValueError(f"{name} must be (N, C, H, W), none of them 0, got {tuple(images.shape)}")


def check_values(name: str, images: Tensor, *, bounded: bool = True, first: int = 0) -> None:
    """Images are finite and, if `bounded`, in [-1, 1]; `first` is the number of the first one in messages."""
    finite = images.isfinite().flatten(1).all(1)
    if not finite.all():
        broken = first + int((~finite).nonzero()[0])
        raise ValueError(f"{name} must be finite, but image {broken} has pixels that are infinite or not a number")
    if not bounded:
        return
    low, high = images.aminmax()
    if not (low >= -1 and high <= 1):
        number = first + int(images.flatten(1).abs().amax(1).gt(1).nonzero()[0])
        remedy = ": clamp(-1, 1) cuts them" if low >= -1.1 and high <= 1.1 else ""
        raise ValueError(
            f"{name} must lie in [-1, 1], got values from {float(low):g} to {float(high):g}, the first of them in "
            f"image {number}{remedy}"
        )
