"""Operations that are traced as simpler ones, chosen so that float32 loses nothing.

PyTorch's own decompositions are taken where they are as exact as its kernels. Those here replace them elsewhere, or
write as a product with a constant matrix what is linear in the sample: interpolation, adaptive pooling.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._decomp import core_aten_decompositions, decomposition_table

aten = torch.ops.aten

_ALSO = (
    aten._softmax.default,
    aten._log_softmax.default,
    aten._softmax_backward_data.default,
    aten._log_softmax_backward_data.default,
    aten.native_layer_norm_backward.default,
    aten.native_group_norm_backward.default,
    aten.linalg_vector_norm.default,
    aten.gelu.default,
    aten.gelu_backward.default,
    aten.addmm.default,
    aten.embedding.default,
    aten.index_select.default,
    aten.elu.default,
    aten.elu_backward.default,
)


def _pair_differences(a: Tensor, b: Tensor) -> Tensor:
    return a.unsqueeze(-2) - b.unsqueeze(-3)


def _cdist_forward(a: Tensor, b: Tensor, p: float, compute_mode: int | None) -> Tensor:
    if p != 2.0:
        return NotImplemented
    return _pair_differences(a, b).square().sum(-1).sqrt()


def _cdist_backward(grad: Tensor, a: Tensor, b: Tensor, p: float, distances: Tensor) -> Tensor:
    if p != 2.0:
        return NotImplemented
    scale = torch.where(distances == 0, 0.0, grad / distances)
    return (scale.unsqueeze(-1) * _pair_differences(a, b)).sum(-2)


def _var_mean(
    x: Tensor, dim: Any = None, *, correction: float | None = None, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    dims = list(range(x.ndim)) if dim is None or dim == [] else list(dim)
    count = math.prod(x.shape[d] for d in dims)
    mean = x.sum(dims, keepdim=True) / count
    correction = 1 if correction is None else correction
    variance = (x - mean).square().sum(dims, keepdim=keepdim) / max(count - correction, 0)
    return variance, mean if keepdim else mean.reshape(variance.shape)


def _var(x: Tensor, dim: Any = None, *, correction: float | None = None, keepdim: bool = False) -> Tensor:
    return _var_mean(x, dim, correction=correction, keepdim=keepdim)[0]


def _mean(x: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    dims = list(range(x.ndim)) if dim is None or dim == [] else list(dim)
    return x.sum(dims, keepdim=keepdim, dtype=dtype) / math.prod(x.shape[d] for d in dims)


def _standardized(x: Tensor, dims: list[int], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    variance, mean = _var_mean(x, dims, correction=0, keepdim=True)
    scale = (variance + eps).rsqrt()
    return (x - mean) * scale, mean, scale


def _layer_norm(
    x: Tensor, shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    y, mean, scale = _standardized(x, list(range(-len(shape), 0)), eps)
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias), mean, scale


def _group_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, n: int, channels: int, pixels: int, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    y, mean, scale = _standardized(x.reshape(n, groups, channels // groups * pixels), [2], eps)
    y = y.reshape(x.shape)
    per_channel = (1, channels, *[1] * (x.ndim - 2))
    y = y if weight is None else y * weight.reshape(per_channel)
    y = y if bias is None else y + bias.reshape(per_channel)
    return y, mean.reshape(n, groups), scale.reshape(n, groups)


def _batch_norm(
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


def _batch_norm_backward(
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
    shape = (1, x.shape[1], *[1] * (x.ndim - 2))
    grad = grad if weight is None else grad * weight.reshape(shape)
    if not training:
        assert variance is not None
        return grad * (variance + eps).rsqrt().reshape(shape), None, None
    dims = [d for d in range(x.ndim) if d != 1]
    y, _, scale = _standardized(x, dims, eps)
    return (grad - _mean(grad, dims, True) - y * _mean(grad * y, dims, True)) * scale, None, None


def _adaptive_average(length: int, out: int, like: Tensor) -> Tensor:
    eye = torch.eye(length, dtype=like.dtype, device=like.device)
    parts = [
        eye[i * length // out : -((-(i + 1) * length) // out)].sum(0)
        / (-((-(i + 1) * length) // out) - i * length // out)
        for i in range(out)
    ]
    return torch.stack(parts)


def _adaptive_avg_pool2d(x: Tensor, size: list[int]) -> Tensor:
    for axis in (0, 1):
        matrix = _adaptive_average(x.shape[-2 + axis], size[axis], x)
        x = (x.transpose(-2 + axis, -1) @ matrix.T).transpose(-2 + axis, -1)
    return x


def _adaptive_avg_pool2d_backward(grad: Tensor, x: Tensor) -> Tensor:
    for axis in (0, 1):
        matrix = _adaptive_average(x.shape[-2 + axis], grad.shape[-2 + axis], x)
        grad = (grad.transpose(-2 + axis, -1) @ matrix).transpose(-2 + axis, -1)
    return grad


def _solve_triangular(a: Tensor, b: Tensor, *, upper: bool, left: bool = True, unitriangular: bool = False) -> Tensor:
    """By the inverse, which is evaluated once a chain."""
    if a.shape[-1] != a.shape[-2] or (a.ndim > 2 and a.shape[:-2].numel() > 1):
        return NotImplemented
    matrix = a.reshape(a.shape[-2:])
    matrix = matrix.triu(int(unitriangular)) if upper else matrix.tril(-int(unitriangular))
    if unitriangular:
        matrix = matrix + torch.eye(matrix.shape[0], dtype=a.dtype, device=a.device)
    inverse = torch.linalg.inv(matrix)
    return inverse @ b if left else b @ inverse


def _resizing(length: int, out: int, mode: str, align: bool, scale: float | None, like: Tensor) -> Tensor:
    """The matrix (out, length) of an interpolation along one axis."""
    eye = torch.eye(length, dtype=like.dtype, device=like.device).unsqueeze(0)
    if mode == "bicubic":
        wide = F.interpolate(
            eye.unsqueeze(2).expand(1, length, 1, length), (1, out), mode="bicubic", align_corners=align
        )
        return wide[0, :, 0].T
    return F.interpolate(eye, out, mode=mode, align_corners=align)[0].T


def _upsample(mode: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    def matrices(like: Tensor, sizes: Any, out: Any, align: bool) -> list[Tensor]:
        return [_resizing(n, o, mode, align, None, like) for n, o in zip(sizes, out, strict=True)]

    def forward(x: Tensor, size: Any, align: bool, *scales: Any) -> Tensor:
        if any(scales) and any(round(n * s) != o for n, o, s in zip(x.shape[2:], size, scales, strict=True) if s):
            return NotImplemented
        for axis, matrix in enumerate(matrices(x, x.shape[2:], size, align)):
            x = (x.transpose(axis + 2, -1) @ matrix.T).transpose(axis + 2, -1)
        return x

    def backward(grad: Tensor, out: Any, size: Any, align: bool, *scales: Any) -> Tensor:
        for axis, matrix in enumerate(matrices(grad, size[2:], out, align)):
            grad = (grad.transpose(axis + 2, -1) @ matrix).transpose(axis + 2, -1)
        return grad

    return forward, backward


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    **core_aten_decompositions(),
    **{op: decomposition_table[op] for op in _ALSO if op in decomposition_table},
    aten._cdist_forward.default: _cdist_forward,
    aten._cdist_backward.default: _cdist_backward,
    aten.upsample_bilinear2d.default: _upsample("linear")[0],
    aten.upsample_bilinear2d_backward.default: _upsample("linear")[1],
    aten.native_layer_norm.default: _layer_norm,
    aten.native_group_norm.default: _group_norm,
    aten.native_batch_norm.default: _batch_norm,
    aten.native_batch_norm_backward.default: _batch_norm_backward,
    aten._adaptive_avg_pool2d.default: _adaptive_avg_pool2d,
    aten._adaptive_avg_pool2d_backward.default: _adaptive_avg_pool2d_backward,
    aten.mean.default: _mean,
    aten.mean.dim: _mean,
    aten.var_mean.correction: _var_mean,
    aten.var.correction: _var,
    aten.linalg_solve_triangular.default: _solve_triangular,
}
