"""Numbers as callers have them: Python's, numpy's, and tensors without axes."""

from __future__ import annotations

from numbers import Real
from typing import Any

import numpy as np
from torch import Tensor


def as_float(name: str, value: Any) -> float:
    """A real number of any kind as float. Raises TypeError, with `name`, for anything else."""
    number = value.item() if isinstance(value, Tensor | np.ndarray) and value.ndim == 0 else value
    if not isinstance(number, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    return float(number)


def as_int(name: str, value: Any) -> int:
    """A whole number of any kind, 32.0 too, as int. Raises TypeError for no number, ValueError for a fraction."""
    if isinstance(value, int):
        return int(value)
    number = as_float(name, value)
    if not number.is_integer():
        raise ValueError(f"{name} must be a whole number, got {number:g}")
    return int(value)
