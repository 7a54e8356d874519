"""Fused programs and gradients of weights against autograd in float64, and their bits at another batch."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

import fastebm
from benchmarks.gpu.step import DEVICE, REHEARSAL, Rows, uniform
from benchmarks.harness import nets

NETS = (
    {"CF-EBM": (3, 8, 8)}
    if REHEARSAL
    else {
        "CF-EBM": (3, 32, 32),
        "UvA tutorial": (1, 28, 28),
        "IGEBM-like residual": (3, 32, 32),
        "wide residual 28-2": (3, 32, 32),
    }
)
FEW, MANY = 3, 5 if REHEARSAL else 64
# Products of float32 are three of tf32 parts; errors of bfloat16 are measured by those of autocast.
FLOAT32, OF_AUTOCAST = 1e-4, 2.0


def run(rows: Rows, names: tuple[str, ...] = tuple(NETS)) -> None:
    for name in names:
        net = nets.build(name, NETS[name], DEVICE)
        with rows.trying(net=name):
            gradients(rows, name, net)
        with rows.trying(net=name, of="weights"):
            weights(rows, name, net)


def by_autograd(net: nn.Module, x: Tensor, dtype: torch.dtype = torch.float64) -> tuple[Tensor, list[Tensor]]:
    """(gradient of x, gradients of the weights) of the sum of energies, in float64 or under autocast to `dtype`."""
    net = copy.deepcopy(net).requires_grad_(True)
    if dtype is torch.float64:
        net, x = net.double().cpu(), x.double().cpu()
    x = x.clone().requires_grad_(True)
    with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
        energies = net(x)
    energies.sum().backward()
    assert x.grad is not None
    return x.grad, [p.grad for p in net.parameters() if p.grad is not None]


def error(found: Tensor, expected: Tensor) -> float:
    expected = expected.cpu().double()
    return float((found.cpu().double() - expected).norm() / expected.norm())


def gradients(rows: Rows, name: str, net: nn.Module) -> None:
    x = uniform(MANY, *NETS[name], seed=1)
    expected, autocast = by_autograd(net, x[:FEW])[0], by_autograd(net, x[:FEW], torch.bfloat16)[0]
    for dtype in (torch.float32, torch.bfloat16):
        gradient = fastebm.energy_gradient(net, dtype=dtype, engine="fused")
        few, many = gradient(x[:FEW]), gradient(x)
        rows.add(ok=gradient.program == "fused program", net=name, dtype=str(dtype), program=gradient.program)
        bound = FLOAT32 if dtype is torch.float32 else OF_AUTOCAST * error(autocast, expected)
        found = error(few[1], expected)
        rows.add(ok=found <= bound, net=name, dtype=str(dtype), error=found, bound=bound)
        same = torch.equal(few[0], many[0][:FEW]) and torch.equal(few[1], many[1][:FEW])
        rows.add(ok=same, net=name, dtype=str(dtype), same_bits_at_batches=[FEW, MANY])


def weights(rows: Rows, name: str, net: nn.Module) -> None:
    x = uniform(FEW, *NETS[name], seed=2)
    expected, autocast = by_autograd(net, x)[1], by_autograd(net, x, torch.bfloat16)[1]
    ones = torch.ones(FEW, device=DEVICE)
    for dtype in (torch.float32, torch.bfloat16):
        gradient = fastebm.weight_gradient(net, dtype=dtype, engine="fused")
        found = error(flat(gradient(x, ones)[1].values()), flat(expected))
        bound = FLOAT32 if dtype is torch.float32 else OF_AUTOCAST * error(flat(autocast), flat(expected))
        rows.add(ok=found <= bound, net=name, of="weights", dtype=str(dtype), error=found, bound=bound)


def flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])
