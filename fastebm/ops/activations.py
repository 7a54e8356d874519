"""The table of activations: names, numbers, parameters and formulas in plain PyTorch.

Kernels know an activation by its number, which is its position in `ACTIVATION_TABLE`. csrc/activations.h numbers them
in the same order, which a test checks; fastebm/ops/triton/activations.py takes the numbers from here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..scalars import as_real

__all__ = ["ACTIVATIONS", "ACTIVATION_TABLE", "PROGRAM_ACTIVATIONS", "SWISH_SCALE", "activation", "activation_code"]

# Swish over its approximate largest slope, as CF-EBM uses it (Zhao et al., ICLR 2021).
SWISH_SCALE = 1.1

Formula = Callable[..., Tensor]


@dataclass(frozen=True)
class Activation:
    """One row of the table. Formulas take x and then the activation's parameters.

    Attributes:
        name: in arguments and in programs.
        function: f(x).
        backward: f'(x) as PyTorch's autograd computes it, which fused programs follow; None where they lack f.
        derivative, second_derivative: f'(x) and f''(x) in closed form, which the block tail follows; None where it
            lacks f. At a kink f' is the one from below, f'' is 0.
        backward_of_result: f'(x) from f(x) in the place of x, where that is possible.
        num_parameters: how many numbers a program stores for it. The block tail has the first; the others are 1.
    """

    name: str
    function: Formula
    backward: Formula | None = None
    derivative: Formula | None = None
    second_derivative: Formula | None = None
    backward_of_result: Formula | None = None
    num_parameters: int = 0


def _silu_derivative(x: Tensor) -> Tensor:
    s, t = torch.sigmoid(x), torch.sigmoid(-x)
    return s + x * s * t


def _silu_second_derivative(x: Tensor) -> Tensor:
    s, t = torch.sigmoid(x), torch.sigmoid(-x)
    return s * t * (2 + x * (t - s))


def _gaussian_density(x: Tensor) -> Tensor:
    return (-0.5 * x * x).exp() / math.sqrt(2 * math.pi)


def _tanh_gelu_parts(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`gelu_tanh` is x * sigmoid(w(x)): sigmoid(w), sigmoid(-w), w' and w''."""
    scale, cubic = math.sqrt(8 / math.pi), 0.044715
    w = scale * (x + cubic * x**3)
    return torch.sigmoid(w), torch.sigmoid(-w), scale * (1 + 3 * cubic * x * x), scale * 6 * cubic * x


def _tanh_gelu_derivative(x: Tensor) -> Tensor:
    s, t, w1, _ = _tanh_gelu_parts(x)
    return s + x * s * t * w1


def _tanh_gelu_second_derivative(x: Tensor) -> Tensor:
    s, t, w1, w2 = _tanh_gelu_parts(x)
    return s * t * (2 * w1 + x * ((t - s) * w1 * w1 + w2))


def _leaky_relu_backward(x: Tensor, slope: float) -> Tensor:
    return torch.where(x > 0, torch.ones_like(x), slope * torch.ones_like(x))


def _relu_backward(x: Tensor) -> Tensor:
    return (x > 0).to(x.dtype)


def _elu_backward(of_result: bool) -> Formula:
    return lambda x, *parameters: aten.elu_backward(torch.ones_like(x), *parameters, of_result, x)


def _hardtanh_backward(x: Tensor, low: float, high: float, edge: float) -> Tensor:
    inside, outside = (x > low) & (x < high), (x < low) | (x > high)
    return torch.where(inside, torch.ones_like(x), edge * torch.ones_like(x)).masked_fill(outside, 0.0)


