"""Underdamped Langevin dynamics: positions and velocities with friction, by the BAOAB and OBABO splittings.

Source: Leimkuhler and Matthews, "Rational construction of stochastic numerical methods for molecular sampling",
Applied Mathematics Research eXpress 2013; Bussi and Parrinello, "Accurate sampling using Langevin dynamics", Physical
Review E 2007 (OBABO).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from fastebm import rng
from fastebm.ops import LaneSampler, SamplerOptions, baoab_step_, obabo_step_
from fastebm.ops.normal import rounded_sqrt
from fastebm.sampling.metropolis import (
    Box,
    EnergySampler,
    check_box,
    check_inside,
    key_increment,
    positive_schedules,
    walls_of,
)
from fastebm.sampling.observers import Observer
from fastebm.sampling.sampler import Energy, EnergyState, check_steps, constrained, gradient_of, number_of_rows
from fastebm.sampling.schedules import Schedule, as_schedule, rows_to_try
from fastebm.scalars import as_real, shown

Mass = float | Tensor


@dataclass(frozen=True, eq=False)
class VelocityState(EnergyState):
    """The state of samplers with velocities.

    Attributes (besides those of `EnergyState`):
        schedule: float32 `(S, 3)` or `(S, B, 3)` rows of (step size, decay of the velocity, noise std).
        velocity: x's shape and dtype.
        inverse_mass: `(1, N)`, `(B, 1)` or `(B, N)` for chains of N numbers; None for masses of 1.
        temperature: float32 `(S,)` or `(S, B)`.
    """

    velocity: Tensor | None = None
    inverse_mass: Tensor | None = None
    temperature: Tensor | None = None

    @property
    def moving(self) -> Tensor:
        """The velocities, of a state that keeps them."""
        if self.velocity is None:
            raise ValueError("this state keeps no velocities")
        return self.velocity

    @property
    def temperatures(self) -> Tensor:
        """The table of temperatures, of a state that has one."""
        if self.temperature is None:
            raise ValueError("this state has no temperatures")
        return self.temperature

    @classmethod
    def _tables(cls) -> dict[str, int]:
        return {"schedule": 3, "temperature": 2}

    def check(self) -> None:
        super().check()
        if self.schedule.shape[-1] != 3:
            raise ValueError(f"a chain's schedule has rows of 3 numbers, got {tuple(self.schedule.shape)}")
        if self.velocity is not None and (self.velocity.shape, self.velocity.dtype) != (self.x.shape, self.x.dtype):
            raise ValueError(f"a chain's velocity must be like x, got {shown(self.velocity)}")
        count, width = self.x.shape[0], math.prod(self.x.shape[1:])
        heat = self.temperature
        if heat is not None and not (
            heat.dtype == torch.float32
            and (heat.dim() == 1 or (heat.dim() == 2 and heat.shape[1] == count))
            and len(heat)
            and bool(((heat >= 0) & heat.isfinite()).all())
        ):
            raise ValueError(f"a chain's temperature is a float32 table (S,) or (S, {count}) >= 0, got {shown(heat)}")
        for name, dims in (("inverse_mass", ((1, count), (1, width))),):
            value = getattr(self, name)
            if value is not None and not (
                value.dim() == 2
                and value.dtype == self.x.dtype
                and all(n in d for n, d in zip(value.shape, dims, strict=True))
            ):
                raise ValueError(
                    f"a chain's {name} must broadcast to ({count}, {width}) in x's dtype, got {shown(value)}"
                )


def inverse_masses(mass: Mass, x: Tensor, mask: Tensor | None) -> Tensor | None:
    """1 / mass for states like x, None where all are 1; zero where a mask holds an entry fixed.

    Raises ValueError or TypeError for masses that are not positive or don't broadcast to one sample or one for each
    chain.
    """
    count, width = x.shape[0], math.prod(x.shape[1:])
    if isinstance(mask, Tensor):
        whole = inverse_masses(mass, x, None)
        free = (~mask).reshape(count, width).to(x.dtype)
        return free if whole is None else whole * free
    if not isinstance(mass, Tensor) or mass.dim() == 0:
        number = as_real("mass", mass)
        return None if number == 1 else x.new_full((1, 1), 1 / number)
    view = mass.detach().to(x.device, x.dtype)
    if mass.shape == x.shape:
        return 1 / view.reshape(count, width)
    if mass.shape == (count, *(1,) * (x.dim() - 1)):
        return 1 / view.reshape(count, 1)
    sample = torch.Size(x.shape[1:])
    try:
        fits = torch.broadcast_shapes(mass.shape, sample) == sample and mass.dim() <= len(sample)
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"mass must be a number, broadcast to one sample {tuple(sample)}, or have a row for each chain, "
            f"({count}, {', '.join('1' * (x.dim() - 1))}), got {tuple(mass.shape)}"
        )
    return 1 / view.expand(sample).reshape(1, width)


def check_mass(mass: Any) -> Mass:
    """A mass. Raises TypeError or ValueError for what is not finite and positive."""
    if not isinstance(mass, Tensor):
        mass = as_real("mass", mass)
        fits = math.isfinite(mass) and mass > 0
    else:
        if not mass.is_floating_point() or mass.is_meta:
            raise TypeError(f"mass must be of floating point numbers, got {shown(mass)}")
        mass = mass.detach().clone()
        fits = bool(((mass > 0) & mass.isfinite()).all())
    if not fits:
        raise ValueError(
            f"mass must be finite and positive, got {mass if not isinstance(mass, Tensor) else float(mass.min())}"
        )
    return mass


def fresh_velocity(state: VelocityState, stream: rng.Stream = rng.Stream.REFRESH) -> Tensor:
    """Velocities of the temperature in the state's row, from a stream at its key."""
    x = state.x
    noise = torch.ops.fastebm.normal(tuple(x.shape), state.key, state.chain_ids, int(stream), x.dtype)
    return scaled_noise(state, noise)


