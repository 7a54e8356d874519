"""The range of values that images from elsewhere have: bytes, floats in [0, 1], floats in [-1, 1] or another."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastebm.data.images import to_float

ValueRange = tuple[float, float]
"""The values of black and of white."""
SIGNED: ValueRange = (-1.0, 1.0)
"""The range of images in this library."""

# Filters that sharpen, such as bicubic resizing, take images in [0, 1] to about -0.1; images in [-1, 1] have blacks
# far below that.
_BELOW_UNIT = -0.25


def to_signed(images: Tensor, value_range: ValueRange | None = None, name: str = "images") -> Tensor:
    """Images of any shape as float32 in [-1, 1].

    Without `value_range` floats have to be in [-1, 1], with values below -0.25, and bytes in [0, 255]. Floats that all
    lie in [0, 1] are refused, as are bytes of 0 and 1 alone: their values do not say what white is.

    Args:
        images: any real dtype, finite; at most half of one of 256 levels beyond the range, which is clamped.
        value_range: the values of black and white, such as (0, 1), (-1, 1) or (0, 255).
        name: of the images, at the beginning of messages.

    Raises:
        TypeError: for a dtype that is not real.
        ValueError: for no values, values that are not finite or outside of the range, a range that has to be given,
            and one that is not finite or not ascending.

    Example:
        >>> import torch
        >>> from fastebm.data.value_range import to_signed
        >>> to_signed(torch.tensor([0.0, 0.5, 1.0]), (0, 1))
        tensor([-1.,  0.,  1.])
    """
    if value_range is not None and not -math.inf < value_range[0] < value_range[1] < math.inf:
        raise ValueError(f"a value range must be finite with black < white, got {value_range[0]} and {value_range[1]}")
    if not isinstance(images, Tensor) or images.dtype == torch.bool or images.is_complex():
        raise TypeError(f"{name} must be a tensor of real numbers, got {getattr(images, 'dtype', type(images))}")
    if not images.numel():
        raise ValueError(f"{name} must not be empty, got {tuple(images.shape)}")
    coarse = images.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.uint8)
    values = images.detach().to(torch.float32 if coarse else torch.float64)
    low, high = (float(value) for value in values.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"{name} must be finite, and some values are infinite or not a number")
    if value_range is None:
        value_range = _range_of(images, low, high, name)
    black, white = map(float, value_range)
    if images.is_floating_point() and black == 0 and white > 2 and low >= 0 and high <= 1 + 1 / 510:
        raise ValueError(
            f"{name} are floats from {low:g} to {high:g}, which would all be black in the range from 0 to {white:g}: "
            "give the values of black and white as value_range (--range 0 1)"
        )
    slack = (white - black) / 510
    if low < black - slack or high > white + slack:
        raise ValueError(
            f"{name} must lie in [{black:g}, {white:g}], got values from {low:g} to {high:g}: give the values of black "
            "and white as value_range (--range BLACK WHITE)"
        )
    if images.dtype == torch.uint8 and (black, white) == (0, 255):
        return to_float(images)
    return values.sub((black + white) / 2).div((white - black) / 2).clamp(-1, 1).float()


def _range_of(images: Tensor, low: float, high: float, name: str) -> ValueRange:
    """The range that the values show. Raises ValueError where they show none."""
    if images.dtype == torch.uint8:
        if high != 1:
            return 0.0, 255.0
        raise ValueError(
            f"{name} are bytes of 0 and 1 alone: give the values of black and white as value_range (--range 0 1 or "
            "--range 0 255)"
        )
    if not images.is_floating_point():
        raise ValueError(
            f"{name} are {str(images.dtype).removeprefix('torch.')} from {low:g} to {high:g}: give the values of black "
            "and white as value_range (--range 0 255, for example)"
        )
    if low >= _BELOW_UNIT and high <= 1 + 1 / 510:
        raise ValueError(
            f"{name} have values from {low:g} to {high:g}, which may be meant in [0, 1] or in [-1, 1]: give the values "
            "of black and white as value_range (--range 0 1 or --range -1 1)"
        )
    return SIGNED
