"""The loss of an energy's update: its gradient is autograd's, whole and in parts; Adam's bits for any threads."""

from __future__ import annotations

import copy
import dataclasses
import itertools

import pytest
import torch
from torch import nn

from fastebm.compiler import weight_gradient
from fastebm.losses import contrastive_divergence, energy_l2
from fastebm.models import CoarseToFineEnergy, MultiScaleEnergy
from fastebm.training import CoarseToFineConfig
from fastebm.training.trainer.energy_loss import EnergyLoss, beyond_hinge, brake
from fastebm.training.trainer.parts import Part
from fastebm.training.trainer.weights import adam


@pytest.mark.parametrize("engine", ["fused", "autograd"])
@pytest.mark.parametrize("cuts", [(0, 7), (0, 3, 7), (0, 2, 4, 6, 7)])
def test_parts_add_up_to_the_gradient_of_the_whole_loss(engine: str, cuts: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    net = MultiScaleEnergy(8, 3, width=4, spectral_norm=False).double()
    twin = copy.deepcopy(net)
    real, fake = torch.randn(2, 7, 3, 8, 8, dtype=torch.float64)
    gradient = weight_gradient(net, engine=engine)
    loss = torch.zeros((), dtype=torch.float64)
    for start, stop in itertools.pairwise(cuts):
        part = Part(start, stop, 7, first=100)
        share, data, samples = EnergyLoss(0.3).backward(gradient, part, real[start:stop], fake[start:stop], max_batch=2)
        loss = loss + share
        assert len(data) == len(samples) == len(part)
        assert not share.requires_grad

    low, high = twin(real), twin(fake)
    expected = contrastive_divergence(low, high) + 0.3 * energy_l2(torch.cat((low, high)))
    expected.backward()
    assert float(loss) == pytest.approx(float(expected), rel=1e-10)
    for mine, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(mine.grad, theirs.grad, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("engine", ["fused", "autograd"])
def test_updates_are_those_of_a_training_written_by_hand(engine: str) -> None:
    torch.manual_seed(1)
    net = MultiScaleEnergy(8, 3, width=4, spectral_norm=False).double()
    twin = copy.deepcopy(net)
    gradient = weight_gradient(net, engine=engine)
    optimizer, theirs = (
        adam(net.parameters(), 1e-2, (0.5, 0.999)),
        torch.optim.Adam(twin.parameters(), 1e-2, (0.5, 0.999)),
    )
    for _ in range(3):
        real, fake = torch.randn(2, 4, 3, 8, 8, dtype=torch.float64)
        optimizer.zero_grad()
        EnergyLoss(0.3).backward(gradient, Part(0, 4, 4, first=0), real, fake)
        optimizer.step()
        theirs.zero_grad()
        low, high = twin(real), twin(fake)
        (contrastive_divergence(low, high) + 0.3 * energy_l2(torch.cat((low, high)))).backward()
        theirs.step()
    for mine, other in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(mine, other, rtol=0, atol=1e-6)


def test_adam_has_the_same_bits_for_any_number_of_threads() -> None:
    torch.manual_seed(1)
    shapes = [(130, 33, 3, 3), (7,), (1001,), (64, 65)]
    values, gradients = ([torch.randn(shape) for shape in shapes] for _ in range(2))
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            parameters = [nn.Parameter(value.clone()) for value in values]
            optimizer = adam(parameters, 1e-3, (0.5, 0.999))
            for _ in range(3):
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.grad = gradient.clone()
                optimizer.step()
            found.append([parameter.detach() for parameter in parameters])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("engine", ["fused", "autograd"])
@pytest.mark.parametrize("max_batch", [0, 2])
def test_trim_penalty_kl_and_contrast(engine: str, max_batch: int) -> None:
    torch.manual_seed(1)
    net = MultiScaleEnergy(8, 3, width=4, spectral_norm=True).double()
    real, fake = torch.randn(2, 10, 3, 8, 8, dtype=torch.float64)
    fake[3] *= 8
    net(fake)  # a power iteration, so that weights are not those of the start
    net.eval()  # where they stay
    twin = copy.deepcopy(net)
    loss = EnergyLoss(0.3, trim=0.25, penalty=0.1, contrast=0.5, kl=0.7, step_size=0.2)
    share, data, samples = loss.backward(weight_gradient(net, engine=engine), Part(0, 10, 10, 0), real, fake, max_batch)

    at = fake.clone().requires_grad_()
    low, high = twin(real), twin(at)
    (slope,) = torch.autograd.grad(high.sum(), at, create_graph=True)
    kept = high.sort().values[:-2]
    expected = 0.5 * contrastive_divergence(low, kept) + 0.3 * energy_l2(torch.cat((low, high)))
    expected = expected + 0.1 * slope.square().sum((1, 2, 3)).mean()
    moved = fake - 0.2 * slope
    (outer,) = torch.autograd.grad(twin(leaf := moved.detach().requires_grad_()).sum(), leaf)
    kl = twin(moved).mean().detach() + ((moved - moved.detach()) * outer).sum() / len(fake)
    expected = expected + 0.7 * kl
    expected.backward()
    assert float(share) == pytest.approx(float(expected), rel=1e-6)
    torch.testing.assert_close(samples.double(), high.detach().double())
    torch.testing.assert_close(data.double(), low.detach().double())
    for mine, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-6, atol=1e-9)


def test_the_penalty_is_differentiated_through_every_activation_of_the_nets() -> None:
    for activation in ("scaled_swish", "leaky_relu"):
        net = CoarseToFineEnergy(8, 1, base_width=2, activation=activation)
        fake = torch.randn(3, 1, 8, 8)
        for parameter in net.parameters():
            parameter.grad = torch.zeros_like(parameter)
        EnergyLoss(0.0, penalty=1.0, contrast=0.0, kl=1.0).backward(weight_gradient(net), Part(0, 3, 3, 0), fake, fake)
        assert sum(float(p.grad.square().sum()) for p in net.parameters()) > 0


def test_the_brake_and_the_hinge(tiny: CoarseToFineConfig) -> None:
    braked = dataclasses.replace(tiny, gap_brake=0.5, gap_hinge=0.2)
    assert [brake(braked, gap) for gap in (-3.0, 0.5, 1.0, 2.0)] == [1.0, 1.0, 0.5, 0.25]
    assert brake(tiny, 100.0) == 1.0
    low, high = torch.tensor([1.0, 2.0]), torch.tensor([1.3, 2.3])
    assert beyond_hinge(braked, low, high)
    assert not beyond_hinge(braked, high, low)
    assert not beyond_hinge(tiny, low, high + 9)
    with pytest.raises(ValueError, match="gap_brake must lie in"):
        dataclasses.replace(tiny, gap_brake=-1.0)
    with pytest.raises(ValueError, match="trim must lie in"):
        dataclasses.replace(tiny, trim=1.0)
