"""Hamiltonian Monte Carlo and its kin: trajectories of the leapfrog integrator with one Metropolis test at their end.

Sources: Neal, "MCMC using Hamiltonian dynamics", 2011 (HMC); Horowitz, "A generalized guided Monte Carlo algorithm",
Physics Letters B 1991 (GHMC); Riou-Durand and Vogrinc, "Metropolis adjusted Langevin trajectories", arXiv 2202.13230
(MALT).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastebm import rng
from fastebm.ops import LaneSampler, SamplerOptions, kinetic_energy, leapfrog_, metropolis_, obabo_step_
from fastebm.sampling.metropolis import Box, MetropolisSampler, check_box, key_increment, positive_schedules, walls_of
from fastebm.sampling.sampler import Energy, check_steps, gradient_of, number_of_rows
from fastebm.sampling.schedules import Schedule, as_schedule, constant, rows_to_try
from fastebm.sampling.underdamped import (
    Mass,
    VelocityState,
    check_mass,
    fresh_velocity,
    kinetic_tables,
    masses_of,
    row_of,
    table_of_steps,
    with_masses,
)
from fastebm.scalars import as_count, as_real


class _Trajectories(MetropolisSampler[VelocityState]):
    """What HMC, GHMC and MALT share: options, starts, and a trajectory of `num_leapfrogs` evaluations."""

    state_type = VelocityState
    friction: Schedule = constant(0.0)

    def __init__(
        self,
        energy: Energy,
        step_size: float | Tensor | Schedule,
        num_leapfrogs: int,
        *,
        temperature: float | Tensor | Schedule = 1.0,
        mass: Mass = 1.0,
        jitter: float = 0.0,
        box: Box | None = None,
        dtype: torch.dtype | None = None,
        engine: str = "auto",
        reproducible: bool = True,
    ) -> None:
        self.gradient = gradient_of(energy, dtype, engine, reproducible, needs_energy=type(self).__name__)
        self.step_size, self.temperature = as_schedule(step_size), as_schedule(temperature)
        self.num_leapfrogs = as_count("num_leapfrogs", num_leapfrogs, 1)
        self.mass, self.box = check_mass(mass), check_box(box)
        self.jitter = as_real("jitter", jitter)
        if not 0 <= self.jitter < 1:
            raise ValueError(f"jitter must be in [0, 1), got {jitter}")
        self._tables(rows_to_try(*self._schedules()))

    def _schedules(self) -> tuple[Schedule, ...]:
        return self.step_size, self.friction, self.temperature

    def _tables(self, rows: int) -> tuple[Tensor, Tensor]:
        step_size, friction, temperature = self._schedules()
        positive_schedules(rows, temperature=temperature)  # a test at temperature 0 is none
        return kinetic_tables(rows, step_size, friction, temperature, halves=True)

    target_acceptance = 0.8

    def _table_of(self, state: VelocityState, steps: Tensor) -> Tensor:
        return table_of_steps(state, steps, self.friction, halves=True)

    def _with_variances(self, state: VelocityState, variance: Tensor) -> VelocityState:
        changed = replace(state, inverse_mass=masses_of(state, variance))
        return changed if state.velocity is None else replace(changed, velocity=self._first_velocity(changed))

    def _options(self) -> dict[str, Any]:
        return {}

    def __repr__(self) -> str:
        options = {"step_size": self.step_size, "num_leapfrogs": self.num_leapfrogs, "temperature": self.temperature}
        options |= self._options()
        if not isinstance(self.mass, float) or self.mass != 1:
            options["mass"] = self.mass if isinstance(self.mass, float) else tuple(self.mass.shape)
        options |= {name: getattr(self, name) for name in ("jitter", "box") if getattr(self, name)}
        listed = ", ".join(f"{name}={value!r}" for name, value in options.items())
        return f"{type(self).__name__}({self.gradient!r}; {listed})"

    @torch.no_grad()
    def init(
        self,
        x0: Tensor,
        seed: int | None = None,
        chain_ids: int | Tensor = 0,
        *,
        num_chains: int | None = None,
        start_step: int = 0,
        num_steps: int | None = None,
        mask: Tensor | None = None,
        known: Tensor | None = None,
        conditions: Sequence[Tensor] = (),
    ) -> VelocityState:
        """The state from which chains start; arguments as in `Langevin.init`. A step is one trajectory."""
        start_step, _ = check_steps(start_step, 0 if num_steps is None else num_steps, self.key_steps)
        table, temperatures = self._tables(number_of_rows(num_steps, *self._schedules()))
        start = self._common(x0, seed, chain_ids, num_chains, start_step, conditions, table, torch.contiguous_format)
        state = with_masses(start, mask, known, self.mass, self.box, temperatures)
        return replace(state, velocity=self._first_velocity(state))

    def _first_velocity(self, state: VelocityState) -> Tensor | None:
        """What a state keeps of velocities: nothing, because each trajectory draws its own."""
        return None

    def _lane_options(self, state: VelocityState) -> SamplerOptions | None:
        return None

    def _row(self, state: VelocityState) -> Tensor:
        """The schedule's row of this trajectory, with its jitter, as a table of one row."""
        row = row_of(state, state.schedule)
        if not self.jitter:
            return row
        count = state.x.shape[0]
        u = torch.ops.fastebm.uniform(
            (count, 1), state.key, state.chain_ids, int(rng.Stream.TRAJECTORY_LENGTH), torch.float32
        )
        wide = row if row.dim() == 3 else row[:, None].expand(1, count, 3)
        factor = 1 + self.jitter * (2 * u - 1)
        return torch.cat((wide[..., :1] * factor[None], wide[..., 1:]), dim=-1)

    def _velocity(self, state: VelocityState) -> Tensor:
        """The velocity at the start of a trajectory."""
        return fresh_velocity(state)

    def _pass(self, state: VelocityState, gradient: Tensor, **options: Any) -> None:
        """One pass between two evaluations of the gradient."""
        leapfrog_(state.x, state.moving, gradient, key=state.key, **options)

    def _updater(self, state: VelocityState) -> Callable[[], Any]:
        energy, gradient = state.kept
        one, inner = self._increments(state.key)
        low, high = walls_of(self.box)
        last = self.num_leapfrogs - 1

        def update() -> tuple[Tensor, Tensor]:
            velocity = self._velocity(state)
            end = velocity.clone()
            moving = replace(state, x=state.x.clone(), velocity=end)
            options = {
                "schedule": self._row(state),
                "inverse_mass": state.inverse_mass,
                "low": low,
                "high": high,
            }
            work = torch.zeros(state.x.shape[0], dtype=torch.float64, device=state.x.device)
            everywhere = inner is not None  # where noise comes between, each leapfrog's own work counts
            self._pass(moving, gradient, close=False, open=True, work=work, **options)
            for k in range(self.num_leapfrogs):
                if inner is not None:
                    state.key.add_(inner)
                found, slope = self._energy_gradient(state, moving.x)
                counted = work if everywhere or k == last else None
                self._pass(moving, slope, close=True, open=k < last, work=counted, **options)
            heat = row_of(state, state.temperatures).double().flatten()
            log_ratio = -((found.double() - energy.double()) + work) / heat
            if inner is not None:
                state.key.sub_(inner)  # the test belongs to the last step
            accepted = metropolis_(
                state.x, energy, gradient, moving.x, found, slope, log_ratio, key=state.key, chain_ids=state.chain_ids
            )
            self._keep_velocity(state, accepted, velocity, end)
            if inner is not None:
                state.key.add_(inner)
            state.key.add_(one)
            return accepted, log_ratio

        return update

    def _increments(self, key: Tensor) -> tuple[Tensor, Tensor | None]:
        """What a trajectory adds to the key at its end, and after each of its steps."""
        return key_increment(key), None

    def _keep_velocity(self, state: VelocityState, accepted: Tensor, before: Tensor, after: Tensor) -> None:
        """Nothing: the next trajectory starts with a fresh velocity."""


