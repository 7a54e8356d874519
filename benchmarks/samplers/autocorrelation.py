"""How many effective samples a step of a chain is worth, by one estimate for all samplers.

The autocovariance is the mean over all chains, around the mean of all. Its sum is cut by Geyer's initial positive
sequence (Practical Markov chain Monte Carlo, Statistical Science 1992): pairs of neighbouring lags count up to the
first pair that is not positive.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from benchmarks.samplers.targets import SUMMARIES, Array, Target

# Means further than this from the truth, in standard errors, are no chance.
BIASED = 4.0


@dataclass(frozen=True)
class Quality:
    """What the traces of stationary chains tell of one step.

    Attributes:
        effective: effective samples a step and chain: the least over the summaries.
        worst: the summary that has the least.
        bias: the largest difference of a mean from the truth, in standard deviations of the target.
        error: that difference in its standard errors, the largest over the summaries.
        gradients: evaluations of the gradient a step.
        acceptance: the mean probability of acceptance; NaN for a sampler without a test.
    """

    effective: float
    worst: str
    bias: float
    error: float
    gradients: float
    acceptance: float

    @property
    def biased(self) -> bool:
        return not self.error <= BIASED

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def autocorrelation_time(values: Array) -> float:
    """The time of a trace (steps, chains): its sum of autocorrelations over all lags, in steps; at least 1e-3.

    Infinite for a trace that doesn't move or is not finite.
    """
    steps = len(values)
    centred = values - values.mean()
    if not np.isfinite(centred).all() or not centred.any():
        return np.inf
    spectrum = np.abs(np.fft.rfft(centred, 2 * steps, axis=0)) ** 2
    sums = np.fft.irfft(spectrum.mean(1), 2 * steps)[:steps]
    correlations = sums / (steps - np.arange(steps)) * (steps / sums[0])
    pairs = correlations[: steps // 2 * 2].reshape(-1, 2).sum(1)
    ends = np.flatnonzero(pairs <= 0)
    kept = pairs[: ends[0]] if len(ends) else pairs
    return max(1e-3, 2 * float(kept.sum()) - 1)


def quality(target: Target, traces: Array, gradients: float, acceptance: float) -> Quality:
    """Of traces (3, steps, chains) of the summaries, in their order."""
    traces = np.asarray(traces, dtype=np.float64)
    times = [autocorrelation_time(values) for values in traces]
    means, deviations, of_truth = target.truth
    of_chains = deviations * np.sqrt(np.array(times) / traces[0].size)
    away = np.abs(traces.mean((1, 2)) - means)
    errors = away / np.sqrt(of_chains**2 + of_truth**2)
    slowest = int(np.argmax(times))
    return Quality(
        1 / times[slowest],
        SUMMARIES[slowest],
        float((away / deviations).max()),
        float(errors.max()) if np.isfinite(traces).all() else np.inf,
        gradients,
        acceptance,
    )


def step_seconds(block: Callable[[int], float]) -> float:
    """About the time of a step, from `block(steps)`, which gives the seconds of a block; the fastest of some."""
    steps, seconds = 1, min(block(1), block(1))
    while seconds < 0.02 and steps < 4096:
        steps *= 4
        seconds = min(block(steps), block(steps))
    return seconds / steps