def scaled_noise(state: VelocityState, noise: Tensor) -> Tensor:
    """Standard normal noise times sqrt(T / mass)."""
    count = state.x.shape[0]
    scale = rounded_sqrt(row_of(state, state.temperatures).to(state.x.dtype)).reshape(-1, 1)
    if state.inverse_mass is not None:
        scale = scale * rounded_sqrt(state.inverse_mass)
    return (noise.reshape(count, math.prod(state.x.shape[1:])) * scale).reshape(state.x.shape)


def row_of(state: VelocityState, table: Tensor) -> Tensor:
    """The row of a table at the state's key, `(1, ...)`, without a wait for the device."""
    return table[state.key[2].clamp(max=table.shape[0] - 1)][None]


class Underdamped(EnergySampler[VelocityState]):
    """Underdamped (kinetic) Langevin dynamics of `p(x, v) ~ exp(-(E(x) + |v|^2 m / 2) / T)`, without a Metropolis test.

    A step of BAOAB kicks the velocity by half a step of the force, drifts half a step, mixes in fresh noise, drifts and
    kicks again; of OBABO it mixes half before and half after. One evaluation of the gradient a step. The error of
    averages is of second order in the step size; BAOAB's positions have none for a quadratic energy. Without friction
    both are the leapfrog integrator, to the bit.

    Args:
        energy: as `Langevin` takes it, or a score.
        step_size: the time of a step, a positive number, a schedule, or a tensor with one for each chain.
        friction: in 1 / time, not negative, likewise. The velocity forgets itself within 1 / friction.
        temperature: T, likewise.
        mass: a positive number, or a tensor that broadcasts to one sample or has a row for each chain, `(B, 1, ...)`.
        scheme: "baoab" or "obabo".
        box: `(low, high)`: trajectories are reflected at its walls.
        dtype, engine, reproducible: passed to `energy_gradient`.

    Raises ValueError or TypeError for options out of range.

    Example:
        >>> import torch, fastebm
        >>> normal = fastebm.Underdamped(lambda x: 0.5 * x.square().sum(1), step_size=0.5, friction=1.0)
        >>> x = normal.sample(torch.zeros(4000, 2), num_steps=50, seed=1)
        >>> bool((x.std(0) - 1).abs().max() < 0.05)
        True
    """

    state_type = VelocityState

    def __init__(
        self,
        energy: Energy,
        step_size: float | Tensor | Schedule,
        friction: float | Tensor | Schedule,
        *,
        temperature: float | Tensor | Schedule = 1.0,
        mass: Mass = 1.0,
        scheme: Literal["baoab", "obabo"] = "baoab",
        box: Box | None = None,
        dtype: torch.dtype | None = None,
        engine: str = "auto",
        reproducible: bool = True,
    ) -> None:
        self.gradient = gradient_of(energy, dtype, engine, reproducible)
        if scheme not in ("baoab", "obabo"):
            raise ValueError(f'scheme is "baoab" or "obabo", got {scheme!r}')
        self.scheme = scheme
        self.step_size, self.friction = as_schedule(step_size), as_schedule(friction)
        self.temperature, self.mass, self.box = as_schedule(temperature), check_mass(mass), check_box(box)
        schedules = self.step_size, self.friction, self.temperature
        self._tables(rows_to_try(*schedules))

    def __repr__(self) -> str:
        mass = f"{self.mass:g}" if isinstance(self.mass, float) else f"masses {tuple(self.mass.shape)}"
        return (
            f"Underdamped({self.gradient!r}; {self.scheme}, step_size={self.step_size!r}, friction={self.friction!r}, "
            f"temperature={self.temperature!r}, mass={mass}{'' if self.box is None else f', box={self.box}'})"
        )

    def _tables(self, rows: int) -> tuple[Tensor, Tensor]:
        """The tables of (step size, decay, noise std) and of temperatures."""
        return kinetic_tables(rows, self.step_size, self.friction, self.temperature, halves=self.scheme == "obabo")

    @torch.no_grad()
    def init(
        self,
        x0: Tensor,
        seed: int | None = None,
        chain_ids: int | Tensor = 0,
        *,
        velocity: Tensor | None = None,
        num_chains: int | None = None,
        start_step: int = 0,
        num_steps: int | None = None,
        mask: Tensor | None = None,
        known: Tensor | None = None,
        conditions: Sequence[Tensor] = (),
    ) -> VelocityState:
        """The state from which chains start; arguments as in `Langevin.init`, and `velocity`, x0's shape, by default
        drawn at the first temperature."""
        start_step, _ = check_steps(start_step, 0 if num_steps is None else num_steps)
        table, temperatures = self._tables(number_of_rows(num_steps, self.step_size, self.friction, self.temperature))
        start = self._common(x0, seed, chain_ids, num_chains, start_step, conditions, table, torch.contiguous_format)
        state = with_masses(start, mask, known, self.mass, self.box, temperatures)
        return replace(state, velocity=fresh_velocity(state) if velocity is None else check_velocity(velocity, state))

    def _step_(self, state: VelocityState, gradient: Tensor, close: bool, opens: bool) -> None:
        take = baoab_step_ if self.scheme == "baoab" else obabo_step_
        low, high = walls_of(self.box)
        take(
            state.x,
            state.moving,
            gradient,
            schedule=state.schedule,
            key=state.key,
            chain_ids=state.chain_ids,
            inverse_mass=state.inverse_mass,
            low=low,
            high=high,
            close=close,
            open=opens,
        )

    def _lane_options(self, state: VelocityState) -> SamplerOptions:
        kind = LaneSampler.BAOAB if self.scheme == "baoab" else LaneSampler.OBABO
        low, high = walls_of(self.box)
        address = state.schedule, state.key, state.chain_ids
        return SamplerOptions(int(kind), 1, *address, None, state.inverse_mass, state.mask, None, low, high)

    def _singly(self, state: VelocityState, num_steps: int, observers: Sequence[Observer], done: int) -> None:
        if num_steps == 0:
            return
        energy, gradient = state.kept
        one = key_increment(state.key)
        self._step_(state, gradient, close=False, opens=True)
        for i in range(1, num_steps + 1):
            state.key.add_(one)
            before = energy.clone() if observers else energy
            found, slope = self._energy_gradient(state, state.x)
            energy.copy_(found)
            for observe in observers:
                observe(done + i, state.x, before)
            # The closing half of this step and the opening half of the next one are one pass.
            self._step_(state, slope, close=True, opens=i < num_steps)
        gradient.copy_(slope)

    def _updater(self, state: VelocityState) -> Callable[[], None]:
        return lambda: self._singly(state, 1, (), 0)


