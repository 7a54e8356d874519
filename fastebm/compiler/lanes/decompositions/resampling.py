"""Interpolation, adaptive means and replicated borders: axis by axis, by a constant matrix or constant indices."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .constants import computed, literal

aten = torch.ops.aten

# Rows of (out, n) matrices, one for each axis of the image.
Matrices = list[Callable[[], Tensor]]


def _along(x: Tensor, matrix: Callable[[], Tensor], axis: int) -> Tensor:
    """An axis of x times a matrix, (out, n)."""
    weight = literal(lambda: matrix().T, x)
    return (x.transpose(axis, -1) @ weight).transpose(axis, -1)


def _forward(x: Tensor, matrices: Matrices) -> Tensor:
    for i, matrix in enumerate(matrices):
        x = _along(x, matrix, i - len(matrices))
    return x


def _backward(grad: Tensor, matrices: Matrices) -> Tensor:
    def transposed(matrix: Callable[[], Tensor]) -> Tensor:
        return matrix().T

    return _forward(grad, [functools.partial(transposed, matrix) for matrix in matrices])


# ---- interpolation


def _interpolating(
    op: Any, sizes: Sequence[int], out: Sequence[int], align: tuple[bool, ...], scales: Sequence[float | None]
) -> Matrices:
    """The matrix of each axis: what the operation makes of the unit vectors along it."""

    def matrix(axis: int) -> Tensor:
        count, n = len(sizes), sizes[axis]
        # Two pixels along other axes, which stay as they are: PyTorch's antialiasing is wrong for one.
        image, wanted = [2] * count, [2] * count
        image[axis], wanted[axis] = n, out[axis]
        eye = torch.eye(n, dtype=torch.float64, device="cpu")
        spread = eye.reshape(1, n, *(n if i == axis else 1 for i in range(count))).expand(1, n, *image)
        used = [scale if i == axis else None for i, scale in enumerate(scales)]
        made = op(spread.contiguous(), wanted, *align, *used)[0].movedim(axis + 1, 1)
        return made.reshape(n, out[axis], -1)[..., 0].T

    return [functools.partial(matrix, axis) for axis in range(len(sizes))]


def _interpolation(op: Any, axes: int, aligned: bool) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    def split(arguments: Sequence[Any]) -> tuple[tuple[bool, ...], list[Any]]:
        align = tuple(arguments[:1]) if aligned else ()
        scales = list(arguments[len(align) :])
        return align, scales + [None] * (axes - len(scales))

    def forward(x: Tensor, out: Sequence[int], *arguments: Any) -> Tensor:
        return _forward(x, _interpolating(op, x.shape[2:], out, *split(arguments)))

    def backward(grad: Tensor, out: Sequence[int], size: Sequence[int], *arguments: Any) -> Tensor:
        return _backward(grad, _interpolating(op, size[2:], out, *split(arguments)))

    return forward, backward


def _nearest(op: Any, axes: int) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Rows of the matrix that have a single one are indices."""

    def indices(sizes: Sequence[int], out: Sequence[int], scales: Sequence[Any]) -> list[Tensor]:
        filled = [*scales, *[None] * (axes - len(scales))]
        return [computed(functools.partial(_ones, matrix)) for matrix in _interpolating(op, sizes, out, (), filled)]

    def forward(x: Tensor, out: Sequence[int], *scales: Any) -> Tensor:
        return _read(x, indices(x.shape[2:], out, scales))

    def backward(grad: Tensor, out: Sequence[int], size: Sequence[int], *scales: Any) -> Tensor:
        return _write(grad, size, indices(size[2:], out, scales))

    return forward, backward


def _ones(matrix: Callable[[], Tensor]) -> Tensor:
    return matrix().argmax(1)


def _read(x: Tensor, indices: Sequence[Tensor]) -> Tensor:
    for i, index in enumerate(indices):
        x = x.index_select(i - len(indices), literal(index, x))
    return x


def _write(grad: Tensor, size: Sequence[int], indices: Sequence[Tensor]) -> Tensor:
    """The adjoint of `_read`."""
    for i, index in enumerate(indices):
        axis = grad.ndim - len(indices) + i
        shape = list(grad.shape)
        shape[axis] = size[axis]
        grad = grad.new_zeros(shape).index_add(axis, literal(index, grad), grad)
    return grad


# ---- adaptive means


def _adaptive(sizes: Sequence[int], out: Sequence[int]) -> Matrices:
    def matrix(n: int, o: int) -> Tensor:
        i, j = torch.arange(o, device="cpu")[:, None], torch.arange(n, device="cpu")[None]
        inside = ((j >= i * n // o) & (j < -(-(i + 1) * n // o))).to(torch.float64)
        return inside / inside.sum(1, keepdim=True)

    return [functools.partial(matrix, n, o) for n, o in zip(sizes, out, strict=True)]


def adaptive_avg_pool(x: Tensor, out: Sequence[int]) -> Tensor:
    return _forward(x, _adaptive(x.shape[-len(out) :], out))


def _adaptive_backward(axes: int, grad: Tensor, x: Tensor) -> Tensor:
    return _backward(grad, _adaptive(x.shape[-axes:], grad.shape[-axes:]))


# ---- replicated borders


def _replicating(sizes: Sequence[int], padding: Sequence[int]) -> list[Tensor]:
    def index(n: int, low: int, high: int) -> Tensor:
        return torch.arange(-low, n + high, device="cpu").clamp(0, n - 1)

    ends = zip(padding[-2::-2], padding[::-2], strict=True)
    parts = [functools.partial(index, n, low, high) for n, (low, high) in zip(sizes, ends, strict=True)]
    return [computed(part) for part in parts]


def _replication_pad(x: Tensor, padding: Sequence[int]) -> Tensor:
    return _read(x, _replicating(x.shape[-(len(padding) // 2) :], padding))


def _replication_pad_backward(grad: Tensor, x: Tensor, padding: Sequence[int]) -> Tensor:
    return _write(grad, x.shape, _replicating(x.shape[-(len(padding) // 2) :], padding))


TABLE: dict[Any, Any] = {
    aten._adaptive_avg_pool2d.default: adaptive_avg_pool,
    aten._adaptive_avg_pool3d.default: adaptive_avg_pool,
    aten._adaptive_avg_pool2d_backward.default: functools.partial(_adaptive_backward, 2),
    aten._adaptive_avg_pool3d_backward.default: functools.partial(_adaptive_backward, 3),
}
for _axes in (1, 2, 3):
    TABLE[getattr(aten, f"replication_pad{_axes}d").default] = _replication_pad
    TABLE[getattr(aten, f"replication_pad{_axes}d_backward").default] = _replication_pad_backward
    for _name in (f"upsample_nearest{_axes}d", f"_upsample_nearest_exact{_axes}d"):
        _op, _adjoint = getattr(aten, _name).default, getattr(aten, f"{_name}_backward").default
        TABLE[_op], TABLE[_adjoint] = _nearest(_op, _axes)
for _name, _axes in (
    ("upsample_linear1d", 1),
    ("upsample_bilinear2d", 2),
    ("upsample_trilinear3d", 3),
    ("upsample_bicubic2d", 2),
    ("_upsample_bilinear2d_aa", 2),
    ("_upsample_bicubic2d_aa", 2),
):
    _op, _adjoint = getattr(aten, _name).default, getattr(aten, f"{_name}_backward").default
    TABLE[_op], TABLE[_adjoint] = _interpolation(_op, _axes, True)
