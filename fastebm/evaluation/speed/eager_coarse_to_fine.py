"""The coarse-to-fine energy net in stock PyTorch, so that `torch.compile` sees and fuses all of it.

It computes what `CoarseToFineEnergy` computes at `beta = 1` and loads its state dict, but knows none of our operators:
what peers of the sampler are given. Zhao, Xie and Li, ICLR 2021.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.nn.utils.parametrize import register_parametrization

from fastebm.models import CoarseToFineEnergy
from fastebm.models.coarse_to_fine import WIDTHS


class _TimesScale(nn.Module):
    """An equalised learning rate, as research code writes it."""

    def __init__(self, scale: float):
        super().__init__()
        self.scale = scale

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.scale


def _equalized(layer: nn.Conv2d | nn.Linear) -> nn.Module:
    fan_in = layer.weight[0].numel()
    register_parametrization(layer, "weight", _TimesScale(math.sqrt(2 / fan_in)))
    return layer


def _normalized(layer: nn.Conv2d, norm: bool) -> nn.Module:
    return spectral_norm(layer) if norm else layer


def _swish(h: Tensor) -> Tensor:
    return F.silu(h) / 1.1


class _Block(nn.Module):
    def __init__(self, width_in: int, width_out: int, norm: bool):
        super().__init__()
        self.conv1 = _normalized(nn.Conv2d(width_in, width_in, 3, padding=1), norm)
        self.conv2 = _normalized(nn.Conv2d(width_in, width_out, 3, padding=1), norm)
        self.skip = _equalized(nn.Conv2d(width_in, width_out, 1))

    def forward(self, h: Tensor) -> Tensor:
        main = _swish(F.avg_pool2d(self.conv2(_swish(self.conv1(h))), 2))
        return (main + F.avg_pool2d(self.skip(h), 2)) / math.sqrt(2)


class _Head(nn.Module):
    def __init__(self, width: int, norm: bool):
        super().__init__()
        self.conv1 = _normalized(nn.Conv2d(width, width, 3, padding=1), norm)
        self.conv2 = _normalized(nn.Conv2d(width, width, 4), norm)
        self.linear = _equalized(nn.Linear(width, 1))

    def forward(self, h: Tensor) -> Tensor:
        h = _swish(self.conv2(_swish(self.conv1(h))))
        return self.linear(h.flatten(1)).squeeze(1)


class EagerCoarseToFine(nn.Module):
    """The net that `net` is, with its weights copied, out of stock PyTorch layers: images (B, C, s, s) to (B,).

    Raises ValueError for another activation than the scaled swish, which is that of the authors.
    """

    def __init__(self, net: CoarseToFineEnergy):
        super().__init__()
        if net.activation != "scaled_swish":
            raise ValueError(f"the stock twin of CoarseToFineEnergy knows scaled_swish, not {net.activation}")
        widths = {size: int(width * net.base_width) for size, width in WIDTHS.items() if size <= net.image_size}
        self.head = _Head(widths[4], net.spectral_norm)
        self.blocks = nn.ModuleDict()
        for size in (size for size in widths if size > 4):
            self.blocks[str(size)] = _Block(widths[size], widths[size // 2], net.spectral_norm)
        self.from_rgb = nn.ModuleDict()
        for size in net.sizes:
            self.from_rgb[str(size)] = _equalized(nn.Conv2d(net.channels, widths[size], 1))
        weight = next(net.parameters())
        self.to(device=weight.device, dtype=weight.dtype)
        self.load_state_dict(net.state_dict())
        self.train(net.training)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[3]
        h = self.from_rgb[str(size)](x)
        while size > 4:
            h = self.blocks[str(size)](h)
            size //= 2
        return self.head(h)
