"""Convolutional networks on images, signals and volumes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from .dense import ClassifierEnergy
from .entry import OF_IMAGES, Entry, image


def tutorial_net(width: int = 16) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, width, 5, stride=2, padding=4),
        nn.SiLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
        nn.SiLU(),
        nn.Conv2d(2 * width, 4 * width, 3, stride=2, padding=1),
        nn.SiLU(),
        nn.Conv2d(4 * width, 4 * width, 3, stride=2, padding=1),
        nn.SiLU(),
        nn.Flatten(),
        nn.LazyLinear(4 * width),
        nn.SiLU(),
        nn.Linear(4 * width, 1),
        nn.Flatten(0),
    )


def made_for(net: nn.Module, *shape: int) -> nn.Module:
    """`net` after one call on zeros, which gives lazy layers their shapes."""
    net.eval()(torch.zeros(2, *shape))
    return net


class IgebmBlock(nn.Module):
    def __init__(self, before: int, after: int, down: bool):
        super().__init__()
        self.conv1 = spectral_norm(nn.Conv2d(before, after, 3, padding=1))
        self.conv2 = spectral_norm(nn.Conv2d(after, after, 3, padding=1))
        self.skip = spectral_norm(nn.Conv2d(before, after, 1, bias=False)) if before != after else None
        self.down = down

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(F.leaky_relu(self.conv1(F.leaky_relu(x, 0.2)), 0.2))
        out = out + (x if self.skip is None else self.skip(x))
        return F.avg_pool2d(out, 2) if self.down else out


class Igebm(nn.Module):
    """Residual blocks, and the sum over pixels that public code writes as a view."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            [IgebmBlock(width, width, True), IgebmBlock(width, 2 * width, True), IgebmBlock(2 * width, 2 * width, True)]
        )
        self.linear = nn.Linear(2 * width, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(x)
        for block in self.blocks:
            out = block(out)
        out = F.relu(out)
        out = out.view(out.shape[0], out.shape[1], -1).sum(2)
        return self.linear(out)


class WideBlock(nn.Module):
    def __init__(self, before: int, after: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, padding=1)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, stride=stride)
        self.shortcut = nn.Sequential()
        if stride != 1 or before != after:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride=stride))
        self.dropout = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        out = self.dropout(self.conv1(F.leaky_relu(x, 0.2)))
        return self.conv2(F.leaky_relu(out, 0.2)) + self.shortcut(x)


def wide_residual(width: int = 8) -> nn.Module:
    return ClassifierEnergy(
        nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1),
            WideBlock(width, width, 1),
            WideBlock(width, 2 * width, 2),
            WideBlock(2 * width, 4 * width, 2),
            nn.LeakyReLU(0.2),
            nn.AvgPool2d(8),
            nn.Flatten(),
            nn.Linear(4 * width, 10),
        )
    )


def critic(width: int = 16, norm: type[nn.Module] = nn.BatchNorm2d) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 4, 2, 1, bias=False),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(width, 2 * width, 4, 2, 1, bias=False),
        norm(2 * width),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(2 * width, 4 * width, 4, 2, 1, bias=False),
        norm(4 * width),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(4 * width, 1, 4, 1, 0, bias=False),
        nn.Flatten(),
    )


class UNet(nn.Module):
    """Encoder, decoder and skips with group norm; the energy is the product of x and the net's output."""

    def __init__(self, channels: int = 1, width: int = 16):
        super().__init__()

        def block(before: int, after: int) -> nn.Module:
            return nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.GroupNorm(4, after), nn.SiLU())

        self.enter, self.down = block(channels, width), block(width, 2 * width)
        self.middle = block(2 * width, 2 * width)
        self.up, self.leave = block(4 * width, width), block(2 * width, width)
        self.out = nn.Conv2d(width, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.enter(x)
        b = self.down(F.avg_pool2d(a, 2))
        h = F.interpolate(self.middle(F.max_pool2d(b, 2)), scale_factor=2, mode="nearest")
        h = F.interpolate(self.up(torch.cat([h, b], dim=1)), scale_factor=2, mode="nearest")
        return (x * self.out(self.leave(torch.cat([h, a], dim=1)))).flatten(1).sum(1)


class ConvAutoencoder(nn.Module):
    """The reconstruction error of strided and transposed convolutions."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(2 * width, width, 3, stride=2, padding=1, output_padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(width, 1, 3, stride=2, padding=1, output_padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.net(x)).square().sum(dim=(1, 2, 3))


class ConvNext(nn.Module):
    """A depthwise 7x7 convolution, layer norm over channels, and a pointwise perceptron."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.scale = nn.Parameter(0.5 * torch.ones(width))
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x)
        h = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        h = self.scale * self.narrow(F.gelu(self.wide(h)))
        x = x + h.permute(0, 3, 1, 2)
        return self.head(x.mean([-2, -1]))


