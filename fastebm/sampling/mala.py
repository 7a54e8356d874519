"""MALA: Langevin proposals with a Metropolis test, which make the target exact at any step size.

Source: Roberts and Tweedie, "Exponential convergence of Langevin distributions and their discrete approximations",
Bernoulli 1996; reflection at walls as of trajectories, Neal, "MCMC using Hamiltonian dynamics", 2011.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastebm.ops import LaneSampler, SamplerOptions, mala_step_
from fastebm.ops.langevin import check_clip
from fastebm.ops.underdamped import beyond
from fastebm.sampling.metropolis import (
    Box,
    MetropolisInfo,
    PositionSampler,
    WalledMetropolisInfo,
    check_box,
    key_increment,
    positive_schedules,
    walls_of,
)
from fastebm.sampling.sampler import Energy, EnergyState
from fastebm.sampling.schedules import Schedule


class MALA(PositionSampler):
    """Metropolis-adjusted Langevin: samples `p(x) ~ exp(-E(x) / T)` exactly, whatever the step size.

    A step proposes `x' = x - step_size * grad E(x) + sqrt(2 * step_size * T) * noise` and accepts it with the
    probability that leaves p unchanged; else x stays. It costs one evaluation of the energy's gradient, as a Langevin
    step does, because energy and gradient of x are kept. Aim at 0.574 accepted: see `warm_up`.

    Args:
        energy: as `Langevin` takes it; a score alone can't be tested.
        step_size: a positive number, a schedule, or a tensor with one for each chain.
        temperature: T, likewise.
        grad_clip: the largest magnitude of an entry of the gradient in the proposals; the target stays exact.
        box: `(low, high)`: p is confined to it by mirroring proposals once at a wall. A clamp would break detailed
            balance.
        dtype, engine, reproducible: passed to `energy_gradient`. In bfloat16 the same rounded gradient serves both
            directions, so that the target remains that of the energies.

    Raises ValueError or TypeError for options out of range.

    Example:
        >>> import torch, fastebm
        >>> normal = fastebm.MALA(lambda x: 0.5 * x.square().sum(1), step_size=0.8)
        >>> x = normal.sample(torch.zeros(4000, 2), num_steps=50, seed=1)
        >>> bool((x.std(0) - 1).abs().max() < 0.05)
        True
    """

    def __init__(
        self,
        energy: Energy,
        step_size: float | Tensor | Schedule,
        *,
        temperature: float | Tensor | Schedule = 1.0,
        grad_clip: float | None = None,
        box: Box | None = None,
        dtype: torch.dtype | None = None,
        engine: str = "auto",
        reproducible: bool = True,
    ) -> None:
        super().__init__(energy, step_size, temperature, dtype, engine, reproducible)
        self.grad_clip = check_clip("grad_clip", grad_clip)
        self.box = check_box(box)
        self._info_type = MetropolisInfo if self.box is None else WalledMetropolisInfo

    def __repr__(self) -> str:
        options = f"step_size={self.step_size!r}, temperature={self.temperature!r}"
        for name in ("grad_clip", "box"):
            if getattr(self, name) is not None:
                options += f", {name}={getattr(self, name)}"
        return f"MALA({self.gradient!r}; {options})"

    target_acceptance = 0.574

    def _table_of(self, state: EnergyState, steps: Tensor) -> Tensor:
        step_size, noise_std = state.schedule[0].double().unbind(-1)
        heat = noise_std.square() / (2 * step_size)
        return torch.stack((steps, (2 * steps * heat).sqrt()), dim=-1).float()[None]

    def _table(self, rows: int) -> Tensor:
        step_size, temperature = positive_schedules(rows, step_size=self.step_size, temperature=self.temperature)
        return torch.stack((step_size, (2 * step_size * temperature).sqrt()), dim=-1).float()

    def _lane_options(self, state: EnergyState) -> SamplerOptions:
        low, high = walls_of(self.box)
        address = state.schedule, state.key, state.chain_ids
        return SamplerOptions(int(LaneSampler.MALA), 1, *address, None, None, state.mask, self.grad_clip, low, high)

    def _updater(self, state: EnergyState) -> Callable[[], Any]:
        one = key_increment(state.key)
        x, (energy, gradient) = state.x, state.kept
        # The proposal is a Langevin step, whose options besides the clip and the mask are off.
        address = state.schedule, state.key, state.chain_ids
        held = (None, None) if state.mask is None else (state.mask, x)
        options = (None, None, self.grad_clip, None, None, None, *held, None, None, 0.0)
        low, high = walls_of(self.box)

        def update() -> tuple[Tensor, Tensor]:
            proposal = torch.ops.fastebm.langevin_step(x, gradient, *address, *options)
            if low is not None and high is not None:
                _, proposal = beyond(proposal, low, high)
            found, slope = self._energy_gradient(state, proposal)
            accepted, log_ratio = mala_step_(
                x,
                energy,
                gradient,
                proposal,
                found,
                slope,
                schedule=state.schedule,
                key=state.key,
                chain_ids=state.chain_ids,
                grad_clip=self.grad_clip,
                low=low,
                high=high,
            )
            state.key.add_(one)
            return accepted, log_ratio

        return update
