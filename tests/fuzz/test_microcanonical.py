"""Microcanonical chains of random shapes, types, masses, masks, schedules and side inputs, cut in every way.

A try makes a sampler and its chains, and takes the same steps at once, in batches, one by one with a saved state
between, and chain by chain. All must give the same bits.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

import fastebm

SHAPES = ((2,), (7,), (2, 3, 4), (1025,), (1, 2, 2))


def energy(x: Tensor, *conditions: Tensor) -> Tensor:
    flat = x.flatten(1)
    found = 0.5 * flat.square().sum(1) + 0.1 * flat.pow(4).sum(1)
    return found + flat[:, 0] * conditions[0] if conditions else found


def schedule(draw: random.Random, low: float, high: float, chains: int, steps: int) -> Any:
    """A number, a number for each chain, a schedule, or one for each chain."""
    generator = torch.Generator().manual_seed(draw.randrange(10**6))
    return draw.choice(
        (
            draw.uniform(low, high),
            low + (high - low) * torch.rand(chains, generator=generator),
            fastebm.schedules.linear(high, low),
            low + (high - low) * torch.rand(steps, chains, generator=generator),
        )
    )


def made(draw: random.Random, shape: tuple[int, ...], steps: int, generator: torch.Generator) -> Any:
    chains, rest = shape[0], shape[1:]
    masses = (
        1.0,
        2.5,
        torch.rand(rest, generator=generator) + 0.3,
        torch.rand(chains, *(1 for _ in rest), generator=generator) + 0.3,
    )
    options = {"temperature": schedule(draw, 0.5, 2, chains, steps), "mass": draw.choice(masses)}
    step_size = schedule(draw, 0.1, 0.6, chains, steps)
    if draw.random() < 0.5:
        return fastebm.AdjustedMCLMC(energy, step_size, draw.choice((1, 3)), jitter=draw.choice((0.0, 0.4)), **options)
    return fastebm.MCLMC(energy, step_size, draw.choice((None, schedule(draw, 1, 3, chains, steps))), **options)


def same(found: Tensor, wanted: Tensor, exactly: bool) -> bool:
    """Autograd, which runs where no lane program can, may round differently in another batch."""
    return torch.equal(found, wanted) if exactly else torch.allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_the_same_bits_however_chains_are_cut(tries: int) -> None:
    for number in range(tries):
        draw, generator = random.Random(f"microcanonical {number}"), torch.Generator().manual_seed(number)
        shape, steps = (draw.choice((1, 2, 5)), *draw.choice(SHAPES)), draw.randrange(1, 7)
        start = torch.randn(shape, generator=generator).to(draw.choice((torch.float32, torch.float64)))
        sampler, given = made(draw, shape, steps, generator), {}
        if draw.random() < 0.4 and start[0].numel() >= 4:
            mask = torch.rand(draw.choice((shape, shape[1:])), generator=generator) < 0.3
            mask.view(-1, start[0].numel())[:, :2] = False
            given |= {"mask": mask, "known": torch.randn(shape, generator=generator)}
        if draw.random() < 0.4:
            given["conditions"] = [torch.randn(shape[0], generator=generator)]

        whole = sampler.sample(start, steps, number, 9, **given)
        exactly = sampler.gradient.batch_invariant
        assert same(sampler.sample(start, steps, number, 9, batch_size=2, **given), whole, exactly), number
        first = sampler.init(start, number, 9, num_steps=steps, **given)
        state = first
        for _ in range(steps):
            state, _ = sampler.step(state)
            state = type(state).from_state_dict(state.state_dict())
        assert same(state.x, whole, exactly), number
        half = sampler.advance(first, steps // 2)
        parts = [sampler.advance(half.rows(i, i + 1), steps - steps // 2).x for i in range(shape[0])]
        assert same(torch.cat(parts), whole, exactly), number
        if "mask" in given:
            held = given["mask"].expand(shape)
            assert torch.equal(whole[held], given["known"].to(whole.dtype)[held]), number
        if len(first.schedule) == 1:
            warm = sampler.warm_up(first, 20)
            alone = [sampler.warm_up(first.rows(i, i + 1), 20) for i in range(shape[0])]
            assert same(torch.cat([state.x for state in alone]), warm.x, exactly), number
            assert same(torch.cat([state.schedule for state in alone], 1), warm.schedule, exactly), number
