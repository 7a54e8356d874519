"""Readings of chains in a training: energies, curvature and acceptance are those written out plainly, at equal bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastebm
from fastebm.sampling.cascade import _Shrinking
from fastebm.sampling.diagnostics import ChainReadings, run_observed

STEPS, COUNT = 7, 5


def energy(x: Tensor) -> Tensor:
    """Steep in its second number; no square, so that its curvature depends on the place."""
    return (torch.tensor([0.5, 4.0, 1.0]) * x.square()).sum(1) + 0.1 * x.pow(4).sum(1)


def potential(x: Tensor, target: Tensor | None, weight: float) -> tuple[Tensor, Tensor, Tensor]:
    """Energy with the data term, the gradient of the energy, and that of both, in float64."""
    x = x.double().requires_grad_()
    values = (torch.tensor([0.5, 4.0, 1.0], dtype=torch.float64) * x.square()).sum(1) + 0.1 * x.pow(4).sum(1)
    (gradient,) = torch.autograd.grad(values.sum(), x)
    pull = torch.zeros_like(gradient) if target is None else weight * (x.detach() - target.double())
    extra = torch.zeros(len(x)) if target is None else 0.5 * weight * (x.detach() - target.double()).square().sum(1)
    return values.detach() + extra, gradient, gradient + pull


def read(options: dict[str, Any], constraints: dict[str, Any], num_steps: int = STEPS) -> tuple[Any, list[Tensor]]:
    """Readings of chains, and their states before each step and at the end."""
    sampler = fastebm.Langevin(energy, options.pop("step_size", 0.1), 0.2, engine="autograd", **options)
    start = torch.randn(COUNT, 3, generator=torch.Generator().manual_seed(0))
    states = [start] if "mask" not in constraints else [torch.where(constraints["mask"], constraints["known"], start)]
    whole = sampler.sample(start, num_steps, 1, keep=lambda k, x, info: states.append(x.clone()), **constraints)
    assert whole is not None
    state = sampler.init(start, 1, num_steps=num_steps, **constraints)
    found = ChainReadings(state, num_steps, norm_clip=sampler.grad_norm_clip)
    end = run_observed(sampler, state, num_steps, found, [found]).x
    assert torch.equal(end, states[-1])  # the chains keep their bits
    return found, states


@pytest.mark.parametrize(
    ("options", "constraints"),
    [
        ({}, {}),
        ({"grad_norm_clip": 0.7}, {}),
        ({}, {"data_term": (torch.full((COUNT, 3), 0.3), 1.5)}),
        (
            {"step_size": 0.05},
            {"mask": torch.tensor([True, False, False]), "known": torch.zeros(COUNT, 3)},
        ),
    ],
    ids=["plain", "clip", "data term", "mask"],
)
def test_curvature_and_acceptance(options: dict[str, Any], constraints: dict[str, Any]) -> None:
    step_size, noise_std = options.get("step_size", 0.1), 0.2
    clip = options.get("grad_norm_clip")
    found, states = read(dict(options), constraints)
    assert found.steps == [1, 2, 6, 7]
    free = torch.ones(3) if "mask" not in constraints else (~constraints["mask"]).float()
    target, weight = constraints.get("data_term", (None, 0.0))
    for row, k in enumerate((1, 6)):
        x, after = states[k - 1], states[k]
        way = (after - x).double()
        (u, g, drift), (u_after, g_after, drift_after) = (potential(at, target, weight) for at in (x, after))
        share = torch.ones(COUNT, dtype=torch.float64)
        if clip is not None:
            share = (clip / g.norm(dim=1)).clamp(max=1)
            drift, drift_after = (each * (clip / each.norm(dim=1)).clamp(max=1)[:, None] for each in (g, g_after))
        curvature = ((g_after - g) * way).sum(1) / way.square().sum(1)
        torch.testing.assert_close(
            found.step_curvatures[row].double(), step_size * (share * curvature + weight), rtol=1e-3, atol=1e-4
        )
        ahead = (way + step_size * free * drift).square().sum(1)
        back = (-way + step_size * free * drift_after).square().sum(1)
        temperature = noise_std**2 / (2 * step_size)
        expected = ((u - u_after) / temperature + (ahead - back) / (2 * noise_std**2)).clamp(max=0).exp()
        torch.testing.assert_close(found.acceptance[row].double(), expected, rtol=1e-3, atol=1e-3)
    before = torch.stack([energy(x) for x in states[:-1]])
    torch.testing.assert_close(found.energies, before)
    norms = torch.stack([(potential(states[k - 1], None, 0)[1] * free).norm(dim=1).float() for k in found.steps])
    torch.testing.assert_close(found.gradient_norms, norms)


@pytest.mark.parametrize(("num_steps", "steps", "pairs"), [(0, [], 0), (1, [1], 0), (2, [1, 2], 1), (3, [1, 2, 3], 2)])
def test_short_chains(num_steps: int, steps: list[int], pairs: int) -> None:
    found, _ = read({}, {}, num_steps)
    assert found.steps == steps
    assert found.energies.shape == (num_steps, COUNT)
    assert found.step_curvatures.shape == found.acceptance.shape == (pairs, COUNT)


def test_steps_without_noise_have_no_acceptance_and_an_overshoot_is_seen() -> None:
    stiff = torch.tensor([1.0, 25.0])

    def bowl(x: Tensor) -> Tensor:
        return 0.5 * (stiff * x.square()).sum(1)

    sampler = fastebm.Langevin(bowl, 0.1, 0.0, engine="autograd")
    state = sampler.init(torch.tensor([[3.0, 0.0], [0.0, 3.0]]), 1, num_steps=5)
    found = ChainReadings(state, 5)
    run_observed(sampler, state, 5, found, [found])
    torch.testing.assert_close(found.step_curvatures, torch.tensor([[0.1, 2.5]]).expand(2, 2))
    assert found.acceptance.isnan().all()
    assert (found.energies.diff(dim=0) > 0).tolist() == [[False, True]] * 4


def test_each_update_is_read_with_the_step_that_it_took() -> None:
    """Also where steps shrink in place: by a tenth after each that raised the energy."""
    stiff = torch.tensor([1.0, 25.0])
    sampler = fastebm.Langevin(lambda x: 0.5 * (stiff * x.square()).sum(1), 0.1, 0.0, engine="autograd")
    shrinking = _Shrinking(sampler, 0.9)
    start = sampler.init(torch.tensor([[3.0, 0.0], [0.0, 3.0]]), 1, num_steps=5)
    state = shrinking.with_steps_of_chains(start)
    found = ChainReadings(state, 5)
    run_observed(shrinking, state, 5, found, [found])  # type: ignore[arg-type]
    torch.testing.assert_close(found.step_curvatures, torch.tensor([[0.1, 2.5], [0.1, 2.5 * 0.9**2]]))