class HMC(_Trajectories):
    """Hamiltonian Monte Carlo: samples `p(x) ~ exp(-E(x) / T)` exactly.

    A step draws a fresh velocity, follows the leapfrog integrator for `num_leapfrogs` steps of `step_size`, and accepts
    the end by the error of the total energy; else x stays. It costs `num_leapfrogs` evaluations of the energy's
    gradient. Aim at 0.65 to 0.9 accepted: see `warm_up`.

    Args:
        energy: as `Langevin` takes it; a score alone can't be tested.
        step_size: the time of a leapfrog step, a positive number, a schedule, or a tensor with one for each chain.
        num_leapfrogs: leapfrog steps in a trajectory, the same for all chains, which run side by side.
        temperature: T, as `step_size`.
        mass: a positive number, or a tensor that broadcasts to one sample or has a row for each chain.
        jitter: each trajectory of each chain has a step size of its own, drawn from `step_size * (1 +- jitter)`; it
            breaks the resonance of trajectories with the periods of the target. In [0, 1).
        box: `(low, high)`: trajectories are reflected at its walls.
        dtype, engine, reproducible: passed to `energy_gradient`.

    Raises ValueError or TypeError for options out of range.

    Example:
        >>> import torch, fastebm
        >>> normal = fastebm.HMC(lambda x: 0.5 * x.square().sum(1), step_size=0.4, num_leapfrogs=4)
        >>> x = normal.sample(torch.zeros(4000, 2), num_steps=20, seed=1)
        >>> bool((x.std(0) - 1).abs().max() < 0.05)
        True
    """

    def _lane_options(self, state: VelocityState) -> SamplerOptions | None:
        if self.jitter:
            return None
        low, high = walls_of(self.box)
        address = state.schedule, state.key, state.chain_ids
        given = state.temperature, state.inverse_mass, state.mask
        return SamplerOptions(int(LaneSampler.HMC), self.num_leapfrogs, *address, *given, None, low, high)


