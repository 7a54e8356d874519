"""Distances of all pairs, by differences. Where two points agree, the gradient is what PyTorch's kernels define."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .constants import literal

aten = torch.ops.aten


def _distance(difference: Tensor, p: float) -> Tensor:
    if p == 2:
        return difference.square().sum(-1).sqrt()
    if p == 1:
        return difference.abs().sum(-1)
    if p == 0:
        return (difference != 0).to(difference.dtype).sum(-1)
    if math.isinf(p):
        return difference.abs().amax(-1)
    return difference.abs().pow(p).sum(-1).pow(1 / p)


def _slope(grad: Tensor, difference: Tensor, p: float, distance: Tensor) -> Tensor:
    """The gradient of the distances in their differences, (..., D)."""
    grad, distance = grad.unsqueeze(-1), distance.unsqueeze(-1)
    if p == 0:
        return torch.zeros_like(difference)
    if p == 1:
        return grad * difference.sign()
    if math.isinf(p):
        return torch.where(difference.abs() == distance, grad * difference.sign(), 0.0)
    if p == 2:
        slope = grad * difference / distance
    elif p > 2:
        slope = difference * difference.abs().pow(p - 2) * grad / distance.pow(p - 1)
    else:
        slope = difference.sign() * difference.abs().pow(p - 1) * grad / distance.pow(p - 1)
    flat = distance == 0
    return torch.where(flat if p >= 1 else flat | (difference == 0), 0.0, slope)


def cdist_forward(a: Tensor, b: Tensor, p: float, compute_mode: int | None) -> Tensor:
    return _distance(a.unsqueeze(-2) - b.unsqueeze(-3), p)


def cdist_backward(grad: Tensor, a: Tensor, b: Tensor, p: float, distances: Tensor) -> Tensor:
    return _slope(grad, a.unsqueeze(-2) - b.unsqueeze(-3), p, distances).sum(-2)


def _pairs(x: Tensor) -> tuple[Tensor, Tensor]:
    n = x.shape[0]
    return literal(lambda: torch.triu_indices(n, n, 1, device="cpu")[0], x), literal(
        lambda: torch.triu_indices(n, n, 1, device="cpu")[1], x
    )


def pdist_forward(x: Tensor, p: float = 2) -> Tensor:
    first, second = _pairs(x)
    return _distance(x.index_select(0, first) - x.index_select(0, second), p)


def pdist_backward(grad: Tensor, x: Tensor, p: float, distances: Tensor) -> Tensor:
    first, second = _pairs(x)
    slope = _slope(grad, x.index_select(0, first) - x.index_select(0, second), p, distances)
    return torch.zeros_like(x).index_add(0, first, slope).index_add(0, second, -slope)


TABLE: dict[Any, Any] = {
    aten._cdist_forward.default: cdist_forward,
    aten._cdist_backward.default: cdist_backward,
    aten._pdist_forward.default: pdist_forward,
    aten._pdist_backward.default: pdist_backward,
}