class Squeeze(nn.Module):
    """Squeeze and excitation: channels are weighted by their means."""

    def __init__(self, width: int):
        super().__init__()
        self.down, self.up = nn.Conv2d(width, width // 4, 1), nn.Conv2d(width // 4, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1))))
        return x * F.hardsigmoid(gate)


def mobile_net(width: int = 16) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, 2, 1),
        nn.Hardswish(),
        nn.Conv2d(width, width, 3, 1, 1, groups=width),
        nn.BatchNorm2d(width),
        nn.ReLU6(),
        Squeeze(width),
        nn.Conv2d(width, 2 * width, 1),
        nn.Hardswish(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, 1),
    )


class ShuffleNet(nn.Module):
    """Grouped convolutions with a shuffle of channels between."""

    def __init__(self, width: int = 16, groups: int = 4):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.first = nn.Conv2d(width, width, 3, padding=1, groups=groups)
        self.second = nn.Conv2d(width, width, 3, padding=1, groups=groups)
        self.groups = groups
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.stem(x))
        h = F.relu(self.first(h))
        b, c, height, wide = h.shape
        h = h.view(b, self.groups, c // self.groups, height, wide).transpose(1, 2).reshape(b, c, height, wide)
        h = F.relu(self.second(h))
        return self.head(h.mean(dim=(2, 3))).squeeze(dim=1)


def dilated_net(width: int = 8) -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(1, width, 3, padding=1)]
    for rate in (2, 4):
        layers += [nn.ELU(), nn.Conv2d(width, width, 3, padding=rate, dilation=rate)]
    return nn.Sequential(*layers, nn.ELU(), nn.Conv2d(width, 1, 1), nn.Flatten(), nn.AdaptiveAvgPool1d(1))


def signal_net(width: int = 16) -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(1, width, 9, stride=2, padding=4),
        nn.LeakyReLU(0.1),
        nn.Conv1d(width, 2 * width, 9, stride=4, padding=4),
        nn.LeakyReLU(0.1),
        nn.AvgPool1d(4),
        nn.Flatten(),
        nn.Linear(8 * width, 1),
    )


def volume_net(width: int = 8) -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(1, width, 3, padding=1),
        nn.SiLU(),
        nn.Conv3d(width, 2 * width, 3, stride=2, padding=1),
        nn.SiLU(),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(2 * width, 1),
    )


def padded_net(mode: str, width: int = 8) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, width, 5, padding=2, padding_mode=mode),
        nn.Softplus(),
        nn.Conv2d(width, width, 3, padding=1, padding_mode=mode),
        nn.Softplus(),
        nn.Conv2d(width, 1, 1),
        nn.Flatten(),
        nn.Linear(256, 1, bias=False),
    )


