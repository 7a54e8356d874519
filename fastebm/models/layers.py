"""Layers with a parametrised weight: equalised learning rate, and spectral norm.

Both use `torch.nn.utils.parametrize`: a layer stays a plain `nn.Conv2d` or `nn.Linear`, and code that evaluates weights
once for many calls treats both alike.
"""

import math
from typing import TypeVar

from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.parametrize import register_parametrization

Layer = TypeVar("Layer", nn.Conv2d, nn.Linear)


class EqualizedScale(nn.Module):
    """The parametrisation `weight = scale * original`.

    With `scale = sqrt(2 / fan_in)` and a standard normal original, the weight has He's initialisation. An optimiser
    such as Adam, whose steps don't depend on the size of a gradient, then changes the weights of all layers by the same
    fraction (Karras et al., "Progressive Growing of GANs", 2018).
    """

    def __init__(self, scale: float):
        super().__init__()
        self.scale = scale

    def forward(self, original: Tensor) -> Tensor:
        return original * self.scale

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight if weight.is_meta else weight / self.scale

    def extra_repr(self) -> str:
        return f"scale={self.scale:.4g}"


class SpectralNorm(_SpectralNorm):
    """Torch's own; on the meta device it has its two vectors alone, as power iterations would take seconds there."""

    def __init__(self, weight: Tensor):
        if not weight.is_meta:
            super().__init__(weight)
            return
        nn.Module.__init__(self)
        self.dim, self.n_power_iterations, self.eps = 0, 1, 1e-12  # torch's defaults
        self.register_buffer("_u", weight.new_empty(weight.shape[0]))
        self.register_buffer("_v", weight.new_empty(weight[0].numel()))


def he_normal(layer: Layer) -> Layer:
    """The same layer with weights from N(0, 2 / fan_in) and biases 0."""
    if not layer.weight.is_meta:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    return layer


def equalize_learning_rate(layer: Layer) -> Layer:
    """The same layer, initialised by `he_normal`, with an equalised learning rate on its weight."""
    fan_in = layer.weight[0].numel()
    _parametrize(he_normal(layer), EqualizedScale(math.sqrt(2 / fan_in)))
    return layer


def normalized(layer: Layer, enabled: bool = True) -> Layer:
    """The same layer, initialised by `he_normal`, with spectral norm on its weight if `enabled`.

    A power iteration runs in each forward pass in train mode, and none in eval mode.
    """
    he_normal(layer)
    if enabled:
        _parametrize(layer, SpectralNorm(layer.weight))
    return layer


def _parametrize(layer: Layer, parametrization: nn.Module) -> None:
    # On the meta device torch's checks of a parametrization would import for seconds.
    register_parametrization(layer, "weight", parametrization, unsafe=layer.weight.is_meta)
