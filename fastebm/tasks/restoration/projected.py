"""Langevin chains that are projected after every update, alone and in the levels of a cascade."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastebm.sampling import Langevin
from fastebm.sampling.cascade import Level, LevelSampler
from fastebm.sampling.observers import Observer
from fastebm.sampling.state import ChainState, StepInfo

Projection = Callable[[Tensor], Tensor]


class ProjectedLangevin(Langevin):
    """`Langevin` with `project`, images (B, C, H, W) -> images, applied after each update, behind the clamp.

    A projection of whole batches, in their order: `sample` must not be given a `batch_size`. Updates are not replayed
    from CUDA graphs.

    Example:
        >>> import torch
        >>> sampler = ProjectedLangevin(lambda x: 0.5 * x.square().sum(1), 0.1, 0.0, project=lambda x: x.clamp(min=1))
        >>> sampler.sample(torch.full((1, 2), 3.0), 50, seed=0)
        tensor([[1., 1.]])
    """

    def __init__(self, *arguments: Any, project: Projection, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.project = project

    @classmethod
    def of(cls, sampler: Langevin, project: Projection) -> ProjectedLangevin:
        """`sampler` with its settings and its gradient, projected."""
        return cls(
            sampler.gradient,
            sampler.step_size,
            sampler.noise_std,
            clamp=sampler.clamp,
            grad_clip=sampler.grad_clip,
            grad_norm_clip=sampler.grad_norm_clip,
            project=project,
        )

    @torch.no_grad()
    def step(self, state: ChainState) -> tuple[ChainState, StepInfo]:
        after, info = super().step(state)
        after = replace(after, x=self.project(after.x))
        return after, replace(info, after=after.x)

    @torch.no_grad()
    def advance_(self, state: ChainState, num_steps: int, observers: Sequence[Observer] = ()) -> ChainState:
        energies: list[Tensor] = []

        def keep(_: int, x: Tensor, before: Tensor) -> None:
            energies[:] = [before]

        with self.gradient.chain():
            for done in range(1, num_steps + 1):
                state = super().advance_(state, 1, [keep])
                state.x.copy_(self.project(state.x))
                for observe in observers:
                    observe(done, state.x, energies[0])
        return state


class ProjectedCascade(LevelSampler):
    """`cascade` with a projection in each level that has one in `projections`, by size.

    Of whole batches: `sample` must not be given a `batch_size`.
    """

    def __init__(self, cascade: LevelSampler, projections: Mapping[int, Projection]) -> None:
        super().__init__(cascade.step_size, cascade.noise_std, cascade.clamp_levels)
        self._schedule = cascade.schedule
        self._levels = [
            replace(level, sampler=ProjectedLangevin.of(level.sampler, projections[level.size]))
            if level.size in projections
            else level
            for level in cascade.levels
        ]

    @property
    def levels(self) -> list[Level]:
        return list(self._levels)

    @property
    def schedule(self) -> Tensor:
        return self._schedule
