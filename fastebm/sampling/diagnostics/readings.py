"""Readings of Langevin chains in a training: all their energies, and at a few updates gradients, curvature, acceptance.

Energies come with every update. Gradients, and what follows from them, are read at the first two and the last two
updates of a chain: `READ` of them, so that those between may still run in one call. The chain keeps its bits.
"""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from fastebm.sampling.state import ChainState, StepInfo

READ = 2
"""Updates at either end of a chain whose gradients are read."""


class ChainReadings:
    """What the chains of one batch tell while they run; for `run_observed`, as the reader and as an observer.

    Two updates in a row, from x to x' and on from x', give the curvature of the energy along the step, which is
    `(grad E(x') - grad E(x)).d / d.d` with `d = x' - x`. A data term adds its weight to it. Above 2 over the step size
    a descent overshoots, and the energy rises. They also give the probability with which a Metropolis test would take
    x' for x at the temperature `noise_std**2 / (2 step_size)`, as MALA does; it is not a number where the step has no
    noise. Known pixels don't count.

    Args:
        state: the chains at their start; schedules of one number for all of them.
        num_steps: the number of updates that follow.
        norm_clip: the sampler's `grad_norm_clip`, which shortens steps.
        detailed: whether gradients are read; energies always are.

    Attributes:
        steps: the updates, counted from 1, whose gradients are read.
    """

    reads_states = False  # as an observer

    def __init__(
        self, state: ChainState, num_steps: int, *, norm_clip: float | None = None, detailed: bool = True
    ) -> None:
        ends = {*range(1, READ + 1), *range(num_steps - READ + 1, num_steps + 1)} if detailed else set()
        self.num_steps = num_steps
        self.steps = [step for step in sorted(ends) if 1 <= step <= num_steps]
        self.norm_clip = norm_clip
        self._state = state
        self._row = state.key[2].clone()  # a chain counts it on in place
        self._energies: list[Tensor | NDArray[Any]] = []
        self._norms: list[Tensor] = []
        self._pairs: list[Tensor] = []
        self._before: tuple[int, StepInfo, Tensor] | None = None

    # For run_observed -------------------------------------------------------------------------------------------------

    def updates_until_read(self, done: int) -> int:
        """How many updates after `done` earlier ones end with one whose gradient is read; past the end for none."""
        return next((step for step in self.steps if step > done), self.num_steps + 1) - done

    def __call__(self, done: int, x: Tensor, energies: Tensor) -> None:
        # A copy, as an engine may write its next ones there. NumPy's takes a microsecond, and torch's up to a hundred.
        self._energies.append(energies.numpy().copy() if energies.is_cpu else energies.clone())

    observe_block = __call__

    def callback(self, k: int, x: Tensor, info: Any) -> None:
        now = StepInfo(info.energy, self._free(info.gradient.detach()), info.before, info.after)
        self._norms.append(now.gradient_norm)
        if self._before is not None and self._before[0] == k - 1:
            _, before, settings = self._before
            self._pairs.append(self._pair(k - 1, settings, before, now))
        self._before = (
            k,
            now,
            self._at(self._state.schedule, k).double().clone(),
        )  # a copy: steps may shrink in place later

    # What was read ----------------------------------------------------------------------------------------------------

    @property
    def energies(self) -> Tensor:
        """Energies before each update, float32 (num_steps, B)."""
        rows = [torch.as_tensor(each, device=self._state.x.device) for each in self._energies]
        return torch.cat([row.reshape(-1, len(self._state.x)).float() for row in rows]) if rows else self._none

    @property
    def gradient_norms(self) -> Tensor:
        """`||grad E||` before the updates of `steps`, float32 (len(steps), B)."""
        return torch.stack(self._norms) if self._norms else self._none

    @property
    def step_curvatures(self) -> Tensor:
        """Step size times curvature along the step, of each update that a read one follows, float32 (n, B)."""
        return torch.stack([pair[0] for pair in self._pairs]) if self._pairs else self._none

    @property
    def acceptance(self) -> Tensor:
        """The Metropolis acceptance of these updates, float32 (n, B)."""
        return torch.stack([pair[1] for pair in self._pairs]) if self._pairs else self._none

    @property
    def _none(self) -> Tensor:
        return torch.empty(0, len(self._state.x), device=self._state.x.device)

    def _pair(self, k: int, settings: Tensor, first: StepInfo, second: StepInfo) -> Tensor:
        """Step size times curvature, and the acceptance, of update k with these settings, (2, B)."""
        step_size, noise_std = settings.unbind(-1)
        way = self._free(second.before - first.before)
        weight, share = self._weight(k, first), self._share(first)
        curvature = _dot(way, second.gradient - first.gradient) / _dot(way, way)
        (before, drift), (after, drift_back) = (self._potential(k, info) for info in (first, second))
        both, change = drift + drift_back, drift_back - drift
        # log of p(x') q(x | x') / (p(x) q(x' | x)) times the temperature, with both proposals multiplied out
        error = 0.5 * _dot(way, both) - 0.25 * step_size * _dot(both, change) - (after - before)
        accepted = (error * (2 * step_size / noise_std.square())).clamp(max=0).exp()
        accepted = torch.where(noise_std > 0, accepted, torch.nan)
        return torch.stack((step_size * (share * curvature + weight), accepted)).float()

    def _potential(self, k: int, info: StepInfo) -> tuple[Tensor, Tensor]:
        """What the chains descend on and how steeply: the energy with the data term, (B,), and the clipped gradient."""
        energy, drift = info.energy.double(), info.gradient
        if self.norm_clip is not None:
            drift = drift * _like(self._share(info), drift)
        if self._state.data_target is None:
            return energy, drift
        weight, apart = self._weight(k, info), self._free(info.before - self._state.data_target)
        return energy + 0.5 * weight * _dot(apart, apart), drift + _like(weight, apart) * apart

    def _weight(self, k: int, info: StepInfo) -> Tensor:
        """The weight of the data term where it pulls, else 0, (B,)."""
        target, weights = self._state.data_target, self._state.data_term_weight
        if target is None or weights is None:
            return torch.zeros((), dtype=torch.float64, device=info.before.device)
        apart = self._free(info.before - target)
        return self._at(weights, k).double() * (_dot(apart, apart) > self._state.data_term_hinge)

    def _share(self, info: StepInfo) -> Tensor:
        """The share of the gradient that a clip of its norm leaves, (B,)."""
        norm = info.gradient_norm.double()
        return torch.ones_like(norm) if self.norm_clip is None else (self.norm_clip / norm).clamp(max=1)

    def _free(self, values: Tensor) -> Tensor:
        """The values with 0 at known pixels."""
        return values if self._state.mask is None else values.masked_fill(self._state.mask, 0)

    def _at(self, table: Tensor, k: int) -> Tensor:
        """The row of a schedule for update k."""
        return table[(self._row + (k - 1)).clamp(max=len(table) - 1)]


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """The inner product of each pair of samples, float64 (B,)."""
    return (x * y).flatten(1).sum(1, dtype=torch.float64)


def _like(values: Tensor, x: Tensor) -> Tensor:
    """One value for each sample, for a product with x."""
    return values.to(x.dtype).reshape(-1, *(1,) * (x.dim() - 1))
