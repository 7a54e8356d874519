"""Scalar summaries of states: the numbers whose mixing stands for that of the states."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fastebm.ops.normal import normal
from fastebm.rng import Stream, make_key
from fastebm.sampling.diagnostics.accumulators import ordered_dot
from fastebm.scalars import as_count, shown

Summary = Callable[[Tensor], Tensor]
"""A function from states `(B, ...)` to a number for each, `(B,)`."""


class Scalars:
    """The mean, the norm and random projections of states, and functions of the user.

    A projection is the product with a fixed random direction of norm 1. Its noise is addressed by the seed, so that it
    is the same in every batch and process, and has a stream of its own.

    Args:
        summaries: functions by name.
        projections: the number of random projections, 0 or more.
        seed: of their directions.
    """

    def __init__(self, summaries: Mapping[str, Summary] | None, projections: int, seed: int) -> None:
        self.projections = as_count("projections", projections)
        make_key(seed)
        self.seed = seed
        if summaries is not None and not isinstance(summaries, Mapping):
            raise TypeError(f"summaries must be a mapping from names to functions, got {shown(summaries)}")
        self.summaries = dict(summaries or {})
        for name, function in self.summaries.items():
            if not isinstance(name, str) or not callable(function):
                raise TypeError(f"summaries must map names to functions, got {shown(name)}: {shown(function)}")
        own = ["mean", "norm", *(f"projection {k + 1}" for k in range(self.projections))]
        if taken := sorted(set(self.summaries) & {"energy", *own}):
            raise ValueError(f"the summaries have names of their own: {', '.join(taken)} is there already")
        self.names = (*own, *self.summaries)
        self._directions: tuple[int, Tensor] | None = None

    def __call__(self, x: Tensor) -> list[Tensor]:
        """float64 `(B,)` for each name. Raises TypeError or ValueError where a function gives anything else."""
        elements = math.prod(x.shape[1:])
        found = [ordered_dot(x) / elements, ordered_dot(x, x).sqrt()]
        found += [ordered_dot(x, direction[None]) for direction in self._along(elements, x.device)]
        for name, function in self.summaries.items():
            value = function(x)
            if not isinstance(value, Tensor) or value.is_complex():
                raise TypeError(f"the summary {name!r} must give a tensor of real numbers, got {shown(value)}")
            if value.shape != x.shape[:1]:
                raise ValueError(
                    f"the summary {name!r} must give one number for each of {len(x)} states, shape ({len(x)},), got "
                    f"{tuple(value.shape)}"
                )
            found.append(value.detach().to(x.device, torch.float64))
        return found

    def _along(self, elements: int, device: torch.device) -> Tensor:
        """The directions of the projections, float64 `(projections, elements)`."""
        kept = self._directions
        if kept is None or kept[0] != elements or kept[1].device != device:
            noise = normal((self.projections, elements), seed=self.seed, stream=Stream.PROJECTION, device="cpu")
            directions = noise.double() / ordered_dot(noise, noise).sqrt()[:, None]
            self._directions = kept = elements, directions.to(device)
        return kept[1]
