"""Chains up through the levels of a run from a start of one's own, with pixels pinned or pulled at each level.

`fastebm.Cascade` does the same from noise alone. Steps of the random numbers and rows of the schedule are those of a
whole cascade, also for chains that begin above the lowest level: from the same start they go the same way, bit by bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastebm.compiler import EnergyGradient
from fastebm.sampling import Langevin, implicit_step, linear
from fastebm.sampling.langevin import batch_slices
from fastebm.sampling.schedules import table


@dataclass(frozen=True)
class Climb:
    """How chains go up.

    Attributes:
        num_steps: updates at each level.
        step_size: of each.
        noise_start, noise_end: std of the noise, linear over all levels together.
        clamp: whether every update ends in [-1, 1]; enlarged images always do.
    """

    num_steps: int
    step_size: float = 1.0
    noise_start: float = 0.015
    noise_end: float = 0.0
    clamp: bool = False


@torch.no_grad()
def climb(
    levels: Mapping[int, EnergyGradient],
    start: Tensor,
    how: Climb,
    *,
    seed: int,
    chain_ids: int | Tensor = 0,
    pinned: Mapping[int, tuple[Tensor, Tensor]] | None = None,
    pulled: Mapping[int, tuple[Tensor, float]] | None = None,
    batch_size: int | None = None,
) -> dict[int, Tensor]:
    """The images at the end of each level, by size, from `start` (B, C, s, s), where s is one of the levels.

    Args:
        levels: by size, each twice the one below.
        seed, chain_ids, batch_size: as in `Langevin.sample`.
        pinned: by size, a mask of known pixels and their values.
        pulled: by size, a target and the weight of the pull towards it, as the anchor of `Langevin`, but in implicit
            updates (`implicit_step`).

    Raises FloatingPointError where energies or states are not finite, ValueError for a start of no level's size.
    """
    sizes = sorted(levels)
    if start.shape[3] not in sizes:
        raise ValueError(f"chains start at one of the levels, {sizes}, got images of size {start.shape[3]}")
    noise = linear(how.noise_start, how.noise_end)
    clamp = (-1.0, 1.0) if how.clamp else None
    x, ends = start, {}
    for place, size in enumerate(sizes):
        if size < start.shape[3]:
            continue
        if size != x.shape[3]:
            x = F.interpolate(x, (size, size), mode="nearest").clamp_(-1, 1)
        mask, known = (pinned or {}).get(size, (None, None))
        data_term = (pulled or {}).get(size)
        step_size = how.step_size if data_term is None else implicit_step(how.step_size, data_term[1])
        schedule = table(step_size, noise, how.num_steps * len(sizes))
        sampler = Langevin(levels[size], step_size, 0.0, clamp=clamp)
        held: dict[str, Any] = {"mask": mask, "known": known, "data_term": data_term}
        x = ends[size] = sampler.sample_segment(
            x, schedule, place * how.num_steps, how.num_steps, seed, chain_ids, batch_size=batch_size, **held
        )
    return ends


def energies_of(gradient: EnergyGradient, images: Tensor, batch_size: int | None = None) -> Tensor:
    """The energies (N,) of images (N, ...), so many at a time."""
    parts = [gradient(images[first:last])[0] for first, last in batch_slices(len(images), batch_size)]
    return torch.cat(parts)
