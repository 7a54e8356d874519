"""The coarse-to-fine energy net once more, in plain torch.nn.functional from its state dict alone: the oracle."""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {
    "scaled_swish": lambda x: x * torch.sigmoid(x) / 1.1,
    "silu": lambda x: x * torch.sigmoid(x),
    "gelu": lambda x: x * torch.special.ndtr(x),
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "elu": lambda x: torch.where(x > 0, x, torch.expm1(x)),
    "leaky_relu": lambda x: torch.where(x > 0, x, 0.2 * x),
    "relu": lambda x: torch.clamp(x, min=0),
}


def weight_of(state: Mapping[str, Tensor], layer: str) -> Tensor:
    """The weight that `layer` convolves with: plain, over its spectral norm, or times sqrt(2 / fan_in)."""
    if f"{layer}.weight" in state:
        return state[f"{layer}.weight"]
    original = state[f"{layer}.parametrizations.weight.original"]
    u = state.get(f"{layer}.parametrizations.weight.0._u")
    if u is None:
        return original * math.sqrt(2 / original[0].numel())
    v = state[f"{layer}.parametrizations.weight.0._v"]
    return original / (u @ original.flatten(1) @ v)


def energy(state: Mapping[str, Tensor], x: Tensor, beta: float = 1.0, activation: str = "scaled_swish") -> Tensor:
    """The energies (B,) of x (B, C, s, s) with the weights and buffers of `state`."""
    act = ACTIVATIONS[activation]

    def conv(layer: str, h: Tensor, padding: int = 0) -> Tensor:
        return F.conv2d(h, weight_of(state, layer), state[f"{layer}.bias"], padding=padding)

    def block(name: str, h: Tensor) -> Tensor:
        main = act(F.avg_pool2d(conv(f"{name}.conv2", act(conv(f"{name}.conv1", h, 1)), 1), 2))
        return (main + F.avg_pool2d(conv(f"{name}.skip", h), 2)) / math.sqrt(2)

    size = x.shape[3]
    h = conv(f"from_rgb.{size}", x)
    if size > 4:
        h = block(f"blocks.{size}", h)
        if beta < 1:
            h = beta * h + (1 - beta) * conv(f"from_rgb.{size // 2}", F.avg_pool2d(x, 2))
    while h.shape[3] > 4:
        h = block(f"blocks.{h.shape[3]}", h)
    h = act(conv("head.conv2", act(conv("head.conv1", h, 1))))
    return F.linear(h.flatten(1), weight_of(state, "head.linear"), state["head.linear.bias"])[:, 0]
