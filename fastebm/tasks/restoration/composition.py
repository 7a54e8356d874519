"""Compositions of degradations, by the product of their pseudo-inverses or by the whole matrix."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from fastebm.ops.uniform import uniform
from fastebm.tasks.restoration.degradations import (
    CoarseMeasurement,
    Colorization,
    Degradation,
    Shape,
    SuperResolution,
)

_AT_ONCE = 2**22  # numbers in a batch of basis vectors, 32 MiB of float64


class Composition(Degradation):
    """`second` after `first`, with the pseudo-inverse `first.pinv(second.pinv(y))`. Build it with `compose`.

    That product is the pseudo-inverse if and only if A₁A₁ᵀ maps the row space of A₂ into itself and A₂ᵀA₂ maps the
    range of A₁ into itself (Greville, "Note on the generalized inverse of a matrix product", 1966). It is after every
    operator with A₁A₁ᵀ = c I, that is, super-resolution, colorization and compressed sensing. It is after inpainting if
    the
    mask hides only whole units of the second operator: blocks of pixels that are averaged, or all colours of a pixel.
    """

    def __init__(self, first: Degradation, second: Degradation):
        super().__init__()
        self.first, self.second = first, second
        self.orthogonal_rows = first.orthogonal_rows and second.orthogonal_rows

    def A(self, x: Tensor) -> Tensor:  # noqa: N802
        return self.second.A(self.first.A(x))

    def pinv(self, y: Tensor) -> Tensor:
        return self.first.pinv(self.second.pinv(y))

    def rank(self, shape: Shape) -> int:
        if self.first.orthogonal_rows:
            between = self.first.A(torch.zeros(1, *shape, dtype=torch.float64, device="cpu")).shape[1:]
            return self.second.rank((between[0], between[1], between[2]))
        return round(_trace_of_projection(self, shape))

    def coarsen(self, y: Tensor) -> CoarseMeasurement | None:
        # Averaging commutes with operators that treat all pixels or blocks alike.
        if isinstance(self.first, Colorization) and (half := self.second.coarsen(y)):
            return replace(half, degradation=Composition(self.first, half.degradation))
        if isinstance(self.first, SuperResolution) and self.first.factor % 2 == 0:
            rest = SuperResolution(self.first.factor // 2)
            return CoarseMeasurement(Composition(rest, self.second), y, 1.0)
        return None


class Dense(Degradation):
    """Any linear map of small images, by its matrix; `pinv` uses the singular values.

    Args:
        matrix: float64 (numbers of a measurement, C H W), which acts on flattened images.
        shape: (C, H, W) of the images.
        measured: the shape of a measurement.
        threshold: singular values at or below this share of the largest count as 0, in A as well.
    """

    def __init__(self, matrix: Tensor, shape: Shape, measured: tuple[int, ...], *, threshold: float = 1e-3):
        super().__init__()
        self.shape, self.measured, self.threshold = shape, measured, threshold
        left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
        seen = values > threshold * values.max()
        self.register_buffer("left", left[:, seen].contiguous(), persistent=False)
        self.register_buffer("values", values[seen], persistent=False)
        self.register_buffer("right", right[seen].contiguous(), persistent=False)

    def A(self, x: Tensor) -> Tensor:  # noqa: N802
        if x.shape[1:] != self.shape:
            raise ValueError(f"this degradation is for images {self.shape}, got {tuple(x.shape[1:])}")
        left, values, right = self._parts(x.dtype)
        return ((x.flatten(1) @ right.mT * values) @ left.mT).unflatten(1, self.measured)

    def pinv(self, y: Tensor) -> Tensor:
        if y.shape[1:] != self.measured:
            raise ValueError(f"measurements of this degradation are {self.measured}, got {tuple(y.shape[1:])}")
        left, values, right = self._parts(y.dtype)
        return ((y.flatten(1) @ left / values) @ right).unflatten(1, self.shape)

    def null(self, x: Tensor) -> Tensor:
        flat, (_, _, right) = x.flatten(1), self._parts(x.dtype)
        return (flat - flat @ right.mT @ right).unflatten(1, self.shape)

    def rank(self, shape: Shape) -> int:
        return len(self.get_buffer("values"))

    def _parts(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        left, values, right = (self.get_buffer(name).to(dtype) for name in ("left", "values", "right"))
        return left, values, right

    def extra_repr(self) -> str:
        return f"{self.shape} to {self.measured}, rank {len(self.get_buffer('values'))}, threshold={self.threshold:g}"


def compose(first: Degradation, second: Degradation, shape: Shape, *, most: int = 4096) -> Degradation:
    """`second` after `first` on images of `shape` (C, H, W), with its true pseudo-inverse.

    A `Composition` if the product of the pseudo-inverses is the pseudo-inverse: it is for `first.orthogonal_rows`, and
    otherwise the four equations of Penrose on random images tell. Else a `Dense` operator.

    Raises ValueError if neither is possible, because an image has more than `most` numbers.

    Example:
        >>> from fastebm.tasks.restoration import SeparableBlur, gaussian_kernel
        >>> shape = (3, 32, 32)
        >>> gray_and_small = compose(Colorization(), SuperResolution(4), shape)
        >>> type(gray_and_small).__name__, gray_and_small.rank(shape)
        ('Composition', 64)
        >>> blurred_and_small = compose(SeparableBlur(gaussian_kernel(1.0), 8, 8), SuperResolution(2), (1, 8, 8))
        >>> type(blurred_and_small).__name__
        'Dense'
    """
    composition = Composition(first, second)
    if first.orthogonal_rows or _is_pseudo_inverse(composition, shape):
        return composition
    numbers = math.prod(shape)
    if numbers > most:
        raise ValueError(
            f"the pseudo-inverse of {second} after {first} is not the product of theirs, and images of {numbers} "
            f"numbers are too large to find it by singular values (at most {most})"
        )
    columns = composition.A(torch.eye(numbers, dtype=torch.float64, device="cpu").unflatten(1, shape))
    return Dense(columns.flatten(1).mT, shape, tuple(columns.shape[1:]))


def _is_pseudo_inverse(operator: Degradation, shape: Shape, tolerance: float = 1e-9) -> bool:
    """Whether Penrose's equations hold on four random images; a linear identity that fails does so almost surely."""
    x, other = uniform((8, *shape), seed=0, dtype=torch.float64).sub(0.5).split(4)
    y, other_y = operator.A(x), operator.A(other).neg().exp()  # the second is in general no measurement of an image
    both = operator.pinv(y)
    pairs = [
        (operator.A(both), y),
        (operator.pinv(operator.A(operator.pinv(other_y))), operator.pinv(other_y)),
        (_dots(both, other), _dots(x, operator.pinv(operator.A(other)))),
        (_dots(operator.A(operator.pinv(other_y)), y.exp()), _dots(other_y, operator.A(operator.pinv(y.exp())))),
    ]
    return all(bool((left - right).abs().max() <= tolerance * right.abs().max()) for left, right in pairs)


def _dots(left: Tensor, right: Tensor) -> Tensor:
    return (left * right).flatten(1).sum(1)


def _trace_of_projection(operator: Degradation, shape: Shape) -> float:
    """The trace of A pinv, which is the rank, summed over all unit measurements."""
    measured = operator.A(torch.zeros(1, *shape, dtype=torch.float64, device="cpu")).shape[1:]
    total, numbers = 0.0, measured.numel()
    at_once = max(1, _AT_ONCE // math.prod(shape))
    for first in range(0, numbers, at_once):
        last = min(first + at_once, numbers)
        unit = torch.zeros(last - first, numbers, dtype=torch.float64, device="cpu")
        unit[torch.arange(last - first, device="cpu"), torch.arange(first, last, device="cpu")] = 1.0
        seen = operator.A(operator.pinv(unit.unflatten(1, measured)))
        total += float(
            seen.flatten(1)[torch.arange(last - first, device="cpu"), torch.arange(first, last, device="cpu")].sum()
        )
    return total
