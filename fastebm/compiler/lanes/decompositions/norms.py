"""Means, variances and normalisations.

PyTorch's own decompositions compute variances in one pass or return what backward passes need in other forms. These
take differences from the mean, as its kernels do.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def var_mean(
    x: Tensor, dim: Any = None, *, correction: float | None = None, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    dims = list(range(x.ndim)) if dim is None or dim == [] else list(dim)
    count = math.prod(x.shape[d] for d in dims)
    mean = x.sum(dims, keepdim=True) / count
    correction = 1 if correction is None else correction
    variance = (x - mean).square().sum(dims, keepdim=keepdim) / max(count - correction, 0)
    return variance, mean if keepdim else mean.reshape(variance.shape)


def var(x: Tensor, dim: Any = None, *, correction: float | None = None, keepdim: bool = False) -> Tensor:
    return var_mean(x, dim, correction=correction, keepdim=keepdim)[0]


def average(x: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    dims = list(range(x.ndim)) if dim is None or dim == [] else list(dim)
    return x.sum(dims, keepdim=keepdim, dtype=dtype) / math.prod(x.shape[d] for d in dims)


def _standardized(x: Tensor, dims: list[int], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    variance, mean = var_mean(x, dims, correction=0, keepdim=True)
    scale = (variance + eps).rsqrt()
    return (x - mean) * scale, mean, scale


def layer_norm(
    x: Tensor, shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    y, mean, scale = _standardized(x, list(range(-len(shape), 0)), eps)
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias), mean, scale


def _standardized_backward(grad: Tensor, y: Tensor, scale: Tensor, dims: list[int]) -> Tensor:
    return (grad - average(grad, dims, True) - y * average(grad * y, dims, True)) * scale


def layer_norm_backward(
    grad: Tensor,
    x: Tensor,
    shape: list[int],
    mean: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    outer = list(range(x.ndim - len(shape)))
    y = (x - mean) * scale
    scaled = grad if weight is None else grad * weight
    return (
        _standardized_backward(scaled, y, scale, list(range(-len(shape), 0))) if mask[0] else None,
        (grad * y).sum(outer) if mask[1] else None,
        grad.sum(outer) if mask[2] else None,
    )


def group_norm_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    n: int,
    channels: int,
    pixels: int,
    groups: int,
    mask: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    grouped = (n, groups, channels // groups * pixels)
    factor = scale.reshape(n, groups, 1)
    y = (x.reshape(grouped) - mean.reshape(n, groups, 1)) * factor
    given = grad.reshape(n, channels, pixels)
    scaled = given if weight is None else given * weight.reshape(1, channels, 1)
    slope = _standardized_backward(scaled.reshape(grouped), y, factor, [2]).reshape(x.shape) if mask[0] else None
    return (
        slope,
        (given * y.reshape(given.shape)).sum([0, 2]) if mask[1] else None,
        given.sum([0, 2]) if mask[2] else None,
    )


def group_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, n: int, channels: int, pixels: int, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    y, mean, scale = _standardized(x.reshape(n, groups, channels // groups * pixels), [2], eps)
    y = y.reshape(x.shape)
    per_channel = (1, channels, *[1] * (x.ndim - 2))
    y = y if weight is None else y * weight.reshape(per_channel)
    y = y if bias is None else y + bias.reshape(per_channel)
    return y, mean.reshape(n, groups), scale.reshape(n, groups)


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (1, x.shape[1], *[1] * (x.ndim - 2))
    if training:
        y, saved, scale = _standardized(x, [d for d in range(x.ndim) if d != 1], eps)
    else:
        assert mean is not None
        assert variance is not None
        saved, scale = mean.reshape(shape), (variance + eps).rsqrt().reshape(shape)
        y = (x - saved) * scale
    y = y if weight is None else y * weight.reshape(shape)
    y = y if bias is None else y + bias.reshape(shape)
    return y, saved.reshape(-1), scale.reshape(-1)


def batch_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    saved: Tensor | None,
    saved_scale: Tensor | None,
    training: bool,
    eps: float,
    mask: list[bool],
) -> tuple[Tensor, None, None]:
    if mask[1] or mask[2]:
        return NotImplemented
    shape = (1, x.shape[1], *[1] * (x.ndim - 2))
    grad = grad if weight is None else grad * weight.reshape(shape)
    if not training:
        assert variance is not None
        return grad * (variance + eps).rsqrt().reshape(shape), None, None
    dims = [d for d in range(x.ndim) if d != 1]
    y, _, scale = _standardized(x, dims, eps)
    return _standardized_backward(grad, y, scale, dims), None, None


TABLE: dict[Any, Any] = {
    aten.native_layer_norm.default: layer_norm,
    aten.native_group_norm.default: group_norm,
    aten.native_layer_norm_backward.default: layer_norm_backward,
    aten.native_group_norm_backward.default: group_norm_backward,
    aten.native_batch_norm.default: batch_norm,
    aten.native_batch_norm_backward.default: batch_norm_backward,
    aten.mean.default: average,
    aten.mean.dim: average,
    aten.var_mean.correction: var_mean,
    aten.var.correction: var,
}