class GHMC(_Trajectories):
    """Generalized HMC: velocities are kept from trajectory to trajectory and only partly refreshed.

    Args:
        persistence: how much of the velocity stays, in [0, 1): `v' = persistence v + sqrt(1 - persistence^2) noise`. A
            rejected trajectory turns the velocity round.
        num_leapfrogs: usually 1, for which persistence lets short trajectories join.

    Other arguments, errors and source as `HMC`.
    """

    def __init__(
        self,
        energy: Energy,
        step_size: float | Tensor | Schedule,
        num_leapfrogs: int = 1,
        *,
        persistence: float = 0.9,
        **options: Any,
    ) -> None:
        super().__init__(energy, step_size, num_leapfrogs, **options)
        self.target_acceptance = 0.9
        self.persistence = as_real("persistence", persistence)
        if not 0 <= self.persistence < 1:
            raise ValueError(f"persistence must be in [0, 1), got {persistence}")

    def _options(self) -> dict[str, Any]:
        return {"persistence": self.persistence}

    def _first_velocity(self, state: VelocityState) -> Tensor:
        return fresh_velocity(state, rng.Stream.MOMENTUM)  # the first step draws from the other stream at this key

    def _velocity(self, state: VelocityState) -> Tensor:
        kept = self.persistence
        return kept * state.moving + (1 - kept**2) ** 0.5 * fresh_velocity(state)

    def _keep_velocity(self, state: VelocityState, accepted: Tensor, before: Tensor, after: Tensor) -> None:
        by_chain = accepted.reshape(-1, *(1,) * (state.x.dim() - 1))
        torch.where(by_chain, after, -before, out=state.moving)


class MALT(_Trajectories):
    """Metropolis-adjusted Langevin trajectories: underdamped dynamics (OBABO) with one test at the end of each.

    Only the errors of the leapfrog parts enter the test, so that friction along the way costs no acceptance; its
    randomness makes the choice of the trajectory's length forgiving.

    Args:
        friction: in 1 / time, positive or 0, which is HMC; as `Underdamped`.

    Other arguments and errors as `HMC`. A step takes `num_leapfrogs` steps of the random numbers.
    """

    def __init__(
        self,
        energy: Energy,
        step_size: float | Tensor | Schedule,
        num_leapfrogs: int,
        *,
        friction: float | Tensor | Schedule = 1.0,
        **options: Any,
    ) -> None:
        self.friction = as_schedule(friction)
        super().__init__(energy, step_size, num_leapfrogs, **options)
        self.key_steps = self.num_leapfrogs

    def _options(self) -> dict[str, Any]:
        return {"friction": self.friction}

    def _pass(self, state: VelocityState, gradient: Tensor, **options: Any) -> None:
        obabo_step_(state.x, state.moving, gradient, key=state.key, chain_ids=state.chain_ids, **options)

    def _increments(self, key: Tensor) -> tuple[Tensor, Tensor | None]:
        within = torch.zeros_like(key)
        within[1] = 1
        row = torch.zeros_like(key)
        row[2] = 1
        return row, within


__all__ = ["GHMC", "HMC", "MALT", "kinetic_energy"]
