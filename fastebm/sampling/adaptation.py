"""Step sizes and masses learned in a warm-up, and frozen before samples count.

Sources: dual averaging, Hoffman and Gelman, "The No-U-Turn sampler", JMLR 2014, section 3.2, whose constants these are;
Welford's update of means and variances, Technometrics 1962.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastebm.sampling.diagnostics.accumulators import mean_of_chains, merge_chains

GAMMA, T0, KAPPA = 0.05, 10.0, 0.75


class DualAveraging:
    """Step sizes that lead to a target acceptance, one for each chain, or one for all.

    Chains adapt by themselves, so that their bits don't depend on their neighbours, unless `pooled`: then all have the
    mean acceptance in common, which is added up in one order.
    """

    def __init__(self, steps: Tensor, target: float, pooled: bool) -> None:
        self.target, self.pooled = target, pooled
        self.centre = (10 * steps).log()
        self.steps = steps
        self.average = steps.log()
        self.error = torch.zeros_like(steps)
        self.count = 0

    def update(self, acceptance: Tensor) -> Tensor:
        """The step sizes float64 `(B,)` for the next step, after one with these acceptance probabilities."""
        if self.pooled:
            acceptance = mean_of_chains(acceptance).expand_as(acceptance)
        self.count += 1
        m = float(self.count)
        share = 1 / (m + T0)
        self.error = (1 - share) * self.error + share * (self.target - acceptance)
        logarithm = self.centre - math.sqrt(m) / GAMMA * self.error
        weight = m**-KAPPA
        self.average = weight * logarithm + (1 - weight) * self.average
        self.steps = logarithm.exp()
        return self.steps

    def averaged(self) -> Tensor:
        """The step sizes to keep."""
        return self.average.exp() if self.count else self.steps

    def restart(self) -> None:
        """Begins anew around the averaged step sizes, as after a change of masses."""
        self.__init__(self.averaged(), self.target, self.pooled)  # type: ignore[misc]


@dataclass
class ChainMoments:
    """Means and summed squares of all entries of chains, float64, each chain for itself until `variance`."""

    count: int
    mean: Tensor
    squares: Tensor

    @classmethod
    def of(cls, x: Tensor) -> ChainMoments:
        """Of no states yet, for states like x, `(B, ...)`."""
        zeros = torch.zeros(x.shape[0], x[:1].numel(), dtype=torch.float64, device=x.device)
        return cls(0, zeros, zeros.clone())

    def add(self, x: Tensor) -> None:
        """Counts one more state of each chain."""
        flat = x.reshape(self.mean.shape).double()
        self.count += 1
        away = flat - self.mean
        self.mean = self.mean + away / self.count
        self.squares = self.squares + away * (flat - self.mean)

    def variance(self) -> Tensor:
        """Of each entry over all states of all chains, `(N,)`, float64."""
        variance = merge_chains(self.count, self.mean, self.squares).variance
        assert isinstance(variance, Tensor)
        return variance
