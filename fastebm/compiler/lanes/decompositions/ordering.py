"""What depends on the order of numbers along an axis: by comparing all pairs, for short axes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .constants import literal

aten = torch.ops.aten

# Axes up to here: their square is what a loop has to go through.
LONGEST = 128


def _numbers(n: int, like: Tensor) -> Tensor:
    return literal(lambda: torch.arange(n, device="cpu"), like)


def _last(x: Tensor, dim: int) -> Tensor:
    return x.movedim(dim, -1)


def _first_where(equal: Tensor) -> Tensor:
    """The first place along the last axis at which there is a truth."""
    n = equal.shape[-1]
    return torch.where(equal, _numbers(n, equal), n).amin(-1)


def argmax(x: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor:
    moved = x.reshape(-1) if dim is None else _last(x, dim)
    index = _first_where(moved == moved.amax(-1, keepdim=True))
    if not keepdim:
        return index
    return index.reshape([1] * x.ndim) if dim is None else index.unsqueeze(dim)


def argmin(x: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor:
    return argmax(-x, dim, keepdim)


def max_dim(x: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    return x.amax(dim, keepdim=keepdim), argmax(x, dim, keepdim)


def min_dim(x: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    return x.amin(dim, keepdim=keepdim), argmax(-x, dim, keepdim)


def sort(x: Tensor, dim: int = -1, descending: bool = False) -> tuple[Tensor, Tensor]:
    """By the rank of each number: how many come before it. Equal ones keep their order."""
    if x.ndim == 0:
        return x.clone(), torch.zeros_like(x, dtype=torch.int64)
    moved = _last(x, dim)
    n = moved.shape[-1]
    if n > LONGEST:
        return NotImplemented
    i, j = moved.unsqueeze(-1), moved.unsqueeze(-2)
    earlier = literal(lambda: torch.arange(n, device="cpu")[None] < torch.arange(n, device="cpu")[:, None], x)
    before = (j > i) if descending else (j < i)
    rank = (before | ((j == i) & earlier)).sum(-1)
    here = rank.unsqueeze(-2) == _numbers(n, x).unsqueeze(-1)  # (..., place, number)
    values = torch.where(here, j, 0.0).sum(-1)
    indices = torch.where(here, _numbers(n, x), 0).sum(-1)
    return values.movedim(-1, dim), indices.movedim(-1, dim)


def sort_stable(
    x: Tensor, *, stable: bool | None = None, dim: int = -1, descending: bool = False
) -> tuple[Tensor, Tensor]:
    return sort(x, dim, descending)


def topk(x: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> tuple[Tensor, Tensor]:  # noqa: A002
    made = sort(x, dim, largest)
    return made if made is NotImplemented else tuple(part.narrow(dim, 0, k) for part in made)  # type: ignore[return-value]


def kthvalue(x: Tensor, k: int, dim: int = -1, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    made = sort(x, dim)
    if made is NotImplemented:
        return made
    values, indices = (part.narrow(dim, k - 1, 1) for part in made)
    return (values, indices) if keepdim else (values.squeeze(dim), indices.squeeze(dim))


def median_dim(x: Tensor, dim: int = -1, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    return kthvalue(x, (x.shape[dim] + 1) // 2, dim, keepdim)


def median(x: Tensor) -> Tensor:
    made = median_dim(x.reshape(-1))
    return made if made is NotImplemented else made[0]


def _until(x: Tensor, dim: int, fill: float) -> Tensor | None:
    """(..., place, number): the numbers up to each place, `fill` beyond; None where the axis is long."""
    moved = _last(x, dim)
    n = moved.shape[-1]
    if n > LONGEST:
        return None
    seen = literal(lambda: torch.arange(n, device="cpu")[None] <= torch.arange(n, device="cpu")[:, None], x)
    return torch.where(seen, moved.unsqueeze(-2), fill)


def _extreme_until(x: Tensor, dim: int, sign: int) -> tuple[Tensor, Tensor]:
    if x.ndim == 0:
        return x.clone(), torch.zeros_like(x, dtype=torch.int64)
    seen = _until(sign * x, dim, -torch.inf)
    if seen is None:
        return NotImplemented
    values = seen.amax(-1)
    indices = torch.where(seen == values.unsqueeze(-1), _numbers(seen.shape[-1], x), -1).amax(-1)
    return (sign * values).movedim(-1, dim), indices.movedim(-1, dim)


def cummax(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    return _extreme_until(x, dim, 1)


def cummin(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    return _extreme_until(x, dim, -1)


def cumprod(x: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Tensor:
    if x.ndim == 0:
        return x.clone()
    seen = _until(x if dtype is None else x.to(dtype), dim, 1.0)
    return NotImplemented if seen is None else seen.prod(-1).movedim(-1, dim)


def logcumsumexp(x: Tensor, dim: int) -> Tensor:
    if x.ndim == 0:
        return x.clone()
    seen = _until(x, dim, -torch.inf)
    if seen is None:
        return NotImplemented
    largest = seen.amax(-1, keepdim=True)
    shift = torch.where(largest.abs() == torch.inf, 0.0, largest)
    return ((seen - shift).exp().sum(-1).log() + shift.squeeze(-1)).movedim(-1, dim)


def bucketize(x: Tensor, boundaries: Tensor, *, out_int32: bool = False, right: bool = False) -> Tensor:
    if boundaries.numel() > LONGEST:
        return NotImplemented
    below = boundaries <= x.unsqueeze(-1) if right else boundaries < x.unsqueeze(-1)
    return below.sum(-1).to(torch.int32 if out_int32 else torch.int64)


TABLE: dict[Any, Any] = {
    aten.argmax.default: argmax,
    aten.argmin.default: argmin,
    aten.max.dim: max_dim,
    aten.min.dim: min_dim,
    aten.sort.default: sort,
    aten.sort.stable: sort_stable,
    aten.topk.default: topk,
    aten.kthvalue.default: kthvalue,
    aten.median.dim: median_dim,
    aten.median.default: median,
    aten.cummax.default: cummax,
    aten.cummin.default: cummin,
    aten.cumprod.default: cumprod,
    aten.logcumsumexp.default: logcumsumexp,
    aten.bucketize.Tensor: bucketize,
}
