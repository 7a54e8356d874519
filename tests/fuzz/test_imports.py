"""Nets for images as research code writes them, put together at random: each is a fused program, and a right one.

Blocks of convolutions, norms, activations and views, and heads that sum, pool and map in every spelling. The program
is compared with autograd in float64, by the reference, and its energies with their slope along a line. Compiled
kernels in float32 may lose as much as autograd in float32, and their bits don't depend on the batch.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastebm import ops
from fastebm.compiler.capture import capture
from fastebm.compiler.lowering import lower
from fastebm.compiler.rewrites import WITHOUT_POLYPHASE, build_gradient_program

ACTIVATIONS: tuple[Callable[[], nn.Module], ...] = (
    *(nn.SiLU, nn.GELU, nn.ReLU, nn.ELU, nn.SELU, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.LeakyReLU, nn.Mish),
    *(nn.Hardswish, nn.Hardsigmoid, nn.ReLU6, nn.LogSigmoid, nn.Softsign, nn.Tanhshrink, nn.RReLU, nn.PReLU),
    *(lambda: nn.CELU(0.5), lambda: nn.Hardtanh(-0.3, 0.4), lambda: nn.Softshrink(0.1), lambda: nn.Softplus(3.0)),
)


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class ChannelsLast(nn.Module):
    """A layer norm and a perceptron over channels, on images or on tokens, with a skip."""

    def __init__(self, channels: int, tokens: bool) -> None:
        super().__init__()
        self.norm, self.wide, self.narrow = nn.LayerNorm(channels), nn.Linear(channels, 9), nn.Linear(9, channels)
        self.tokens = tokens

    def forward(self, x: Tensor) -> Tensor:
        h = x.flatten(2).transpose(1, 2) if self.tokens else x.permute(0, 2, 3, 1)
        h = self.narrow(F.gelu(self.wide(self.norm(h))))
        return x + (h.transpose(1, 2).reshape(x.shape) if self.tokens else h.permute(0, 3, 1, 2))


class Squeeze(nn.Module):
    """Channels weighted by a function of their means."""

    def __init__(self, channels: int, by_view: bool) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(channels, 3), nn.Linear(3, channels)
        self.by_view = by_view

    def forward(self, x: Tensor) -> Tensor:
        means = x.view(x.size(0), x.size(1), -1).mean(2) if self.by_view else F.adaptive_avg_pool2d(x, 1).flatten(1)
        return x * F.hardsigmoid(self.up(F.relu(self.down(means))))[:, :, None, None]


def norm_of(channels: int, size: int, draw: random.Random) -> nn.Module:
    groups = draw.choice([g for g in range(1, channels + 1) if channels % g == 0])
    norm = draw.choice(
        [
            lambda: nn.InstanceNorm2d(channels, affine=draw.random() < 0.5, eps=draw.choice([1e-5, 1e-2])),
            lambda: nn.GroupNorm(groups, channels),
            lambda: nn.LayerNorm([channels, size, size]),
            lambda: nn.BatchNorm2d(channels),
            lambda: Function(lambda x: x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-3)),
            lambda: Function(
                lambda x: (x - x.mean((1, 2, 3), True)) / torch.sqrt(x.var((1, 2, 3), keepdim=True) + 0.1)
            ),
        ]
    )()
    for parameter in norm.parameters():
        nn.init.uniform_(parameter, -1, 1)
    return norm


def head_of(channels: int, size: int, draw: random.Random) -> Callable[[Tensor], Tensor]:
    vector, square, flat = torch.randn(channels), torch.randn(size, size), torch.randn(channels * size * size)
    row = torch.randn(1, channels)
    return draw.choice(
        [
            lambda h: h.view(h.shape[0], h.shape[1], -1).sum(2) @ vector.to(h),
            lambda h: (h.flatten(2).mean(-1) * vector.to(h)).sum(1),
            lambda h: (h * square.to(h)).sum((1, 2, 3)),
            lambda h: (h.flatten(2) * square.flatten().to(h)).sum(-1).sum(-1),
            lambda h: h.flatten(1) @ flat.to(h),
            lambda h: F.linear(h.permute(0, 2, 3, 1), row.to(h)).mean((1, 2)).squeeze(1),
            lambda h: F.linear(h.flatten(2).mT, row.to(h)).square().mean((1, 2)),
            lambda h: h.permute(0, 2, 3, 1).flatten(1) @ flat.to(h),
            lambda h: F.adaptive_avg_pool2d(h, 1).squeeze(-1).squeeze(-1) @ vector.to(h),
            lambda h: -(vector.to(h)[:, None, None] * h).mean((2, 3)).logsumexp(1),
            lambda h: (vector.to(h) @ h.flatten(2)).square().mean(1),
            lambda h: torch.cat([h.sum((2, 3)), h.movedim(1, -1).square().mean((1, 2))], 1).sum(1),
            lambda h: 0.5 * (h**2).flatten(start_dim=1).sum(dim=-1) + h.mean(dim=(1, 2, 3)),
        ]
    )


class Net(nn.Module):
    def __init__(self, size: int, draw: random.Random) -> None:
        super().__init__()
        channels, layers = 3, []
        for _ in range(draw.randint(1, 3)):
            out = draw.choice([4, 6, 12, 33])
            stride = 2 if draw.random() < 0.3 and size > 3 else 1
            layers.append(nn.Conv2d(channels, out, 3, stride, 1))
            channels, size = out, (size - 1) // stride + 1
            layers += [norm_of(channels, size, draw)] * (draw.random() < 0.6)
            layers.append(draw.choice(ACTIVATIONS)())
            if size > 2 and draw.random() < 0.2:
                layers.append(nn.MaxPool2d(2))
                size //= 2
            extra = draw.random()
            if extra < 0.2:
                layers.append(ChannelsLast(channels, tokens=draw.random() < 0.5))
            elif extra < 0.4:
                layers.append(Squeeze(channels, by_view=draw.random() < 0.5))
        self.layers, self.head = nn.Sequential(*layers), head_of(channels, size, draw)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x))


def by_autograd(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    energies = net(x)
    return energies.detach(), torch.autograd.grad(energies.sum(), x)[0]


def by_program(net: nn.Module, x: Tensor) -> ops.CompiledProgram:
    with torch.no_grad():
        lowered = lower(build_gradient_program(capture(net, net, x), passes=WITHOUT_POLYPHASE), x.itemsize)
        fused = ops.CompiledProgram(lowered.program, x.device)
        fused.refresh(*lowered.constants())
    return fused


def gap(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm().clamp(min=1e-6))


def test_nets_of_others(tries: int) -> None:
    for seed in range(tries):
        draw = random.Random(seed)
        torch.manual_seed(seed)
        size = draw.choice([4, 5, 8, 9])
        net = Net(size, draw).eval()
        exact, x = copy.deepcopy(net).double(), torch.tanh(torch.randn(4, 3, size, size, dtype=torch.float64))
        wanted = by_autograd(exact, x)
        with torch.no_grad():
            found = by_program(exact, x)(x)
            assert max(map(gap, found, wanted)) < 1e-9, (seed, net)
            # The derivative by the program is the slope of the energies, where no kink lies between.
            line, step = torch.randn_like(x), 1e-6
            ahead, behind = exact(x + step * line), exact(x - step * line)
            slope, along = (ahead - behind) / (2 * step), (found[1] * line).sum((1, 2, 3))
            assert float((slope - along).abs().median()) < 1e-4 * float(along.abs().max()) + 1e-6, (seed, net)
        eager = by_autograd(net, x.float())
        single = by_program(net, x.float())
        with torch.no_grad():
            found = single(x.float())
            for mine, theirs, truth in zip(found, eager, wanted, strict=True):
                assert gap(mine, truth) < 6 * gap(theirs, truth) + 3e-6, (seed, net)
            for part, whole in zip(single(x[1:2].float()), found, strict=True):
                assert torch.equal(part, whole[1:2]), (seed, net)
