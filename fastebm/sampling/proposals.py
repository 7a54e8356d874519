"""Samplers of your own with a Metropolis test: a proposal and its probabilities become a whole sampler."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from fastebm import rng
from fastebm.ops import metropolis_
from fastebm.sampling.diagnostics.accumulators import ordered_dot
from fastebm.sampling.metropolis import PositionSampler, key_increment, positive_schedules
from fastebm.sampling.sampler import Energy, EnergyState
from fastebm.sampling.schedules import Schedule
from fastebm.scalars import as_int, shown

# Kinds of noise that each of the two laws has: half of the streams that are nobody else's.
_USES = 64


class StepNoise:
    """The random numbers of one step of chains: a pure function of seed, step, chain id, use and entry."""

    def __init__(self, state: EnergyState) -> None:
        self._x, self._key, self._chain_ids = state.x, state.key, state.chain_ids

    def normal(self, use: SupportsIndex = 0) -> Tensor:
        """Standard normal numbers, shape and dtype of the states; each `use` in [0, 64) has numbers of its own."""
        return self._draw(torch.ops.fastebm.normal, use, 0)

    def uniform(self, use: SupportsIndex = 0) -> Tensor:
        """Numbers in (0, 1], likewise; those of all uses are independent of those of `normal`."""
        return self._draw(torch.ops.fastebm.uniform, use, _USES)

    def _draw(self, operator: Any, use: SupportsIndex, first: int) -> Tensor:
        if not 0 <= as_int("use", use) < _USES:
            raise ValueError(f"use must be in [0, {_USES}), got {use}")
        stream = rng.own_stream(first + int(use))
        drawn: Tensor = operator(list(self._x.shape), self._key, self._chain_ids, stream, self._x.dtype)
        return drawn


class ProposalSampler(PositionSampler):
    """A base for samplers of your own: say how a step is proposed, and it samples `p(x) ~ exp(-E(x) / T)` exactly.

    A subclass writes `propose`, and `log_proposal_ratio` where proposals are not symmetric. From this class it has the
    Metropolis test, kept energies, `init`, `step`, `advance`, `sample`, saved states, masks, conditions, diagnostics,
    and `warm_up` of step sizes, which aims at the class attribute `target_acceptance`. A step costs one evaluation of
    the energy's gradient.

    Args:
        energy: as `Langevin` takes it; a score alone can't be tested.
        step_size: a positive number, a schedule, or a tensor with one for each chain; what it means is the subclass's.
        temperature: T, likewise.
        dtype, engine, reproducible: passed to `energy_gradient`.

    Raises ValueError or TypeError for options out of range, and for proposals of another shape than the states.

    Example:
        >>> import torch, fastebm
        >>> class RandomWalk(fastebm.sampling.ProposalSampler):
        ...     target_acceptance = 0.234
        ...     def propose(self, x, gradient, step_size, noise):
        ...         return x + step_size * noise.normal()
        >>> walk = RandomWalk(lambda x: 0.5 * x.square().sum(1), step_size=1.5)
        >>> x = walk.sample(torch.zeros(4000, 2), num_steps=100, seed=1)
        >>> bool((x.std(0) - 1).abs().max() < 0.05)
        True
    """

    target_acceptance = 0.4

    def __init__(
        self,
        energy: Energy,
        step_size: float | Tensor | Schedule,
        *,
        temperature: float | Tensor | Schedule = 1.0,
        dtype: torch.dtype | None = None,
        engine: str = "auto",
        reproducible: bool = True,
    ) -> None:
        super().__init__(energy, step_size, temperature, dtype, engine, reproducible)

    @abstractmethod
    def propose(self, x: Tensor, gradient: Tensor, step_size: Tensor, noise: StepNoise) -> Tensor:
        """The proposals, `(B, ...)` like x, which must not be written to.

        Args:
            x: the states `(B, ...)`, float32 or float64.
            gradient: that of E / T at x, like x.
            step_size: in x's dtype, `(1, 1, ...)` or `(B, 1, ...)`, which broadcasts to x.
            noise: draws the random numbers of the step.
        """

    def log_proposal_ratio(
        self, x: Tensor, gradient: Tensor, proposal: Tensor, proposal_gradient: Tensor, step_size: Tensor
    ) -> Tensor | float:
        """`log q(x | proposal) - log q(proposal | x)`: as `(B,)`, or like x with a term for each entry; 0 by default.

        Terms of entries that a mask holds fixed are left out, and the others added up in a fixed order, in float64.
        `proposal_gradient` is that of E / T at the proposal; the other arguments are those of `propose`.
        """
        return 0.0

    def __repr__(self) -> str:
        options = f"step_size={self.step_size!r}, temperature={self.temperature!r}"
        return f"{type(self).__name__}({self.gradient!r}; {options})"

    def _table(self, rows: int) -> Tensor:
        columns = positive_schedules(rows, step_size=self.step_size, temperature=self.temperature)
        return torch.stack(columns, dim=-1).float()

    def _table_of(self, state: EnergyState, steps: Tensor) -> Tensor:
        return torch.stack((steps, state.schedule[0, :, 1].double()), dim=-1).float()[None]

    def _updater(self, state: EnergyState) -> Callable[[], Any]:
        one, noise = key_increment(state.key), StepNoise(state)
        x, (energy, gradient) = state.x, state.kept
        by_chain = (-1, *(1,) * (x.dim() - 1))

        def update() -> tuple[Tensor, Tensor]:
            row = state.schedule[state.key[2].clamp(max=len(state.schedule) - 1)]
            step_size, temperature = (row[..., i].to(x.dtype).reshape(by_chain) for i in (0, 1))
            at_x = gradient / temperature
            proposal = self._proposed(x, at_x, step_size, noise)
            if state.mask is not None:
                proposal = torch.where(state.mask, x, proposal)
            found, slope = self._energy_gradient(state, proposal)
            terms = self.log_proposal_ratio(x, at_x, proposal, slope / temperature, step_size)
            energies = energy.double() - found.double()
            ratio = energies / row[..., 1].double() + self._summed(state, terms)
            accepted = metropolis_(
                x, energy, gradient, proposal, found, slope, ratio, key=state.key, chain_ids=state.chain_ids
            )
            state.key.add_(one)
            return accepted, ratio

        return update

    def _proposed(self, x: Tensor, gradient: Tensor, step_size: Tensor, noise: StepNoise) -> Tensor:
        before = 0 if x.is_inference() else x._version
        given = self.propose(x, gradient, step_size, noise)
        name = f"{type(self).__name__}.propose"
        if not isinstance(given, Tensor) or given.shape != x.shape or not given.dtype.is_floating_point:
            raise ValueError(f"{name} must give a floating-point tensor {tuple(x.shape)}, got {shown(given)}")
        if not x.is_inference() and x._version != before:
            raise ValueError(f"{name} wrote to x, the chains' states; it must give a new tensor")
        return given.to(x.dtype).contiguous()

    def _summed(self, state: EnergyState, terms: Tensor | float) -> Tensor | float:
        """The logarithm of the proposals' ratio, float64 `(B,)` or a number."""
        x = state.x
        if not isinstance(terms, (Tensor, int, float)):
            raise ValueError(
                f"{type(self).__name__}.log_proposal_ratio must give a tensor or a number, got {shown(terms)}"
            )
        if not isinstance(terms, Tensor):
            return float(terms)
        if terms.shape == x.shape[:1]:
            return terms.double()
        if terms.shape != x.shape:
            raise ValueError(
                f"{type(self).__name__}.log_proposal_ratio must give ({len(x)},) or {tuple(x.shape)}, "
                f"got {shown(terms)}"
            )
        return ordered_dot(terms if state.mask is None else terms.masked_fill(state.mask, 0))


__all__ = ["ProposalSampler", "StepNoise"]
