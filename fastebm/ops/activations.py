"""The activations that fused operators know, by name and number, in plain PyTorch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ACTIVATIONS", "activation", "activation_code"]

# The order numbers them in kernels: fastebm/ops/triton/activations.py and csrc/activations.h repeat it.
ACTIVATIONS = ("scaled_swish", "silu", "gelu", "gelu_tanh", "elu", "leaky_relu", "relu")

# Swish over its approximate largest slope, as CF-EBM uses it (Zhao et al., ICLR 2021).
SWISH_SCALE = 1.1


def activation_code(name: str, *, negative_slope: float = 0.2, alpha: float = 1.0) -> tuple[int, float]:
    """(number, parameter) of an activation as operators take it.

    Raises:
        ValueError: for a name that is not in `ACTIVATIONS`.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {name!r}")
    return ACTIVATIONS.index(name), {"elu": alpha, "leaky_relu": negative_slope}.get(name, 0.0)


def activation(x: Tensor, name: str, *, negative_slope: float = 0.2, alpha: float = 1.0) -> Tensor:
    """The activation `name` of x, any shape and floating dtype.

    `scaled_swish` is x * sigmoid(x) / 1.1; `gelu` the exact form, `gelu_tanh` its tanh approximation.

    Raises:
        ValueError: for a name that is not in `ACTIVATIONS`.
    """
    code, parameter = activation_code(name, negative_slope=negative_slope, alpha=alpha)
    return activation_of_code(x, code, parameter)


def activation_of_code(x: Tensor, code: int, parameter: float) -> Tensor:
    """The activation of a number and parameter from `activation_code`."""
    name = ACTIVATIONS[code]
    if name == "scaled_swish":
        return F.silu(x) / SWISH_SCALE
    if name == "silu":
        return F.silu(x)
    if name == "gelu":
        return F.gelu(x)
    if name == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if name == "elu":
        return F.elu(x, alpha=parameter)
    if name == "leaky_relu":
        return F.leaky_relu(x, negative_slope=parameter)
    return F.relu(x)


def slope_of_code(x: Tensor, code: int, parameter: float) -> Tensor:
    """The activation's first derivative; at a kink the one from below."""
    name = ACTIVATIONS[code]
    if name in ("scaled_swish", "silu"):
        s, t = torch.sigmoid(x), torch.sigmoid(-x)
        return (s + x * s * t) / (SWISH_SCALE if name == "scaled_swish" else 1.0)
    if name == "gelu":
        distribution, density = _gaussian(x)
        return distribution + x * density
    if name == "gelu_tanh":
        s, t, w1, _ = _tanh_gelu_parts(x)
        return s + x * s * t * w1
    if name == "elu":
        return torch.where(x > 0, 1.0, parameter * x.clamp(max=0).exp())
    # Not torch.where(x > 0, 1.0, slope): between two numbers it rounds them to float32.
    return torch.where(x > 0, torch.ones_like(x), parameter if name == "leaky_relu" else 0.0)


def curvature_of_code(x: Tensor, code: int, parameter: float) -> Tensor:
    """The activation's second derivative, zero at a kink."""
    name = ACTIVATIONS[code]
    if name in ("scaled_swish", "silu"):
        s, t = torch.sigmoid(x), torch.sigmoid(-x)
        return s * t * (2 + x * (t - s)) / (SWISH_SCALE if name == "scaled_swish" else 1.0)
    if name == "gelu":
        _, density = _gaussian(x)
        return density * (2 - x * x)
    if name == "gelu_tanh":
        s, t, w1, w2 = _tanh_gelu_parts(x)
        return s * t * (2 * w1 + x * ((t - s) * w1 * w1 + w2))
    if name == "elu":
        return torch.where(x > 0, 0.0, parameter * x.clamp(max=0).exp())
    return torch.zeros_like(x)


def _gaussian(x: Tensor) -> tuple[Tensor, Tensor]:
    """Distribution function and density of the standard normal."""
    return torch.special.ndtr(x), (-0.5 * x * x).exp() / math.sqrt(2 * math.pi)


def _tanh_gelu_parts(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`gelu_tanh` is x * sigmoid(w(x)): sigmoid(w), sigmoid(-w), w' and w''."""
    scale, cubic = math.sqrt(8 / math.pi), 0.044715
    w = scale * (x + cubic * x**3)
    return torch.sigmoid(w), torch.sigmoid(-w), scale * (1 + 3 * cubic * x * x), scale * 6 * cubic * x