class MultiScale(nn.Module):
    """One critic on three sizes of the image, by bilinear interpolation."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.critics = nn.ModuleList(
            nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ELU(), nn.Conv2d(width, 1, 3, padding=1))
            for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        energy = torch.zeros(x.shape[0], dtype=x.dtype, device=x.device)
        for critic in self.critics:
            energy = energy + critic(x).mean(dim=(1, 2, 3))
            x = F.interpolate(x, scale_factor=0.5, mode="bilinear", align_corners=False)
        return energy


def vgg(width: int = 8) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d((3, 3)),
        nn.Flatten(),
        nn.Linear(18 * width, 1),
    )


class DenseNet(nn.Module):
    """Every layer reads the outputs of all before it."""

    def __init__(self, growth: int = 8, layers: int = 3):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3 + i * growth, growth, 3, padding=1) for i in range(layers))
        self.head = nn.Linear(3 + layers * growth, 1)

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(F.relu(layer(torch.cat(features, 1))))
        return self.head(torch.cat(features, 1).mean((2, 3))).reshape(-1)


class FieldsOfExperts(nn.Module):
    """Student t experts on the responses of learned filters."""

    def __init__(self, filters: int = 8):
        super().__init__()
        self.filters = nn.Parameter(0.2 * torch.randn(filters, 1, 5, 5))
        self.weights = nn.Parameter(torch.rand(filters, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        responses = F.conv2d(x, self.filters)
        return (self.weights * torch.log(1 + 0.5 * responses**2)).sum([1, 2, 3])


class PatchMixture(nn.Module):
    """A mixture of Gaussians of all 4x4 patches, which unfold cuts out."""

    def __init__(self, components: int = 10):
        super().__init__()
        self.register_buffer("roots", 0.5 * torch.randn(components, 16, 16))
        self.register_buffer("log_weights", torch.randn(components).log_softmax(0))

    def forward(self, x: Tensor) -> Tensor:
        patches = F.unfold(x, kernel_size=4, stride=2).transpose(1, 2)
        patches = patches - patches.mean(dim=2, keepdim=True)
        squares = torch.einsum("bpi,kij->bpkj", patches, self.roots).square().sum(-1)
        return -torch.logsumexp(self.log_weights - 0.5 * squares, dim=2).sum(1)


class PixelShuffled(nn.Module):
    """Space to depth and back, with a residual."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.inner = nn.Conv2d(12, width, 3, padding=1)
        self.outer = nn.Conv2d(width, 12, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(torch.tanh(self.inner(F.pixel_unshuffle(x, 2))))
        return 0.5 * torch.linalg.vector_norm(x - F.pixel_shuffle(h, 2), dim=(1, 2, 3)) ** 2


class Blurred(nn.Module):
    """Anti-aliased downsampling by a fixed depthwise kernel, and standardized weights."""

    def __init__(self, width: int = 8):
        super().__init__()
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
        self.register_buffer("kernel", torch.outer(taps, taps)[None, None] / 64)
        self.conv, self.head = nn.Conv2d(3, width, 3, padding=1), nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.conv.weight
        weight = (weight - weight.mean((1, 2, 3), keepdim=True)) / (weight.std((1, 2, 3), keepdim=True) + 1e-5)
        h = F.relu(F.conv2d(x, weight, self.conv.bias, padding=1))
        h = F.conv2d(F.pad(h, (1, 2, 1, 2)), self.kernel.repeat(h.shape[1], 1, 1, 1), stride=2, groups=h.shape[1])
        return self.head(h.amax(dim=(2, 3)))[:, 0]


def coarse_to_fine(size: int = 16) -> nn.Module:
    from fastebm.models import CoarseToFineEnergy

    return CoarseToFineEnergy(size, 3, base_width=16, lowest=min(size, 8))


def _images(name, build, shape, source, **options) -> Entry:
    return Entry(
        name,
        "convolution",
        source,
        build,
        shape,
        **{"batches": OF_IMAGES, "step_size": 1e-2, "states": image, "scales": (0.1, 1.0)} | options,
    )


SMALL = (3, 16, 16)
COLOUR = (3, 32, 32)

CONVOLUTIONS: tuple[Entry, ...] = (
    _images(
        "tutorial CNN",
        lambda: made_for(tutorial_net(), 1, 28, 28),
        (1, 28, 28),
        "Lippe's UvA tutorial 8: strided convolutions and swish",
    ),
    _images("IGEBM", Igebm, COLOUR, "Du and Mordatch 2019: residual blocks, sum by a view"),
    _images("JEM, wide residual", wide_residual, COLOUR, "Grathwohl et al. 2020: WRN-10-1 without norms, -logsumexp"),
    _images("DCGAN critic", critic, COLOUR, "Radford et al. 2016, batch norm in eval mode"),
    _images(
        "instance norm critic",
        lambda: critic(16, lambda width: nn.InstanceNorm2d(width, affine=True)),
        COLOUR,
        "Ulyanov et al. 2016, in the same critic",
    ),
    _images("U-Net", UNet, (1, 16, 16), "Salimans and Ho 2021: energy <x, f(x)> of a U-Net"),
    _images("autoencoder, conv", ConvAutoencoder, (1, 28, 28), "Yoon et al. 2021: error"),
    _images("ConvNeXt", ConvNext, COLOUR, "Liu et al. 2022: depthwise, layer norm, GELU"),
    _images("MobileNet", mobile_net, COLOUR, "Howard et al. 2019: depthwise, squeeze, hardswish"),
    _images("ShuffleNet", ShuffleNet, COLOUR, "Zhang et al. 2018: grouped, shuffled channels"),
    _images("dilated", dilated_net, (1, 16, 16), "Yu and Koltun 2016: dilated convolutions"),
    _images("signal, 1-D", signal_net, (1, 128), "Kong et al. 2020: 1-D convolutions on audio"),
    _images("volume, 3-D", volume_net, (1, 8, 8, 8), "Xie et al. 2018: 3-D convolutions on shapes"),
    _images("reflect padding", lambda: padded_net("reflect"), (1, 16, 16), "the padding of style transfer"),
    _images("circular padding", lambda: padded_net("circular"), (1, 16, 16), "a net on a torus, as lattices need"),
    _images("bilinear pyramid", MultiScale, COLOUR, "Wang et al. 2018: one critic a scale"),
    _images("VGG", vgg, COLOUR, "Simonyan and Zisserman 2015: max pooling"),
    _images("DenseNet", DenseNet, COLOUR, "Huang et al. 2017: concatenated features"),
    _images("fields of experts", FieldsOfExperts, (1, 16, 16), "Roth and Black 2005: filters and Student t"),
    _images("patch mixture", PatchMixture, (1, 16, 16), "Zoran and Weiss 2011 (EPLL): patches by unfold"),
    _images("pixel shuffle", PixelShuffled, COLOUR, "Shi et al. 2016: space to depth and back"),
    _images("blur pool", Blurred, COLOUR, "Zhang 2019; Qiao et al. 2019: blur pool, standardized weights"),
    _images("CF-EBM", coarse_to_fine, SMALL, "Zhao et al. 2021: our own coarse-to-fine net"),
)