aten = torch.ops.aten
ACTIVATION_TABLE = (
    Activation(
        "silu", F.silu, lambda x: aten.silu_backward(torch.ones_like(x), x), _silu_derivative, _silu_second_derivative
    ),
    Activation(
        "gelu",
        F.gelu,
        lambda x: aten.gelu_backward(torch.ones_like(x), x),
        lambda x: torch.special.ndtr(x) + x * _gaussian_density(x),
        lambda x: _gaussian_density(x) * (2 - x * x),
    ),
    Activation(
        "gelu_tanh",
        lambda x: F.gelu(x, approximate="tanh"),
        lambda x: aten.gelu_backward(torch.ones_like(x), x, approximate="tanh"),
        _tanh_gelu_derivative,
        _tanh_gelu_second_derivative,
    ),
    Activation(  # alpha, scale, input scale
        "elu",
        aten.elu,
        _elu_backward(of_result=False),
        lambda x, alpha, *_: torch.where(x > 0, 1.0, alpha * x.clamp(max=0).exp()),
        lambda x, alpha, *_: torch.where(x > 0, 0.0, alpha * x.clamp(max=0).exp()),
        _elu_backward(of_result=True),
        num_parameters=3,
    ),
    Activation(
        "leaky_relu",
        F.leaky_relu,
        _leaky_relu_backward,
        # Not torch.where(x > 0, 1.0, slope): between two numbers it rounds them to float32.
        lambda x, slope: torch.where(x > 0, torch.ones_like(x), slope),
        lambda x, slope: torch.zeros_like(x),
        _leaky_relu_backward,  # of the result too, whose sign is that of x
        num_parameters=1,
    ),
    Activation("relu", F.relu, _relu_backward, _relu_backward, torch.zeros_like, _relu_backward),
    Activation(  # beta, threshold
        "softplus",
        F.softplus,
        lambda x, beta, threshold: aten.softplus_backward(torch.ones_like(x), x, beta, threshold),
        num_parameters=2,
    ),
    Activation("tanh", torch.tanh, lambda x: 1 - torch.tanh(x).square(), backward_of_result=lambda t: 1 - t.square()),
    Activation(
        "sigmoid",
        torch.sigmoid,
        lambda x: torch.sigmoid(x) * (1 - torch.sigmoid(x)),
        backward_of_result=lambda s: s * (1 - s),
    ),
    Activation("square", torch.square, lambda x: 2 * x),
    Activation("exp", torch.exp, torch.exp, backward_of_result=lambda e: e),
    Activation(  # bounds, and the derivative at a bound: 0 of `hardtanh`, 1 of `clamp`. By the result it is 0.
        "hardtanh",
        lambda x, low, high, edge: x.clamp(low, high),
        _hardtanh_backward,
        backward_of_result=lambda y, low, high, edge: _hardtanh_backward(y, low, high, 0.0),
        num_parameters=3,
    ),
    Activation("hardsigmoid", F.hardsigmoid, lambda x: aten.hardsigmoid_backward(torch.ones_like(x), x)),
    Activation("hardswish", F.hardswish, lambda x: aten.hardswish_backward(torch.ones_like(x), x)),
    Activation("mish", F.mish, lambda x: aten.mish_backward(torch.ones_like(x), x)),
    Activation("abs", torch.abs, torch.sign),
    Activation("sqrt", torch.sqrt, lambda x: 0.5 / x.sqrt(), backward_of_result=lambda y: 0.5 / y),
    Activation("rsqrt", torch.rsqrt, lambda x: -0.5 * x.rsqrt() ** 3, backward_of_result=lambda y: -0.5 * y**3),
    Activation(
        "reciprocal", torch.reciprocal, lambda x: -x.reciprocal().square(), backward_of_result=lambda y: -y.square()
    ),
    Activation(
        "scaled_swish",
        lambda x: F.silu(x) / SWISH_SCALE,
        derivative=lambda x: _silu_derivative(x) / SWISH_SCALE,
        second_derivative=lambda x: _silu_second_derivative(x) / SWISH_SCALE,
    ),
)

# Those of fused programs, where the position is the number too, and those of `block_tail`, the default first.
PROGRAM_ACTIVATIONS = tuple(row.name for row in ACTIVATION_TABLE if row.backward is not None)
ACTIVATIONS = ("scaled_swish", *(row.name for row in ACTIVATION_TABLE if row.derivative and row.backward))
_NUMBERS = {row.name: number for number, row in enumerate(ACTIVATION_TABLE)}


def activation_code(name: str, *, negative_slope: float = 0.2, alpha: float = 1.0) -> tuple[int, float]:
    """(number, parameter) of an activation as operators take it.

    Raises:
        ValueError: for a name that is not in `ACTIVATIONS`.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {name!r}")
    parameters = {"elu": ("alpha", alpha), "leaky_relu": ("negative_slope", negative_slope)}
    return _NUMBERS[name], as_real(*parameters[name]) if name in parameters else 0.0


def activation(x: Tensor, name: str, *, negative_slope: float = 0.2, alpha: float = 1.0) -> Tensor:
    """The activation `name` of x, any shape and floating dtype.

    `scaled_swish` is x * sigmoid(x) / 1.1; `gelu` the exact form, `gelu_tanh` its tanh approximation.

    Raises:
        ValueError: for a name that is not in `ACTIVATIONS`.
    """
    return tail_activation(x, *activation_code(name, negative_slope=negative_slope, alpha=alpha))


def tail_activation(x: Tensor, number: int, parameter: float, order: int = 0) -> Tensor:
    """The block tail's activation (order 0) at x, its first (1) or second (2) derivative."""
    row = ACTIVATION_TABLE[number]
    formula = (row.function, row.derivative, row.second_derivative)[order]
    if formula is None:
        raise ValueError(f"the block tail has no activation {row.name}")
    return formula(x, *(parameter, 1.0, 1.0)[: row.num_parameters])


def program_activation(x: Tensor, number: int, parameters: Sequence[float]) -> Tensor:
    """The activation of a fused program at x."""
    row = ACTIVATION_TABLE[number]
    return row.function(x, *parameters[: row.num_parameters])


def program_derivative(h: Tensor, number: int, parameters: Sequence[float], *, of_result: bool) -> Tensor:
    """The derivative of a fused program's activation at h, or where its result is h."""
    row = ACTIVATION_TABLE[number]
    formula = row.backward_of_result if of_result else row.backward
    if formula is None:
        raise ValueError(f"programs can't differentiate {row.name}{' by its result' if of_result else ''}")
    return formula(h, *parameters[: row.num_parameters])
