"""Step sizes and masses learned in a warm-up, and frozen before samples count.

Sources: dual averaging, Hoffman and Gelman, "The No-U-Turn sampler", JMLR 2014, section 3.2, whose constants these are;
step sizes by the variance of the energy error, arXiv 2412.08876; ensembles, LAPS, arXiv 2601.16696, which has ALPHA and
C; Welford's update of means and variances, Technometrics 1962.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastebm.sampling.diagnostics.accumulators import (
    mean_of_chains,
    merge_chains,
    ordered_dot,
    variance_of_chains,
)
from fastebm.scalars import as_real

GAMMA, T0, KAPPA = 0.05, 10.0, 0.75
# A step whose squared error is so many times its target was 10 times too long; the chain goes back.
LOST = 1e6
# Of one chain among many, no more is counted than this.
OUTLIER = 1e3
# How the log of a step size follows errors: within 1 / (6 GAIN) steps.
GAIN = 0.15
# So many errors make an average that may change a step size.
AT_LEAST = 10
# Where no step has an error, as on a plain without walls, steps grow no longer than this.
LONGEST = 1e12
# Of the ensemble: decoherence lengths over the root of the sum of variances, and how far the bias drives the error.
ALPHA, C = 1.9, 0.1


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


class ErrorSteps:
    """Step sizes h of chains at which the mean of error^2 / (target d) is 1, for energy errors over the temperature.

    In the first half of the steps, log h follows the errors by stochastic approximation, which leaves any start behind.
    The second half averages error^2 / h^6 instead, of which h is the inverse sixth root: there what h was matters not.
    """

    def __init__(self, target: float, dimensions: Tensor, pooled: bool, h: Tensor, num_steps: int) -> None:
        self.scale, self.pooled, self.search = 1 / (target * dimensions), pooled, num_steps // 2
        self.h = h
        self.ratios, self.seen = torch.zeros_like(h), torch.zeros_like(h)

    def add(self, error: Tensor, of: Tensor, skipped: Tensor) -> Tensor:
        """Adapts to the errors of steps of sizes `of`, but those that are skipped. Returns which steps failed."""
        value = error.square() * self.scale
        failed = ~(value < LOST) & ~skipped  # also where it is NaN
        value = torch.where(failed, LOST, value)
        halved = failed
        if self.pooled:
            share = mean_of_chains((~skipped).double())
            value = mean_of_chains(torch.where(skipped, 0.0, value.clamp(max=OUTLIER))) / share
            skipped, halved = share == 0, value == OUTLIER
        counted = ~skipped & ~halved
        if self.search > 0:
            moved = self.h * (GAIN * (1 - value)).clamp(min=-math.log(2)).exp()
        else:
            self.seen = torch.where(halved, 0.0, self.seen + counted.double())
            ratio = value.clamp(max=OUTLIER) / of**6
            mean = self.ratios + (ratio - self.ratios) / self.seen.clamp(min=1)
            self.ratios = torch.where(counted, mean, self.ratios)
            known = (self.seen >= AT_LEAST) & (self.ratios > 0)  # without any error there is nothing to go by
            moved = torch.where(known, self.ratios.clamp(min=1e-300) ** (-1 / 6), self.h)
        self.search -= 1
        self.h = torch.where(halved, self.h / 2, torch.where(counted, moved, self.h)).clamp(max=LONGEST)
        return failed


class EnsembleSteps:
    """Step size h and decoherence length of unadjusted chains of one target, from where all of them stand.

    Of chains that have arrived, the mean of grad E is 0 for each entry, and that of (x - mean) grad E is T. The bias b
    that is left is the mean over entries of what these squared are off, in units of T and of the masses, and h is the
    step whose error^2 / d is C b^(3/8): it shrinks as the chains arrive. The length is ALPHA times the root of the sum
    of variances. All sums have one order.
    """

    def __init__(self, x: Tensor, inverse_mass: Tensor | None, heat: Tensor, h: Tensor) -> None:
        self.shape = len(x), math.prod(x.shape[1:])
        self.heat, self.h, self.length = heat, h, torch.full_like(h, math.inf)
        self.dimensions = free_dimensions(x, inverse_mass)
        self.states, self.gradients = ChainMoments.of(x), ChainMoments.of(x)
        self.weights = self._weights(inverse_mass)

    def _weights(self, inverse_mass: Tensor | None) -> Tensor:
        """The masses of the first chain's entries, float64 `(1, N)`, 0 for those that are held."""
        weights = torch.ones(1, 1, dtype=torch.float64, device=self.h.device)
        if inverse_mass is not None:
            weights = torch.where(inverse_mass == 0, 0.0, 1 / inverse_mass.double())
        return weights[:1].expand(1, self.shape[1])

    def scales(self) -> Tensor:
        """The variances `(N,)` that masses are the inverse of, from all states since the last call: the root of that of
        the states over that of the gradients, which a normal distribution has wherever its chains stand. It is the
        choice of nutpie, which minimizes the Fisher divergence."""
        states, gradients = self.states.variance(), self.gradients.variance()
        self.states, self.gradients = (ChainMoments.of(self.states.mean) for _ in range(2))
        found = (states / gradients).sqrt()
        return torch.where(found.isfinite() & (found > 0), found, states)

    def take_masses(self, inverse_mass: Tensor) -> None:
        """Goes on with other masses, in whose coordinates an entry has about the scale 1."""
        self.weights = self._weights(inverse_mass)
        self.h = (0.25 * (self.dimensions[:1] * self.heat[:1]).sqrt()).expand_as(self.h)

    def add(self, x: Tensor, gradient: Tensor, error: Tensor, of: Tensor, skipped: Tensor) -> Tensor:
        """Adapts to states, their gradients, and the errors over the temperature of steps of size `of` that led there,
        but those that are skipped. Returns which steps failed."""
        self.states.add(x)
        self.gradients.add(gradient)
        flat, slope = x.reshape(self.shape).double(), gradient.reshape(self.shape).double()
        away, heat = flat - mean_of_chains(flat), self.heat[:, None]
        spread, shares = variance_of_chains(flat)[None], mean_of_chains(away * slope / heat)[None]
        shifts = mean_of_chains(slope / heat.sqrt())[None].square() / self.weights
        free = (self.weights > 0).double()
        bias = ordered_dot(torch.where(free > 0, (1 - shares).square() + shifts, 0.0)) / ordered_dot(free)
        wanted = C * bias.nan_to_num(nan=1.0).clamp(1e-12, 1e6) ** 0.375
        value = error.square() / (wanted * self.dimensions)
        failed = ~(value < LOST) & ~skipped  # also where it is NaN
        value = torch.where(skipped, 0.0, torch.where(failed, OUTLIER, value.clamp(max=OUTLIER)))
        share = mean_of_chains((~skipped).double())
        factor = (mean_of_chains(value) / share).clamp(min=1e-300) ** (-1 / 6)
        self.h = torch.where(share > 0, of * factor.clamp(0.3, 3.0), self.h).clamp(max=LONGEST)
        length = ALPHA * ordered_dot(spread, self.weights).sqrt()
        self.length = torch.maximum(torch.where(length.isfinite(), length, math.inf), self.h)
        return failed


def check_target(target: float) -> float:
    """A target of `ErrorSteps`. Raises ValueError for one that is not finite and positive."""
    target = as_real("target", target)
    if not (math.isfinite(target) and target > 0):
        raise ValueError(f"target must be finite and positive, got {target}")
    return target


def free_dimensions(x: Tensor, inverse_mass: Tensor | None) -> Tensor:
    """float64 (1,) or (B,): how many entries of a chain move."""
    elements = math.prod(x.shape[1:])
    if inverse_mass is None or inverse_mass.shape[1] == 1:
        return torch.full((1,), float(elements), dtype=torch.float64, device=x.device)
    return (inverse_mass != 0).sum(1).double()


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
