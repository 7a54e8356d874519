"""Activations and softmax, and their derivatives.

They are as PyTorch's own decompositions, which load a computer algebra system and a compiler at their first call.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def sigmoid_backward(grad: Tensor, y: Tensor) -> Tensor:
    return grad * (y * (1 - y))


def tanh_backward(grad: Tensor, y: Tensor) -> Tensor:
    return grad * (1 - y * y)


def silu_backward(grad: Tensor, x: Tensor) -> Tensor:
    s = x.sigmoid()
    return grad * (s * (1 + x * (1 - s)))


def softplus(x: Tensor, beta: float = 1, threshold: float = 20) -> Tensor:
    scaled = x * beta
    return torch.where(scaled > threshold, x, scaled.exp().log1p() / beta)


def softplus_backward(grad: Tensor, x: Tensor, beta: float, threshold: float) -> Tensor:
    scaled = x * beta
    return torch.where(scaled > threshold, grad, grad * scaled.sigmoid())


def log_sigmoid_forward(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.clamp(max=0) - (-x.abs()).exp().log1p(), x.new_zeros(0)


def log_sigmoid_backward(grad: Tensor, x: Tensor, buffer: Tensor) -> Tensor:
    return grad * (-x).sigmoid()


def mish(x: Tensor) -> Tensor:
    return x * softplus(x).tanh()


def mish_backward(grad: Tensor, x: Tensor) -> Tensor:
    t = softplus(x).tanh()
    return grad * (t + x * x.sigmoid() * (1 - t * t))


def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    if approximate == "tanh":
        return 0.5 * x * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * (x * x * x))).tanh())
    return x * 0.5 * (1 + (x * math.sqrt(0.5)).erf())


def gelu_backward(grad: Tensor, x: Tensor, *, approximate: str = "none") -> Tensor:
    if approximate == "tanh":
        scale = math.sqrt(2 / math.pi)
        t = (scale * (x + 0.044715 * (x * x * x))).tanh()
        slope = (1 - t * t) * (scale * (1 + 3 * 0.044715 * (x * x)))
        return grad * (0.5 * (1 + t) + 0.5 * x * slope)
    distribution = 0.5 * (1 + (x * math.sqrt(0.5)).erf())
    return grad * (distribution + x * ((-0.5 * x * x).exp() * (1 / math.sqrt(2 * math.pi))))


def elu(x: Tensor, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Tensor:
    return torch.where(x > 0, x * scale, (x * input_scale).expm1() * (alpha * scale))


def elu_backward(grad: Tensor, alpha: float, scale: float, input_scale: float, is_result: bool, x: Tensor) -> Tensor:
    if is_result:
        below = grad * input_scale * (x + alpha * scale)
    else:
        below = grad * ((x * input_scale).exp() * (input_scale * alpha * scale))
    return torch.where(x <= 0, below, grad * scale)


def leaky_relu_backward(grad: Tensor, x: Tensor, slope: float, is_result: bool) -> Tensor:
    return torch.where(x > 0, grad, grad * slope)


def hardtanh(x: Tensor, low: float = -1, high: float = 1) -> Tensor:
    return x.clamp(low, high)


def hardtanh_backward(grad: Tensor, x: Tensor, low: float, high: float) -> Tensor:
    return torch.where((x <= low) | (x >= high), 0.0, grad)


def threshold(x: Tensor, bound: float, value: float) -> Tensor:
    return torch.where(x <= bound, value, x)


def threshold_backward(grad: Tensor, x: Tensor, bound: float) -> Tensor:
    return torch.where(x <= bound, 0.0, grad)


def hardshrink_backward(grad: Tensor, x: Tensor, bound: float) -> Tensor:
    return torch.where((x >= -bound) & (x <= bound), 0.0, grad)


def softmax(x: Tensor, dim: int, half_to_float: bool) -> Tensor:
    e = (x - x.amax(dim, keepdim=True)).exp()
    return e / e.sum(dim, keepdim=True)


def softmax_backward(grad: Tensor, y: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    weighted = grad * y
    return weighted - y * weighted.sum(dim, keepdim=True)


def log_softmax(x: Tensor, dim: int, half_to_float: bool) -> Tensor:
    shifted = x - x.amax(dim, keepdim=True)
    return shifted - shifted.exp().sum(dim, keepdim=True).log()


def log_softmax_backward(grad: Tensor, y: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    return grad - y.exp() * grad.sum(dim, keepdim=True)


TABLE: dict[Any, Any] = {
    aten.sigmoid_backward.default: sigmoid_backward,
    aten.tanh_backward.default: tanh_backward,
    aten.silu.default: lambda x: x * x.sigmoid(),
    aten.silu_backward.default: silu_backward,
    aten.softplus.default: softplus,
    aten.softplus_backward.default: softplus_backward,
    aten.log_sigmoid_forward.default: log_sigmoid_forward,
    aten.log_sigmoid_backward.default: log_sigmoid_backward,
    aten.mish.default: mish,
    aten.mish_backward.default: mish_backward,
    aten.gelu.default: gelu,
    aten.gelu_backward.default: gelu_backward,
    aten.elu.default: elu,
    aten.elu_backward.default: elu_backward,
    aten.leaky_relu_backward.default: leaky_relu_backward,
    aten.hardtanh.default: hardtanh,
    aten.hardtanh_backward.default: hardtanh_backward,
    aten.threshold.default: threshold,
    aten.threshold_backward.default: threshold_backward,
    aten.hardshrink_backward.default: hardshrink_backward,
    aten.softshrink_backward.default: hardshrink_backward,
    aten._softmax.default: softmax,
    aten._softmax_backward_data.default: softmax_backward,
    aten._log_softmax.default: log_softmax,
    aten._log_softmax_backward_data.default: log_softmax_backward,
}
