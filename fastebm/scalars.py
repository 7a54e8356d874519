"""Numbers that callers hand over, as Python's own: whole and real ones, of numpy and tensors without dimensions too.

And devices, as torch's.
"""

from __future__ import annotations

import math
import numbers
import operator
from typing import Any

import torch
from torch import Tensor

__all__ = ["as_count", "as_device", "as_int", "as_real", "in_float32", "shown"]


def as_int(name: str, number: Any) -> int:
    """`number` as an int: a whole number of Python or numpy, or a tensor of one without dimensions.

    Raises TypeError for anything else, True and False too: to round a seed would repeat noise.
    """
    if type(number) is int:
        return number
    try:
        # Tensors of booleans and of one dimension give an index too.
        if isinstance(number, bool) or (isinstance(number, Tensor) and not _holds_one(number)):
            raise TypeError
        return operator.index(number.detach() if isinstance(number, Tensor) else number)
    except (TypeError, RuntimeError):
        raise TypeError(f"{name} must be an integer, got {shown(number)}") from None


def as_count(name: str, number: Any, least: int = 0) -> int:
    """`number` as an int of at least `least`. Raises TypeError as `as_int` does, and ValueError for a smaller one."""
    count = as_int(name, number)
    if count < least:
        raise ValueError(f"{name} must {f'be at least {least}' if least else 'not be negative'}, got {count}")
    return count


def as_device(device: torch.device | str) -> torch.device:
    """`device` as torch's. Raises RuntimeError for a GPU where torch has no CUDA: by torch, that is an assertion."""
    found = torch.device(device)
    if found.type == "cuda" and not torch.backends.cuda.is_built():
        raise RuntimeError(f"device {str(found)!r} was given, but torch {torch.__version__} is built without CUDA")
    return found


def as_real(name: str, number: Any) -> float:
    """`number` as a float: a real number of Python or numpy, a fraction, or a tensor of one without dimensions.

    Raises TypeError for anything else, True and False too, and ValueError for a number that no float holds.
    """
    if type(number) is float:
        return number
    if isinstance(number, Tensor):
        accepted = _holds_one(number) and not number.is_complex()
        number = number.detach() if accepted else number
    elif getattr(number, "shape", None) == ():  # of numpy
        accepted = number.dtype.kind in "iuf"
    else:
        accepted = isinstance(number, numbers.Real) and type(number) is not bool
    if not accepted:
        raise TypeError(f"{name} must be a real number, got {shown(number)}")
    try:
        return float(number)
    except OverflowError:
        raise ValueError(f"{name} must fit into a float, got a number beyond 1.8e308") from None


def in_float32(value: float) -> float:
    """0 or an infinity where float32 holds no nearer number, else `value` as it is."""
    if abs(value) <= 2.0**-150:
        return 0.0
    return math.copysign(math.inf, value) if abs(value) >= 2.0**128 - 2.0**103 else value


def _holds_one(tensor: Tensor) -> bool:
    """Whether a tensor is a number that can be read."""
    return tensor.dim() == 0 and tensor.dtype != torch.bool and not tensor.is_meta


def shown(value: Any) -> str:
    """A value on one short line, for an error."""
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} of {value.dtype} on {value.device}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."
