"""R-hat, nested R-hat and effective sample sizes, from what accumulators keep of chains.

Gelman and Rubin, "Inference from iterative simulation", 1992, with split chains and the combination of chains of
Vehtari, Gelman, Simpson, Carpenter, Bürkner, "Rank-normalization, folding, and localization: an improved R-hat", 2021.
Ranks need all draws at once, so that these are the forms without ranks. Nested R-hat: Margossian, Hoffman, Sountsov,
Riou-Durand, Vehtari, Gelman, "Nested R-hat: assessing the convergence of MCMC when running many short chains", 2023.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastebm.sampling.diagnostics.accumulators import Moments, in_turn, mean_of_chains, variance_of_chains


class SampleSize(NamedTuple):
    """Effective sample sizes, and where the autocorrelation was still positive at the end of the window, so that they
    are bounds from above."""

    size: Tensor
    bound: Tensor


def rhat(count: int, means: Tensor, variances: Tensor) -> Tensor:
    """R-hat of chains, or halves of chains, of `count` values each, from their means and unbiased variances `(C, S)`.

    `(S,)`; NaN where there is one chain, fewer than two values, or nothing moved.
    """
    within = mean_of_chains(variances)
    return ((count - 1) / count + variance_of_chains(means) / within).sqrt()


def split_rhat(halves: tuple[Moments, Moments]) -> Tensor:
    """R-hat of the halves of chains, `(S,)`. One chain suffices."""
    first, second = halves
    means, variances = (torch.cat(pair) for pair in ((first.mean, second.mean), (first.variance, second.variance)))
    return rhat(int(first.count), means, variances)


def drift(halves: tuple[Moments, Moments]) -> tuple[Tensor, Tensor]:
    """How far the mean over the chains moved from their first to their second half, and its standard error, `(S,)`.

    In standard deviations, those within the chains and between them: chains that only disagree, each around its own
    place, do not drift. The error is from the chains' own ways, and NaN for one chain.
    """
    first, second = halves
    middle, ways = (first.mean + second.mean) / 2, second.mean - first.mean
    spread = mean_of_chains((first.variance + second.variance) / 2)
    if len(middle) > 1:
        spread = spread + variance_of_chains(middle)
    scale = spread.sqrt()
    return mean_of_chains(ways) / scale, (variance_of_chains(ways) / len(ways)).sqrt() / scale


def nested_rhat(whole: Moments, superchains: Tensor) -> Tensor:
    """Nested R-hat of chains that start in groups from one point each, `(S,)`.

    Args:
        whole: of each chain `(B, S)`.
        superchains: `(B,)` the number of each chain's group, 0 to K - 1, as many chains in each.

    NaN for fewer than two groups.
    """
    groups = int(superchains.max()) + 1
    order = superchains.argsort(stable=True)
    means = whole.mean[order].unflatten(0, (groups, -1)).transpose(0, 1)
    within = torch.zeros_like(means[0])
    if whole.count > 1:
        within = mean_of_chains(whole.variance[order].unflatten(0, (groups, -1)).transpose(0, 1))
    if len(means) > 1:
        within = within + variance_of_chains(means)
    return (1 + variance_of_chains(mean_of_chains(means)) / mean_of_chains(within)).sqrt()


def pooled_sample_size(autocovariances: Tensor, whole: Moments) -> SampleSize:
    """The effective sample size of all chains together, `(S,)`, from autocovariances `(1 + K, B, S)` of each.

    What the chains' means differ by counts as correlation that never ends.
    """
    n, chains = float(whole.count), whole.mean.shape[0]
    mean_covariances = mean_of_chains(autocovariances.transpose(0, 1))
    within = mean_covariances[0] * n / (n - 1 or math.nan)
    total = mean_covariances[0]
    if chains > 1:
        total = total + variance_of_chains(whole.mean)
    return _sample_size(1 - (within - mean_covariances) / total, n * chains)


def chain_sample_sizes(autocovariances: Tensor, whole: Moments) -> SampleSize:
    """The effective sample size of each chain on its own, `(B, S)`, from the same."""
    n = float(whole.count)
    within = autocovariances[0] * n / (n - 1 or math.nan)
    return _sample_size(1 - (within - autocovariances) / autocovariances[0], n)


def _sample_size(correlations: Tensor, draws: float) -> SampleSize:
    """Draws over their integrated autocorrelation time, by Geyer's initial monotone sequence of sums of neighbours
    (Geyer, "Practical Markov chain Monte Carlo", 1992). `correlations[0]` stands for 1."""
    correlations = torch.cat((torch.ones_like(correlations[:1]), correlations[1:]))
    pairs = correlations[: len(correlations) // 2 * 2].unflatten(0, (-1, 2))
    if not len(pairs):
        nan = torch.full_like(correlations[0], math.nan)
        return SampleSize(nan, torch.zeros_like(nan, dtype=torch.bool))
    sums = pairs[:, 0] + pairs[:, 1]
    positive = (sums > 0).cumprod(0)
    monotone = torch.where(positive > 0, sums, 0.0).cummin(0).values
    time = 2 * in_turn(monotone) - 1
    # The first correlation behind the sequence counts once, if it is positive (Vehtari et al.).
    ends = torch.cat((torch.zeros_like(positive[:1]), positive[:-1] - positive[1:]))
    time = time + in_turn(ends * pairs[:, 0].clamp(min=0))
    time = time.clamp(min=1 / math.log10(max(draws, 10)))
    size = torch.where(correlations.isfinite().all(0), draws / time, math.nan)
    return SampleSize(size, positive[-1] > 0)


def batch_means_sample_size(means: Tensor, variance: Tensor) -> Tensor:
    """The effective sample size, `(S,)`, that the means `(M, B, S)` of equal blocks of chains tell.

    Where blocks are longer than the correlation, each is worth `variance / variance of the means` draws. NaN for a
    single block.
    """
    blocks = means.flatten(0, 1)
    return len(blocks) * variance / variance_of_chains(blocks)