def kinetic_tables(
    rows: int,
    step_size: Schedule,
    friction: Schedule,
    temperature: Schedule,
    halves: bool,
) -> tuple[Tensor, Tensor]:
    """float32 tables of (step size, decay, noise std) and of temperatures; `halves` where noise comes in two halves."""
    h, rate, heat = positive_schedules(
        rows, step_size=step_size, friction_or_zero=friction, temperature_or_zero=temperature
    )
    exponent = -rate * h * (0.5 if halves else 1.0)
    decay = exponent.exp()
    # 1 - decay^2, which expm1 keeps for small friction.
    noise_std = (-torch.expm1(2 * exponent) * heat).sqrt()
    return torch.stack((h, decay, noise_std), dim=-1).float(), heat.float()


def with_masses(
    start: dict[str, Any],
    mask: Tensor | None,
    known: Tensor | None,
    mass: Mass,
    box: Box | None,
    temperatures: Tensor,
) -> VelocityState:
    """The state of `start` with its known entries set and its masses, without velocities."""
    start["x"], held = constrained(start["x"], mask, known)
    x = start["x"]
    check_inside(x, box)
    inverse_mass = inverse_masses(mass, x, held)
    return VelocityState(**start, mask=held, inverse_mass=inverse_mass, temperature=temperatures.to(x.device))


def check_velocity(velocity: Any, state: VelocityState) -> Tensor:
    """A copy of given velocities, zero where a mask holds x. Raises ValueError for another shape than x's."""
    x, held = state.x, state.mask
    if not isinstance(velocity, Tensor) or velocity.shape != x.shape or not velocity.is_floating_point():
        raise ValueError(f"velocity must be a tensor of x0's shape {tuple(x.shape)}, got {shown(velocity)}")
    given = velocity.detach().to(x.device, x.dtype, copy=True, memory_format=torch.contiguous_format)
    return given if held is None else given.masked_fill_(held, 0)
