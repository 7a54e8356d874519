"""How improbable a score is: the upper tail of the scores of training images, and Fisher's combination of several.

Sources: Fisher, "Statistical Methods for Research Workers" (4th edition, 1932), section 21.1; Davison and Hinkley,
"Bootstrap Methods and their Application" (1997), section 4.2, for the estimate from counts; Pickands, "Statistical
Inference Using Extreme Order Statistics" (Annals of Statistics, 1975), for what lies beyond a high threshold.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

SHARE = 0.1
"""The share of the scores that lie above the threshold."""


@dataclass(frozen=True)
class UpperTail:
    """The probability that a score is at least so high: up to a threshold by a share of N scores, above it exponential.

    Attributes:
        scores: float64 (N,), ascending.
        threshold: what about a tenth of them lies above.
        share: that share, (0, 1).
        excess: their mean distance from the threshold, above 0.
    """

    scores: Tensor = field(repr=False)
    threshold: float
    share: float
    excess: float

    @classmethod
    def fit(cls, scores: Tensor) -> UpperTail:
        """The tail of scores (N,), N at least 2."""
        scores = scores.double().sort().values
        threshold = scores[-1 - max(1, round(SHARE * len(scores)))]
        if threshold == scores[-1] and scores[0] < threshold:  # the highest ones are equal
            threshold = scores[scores < threshold][-1]
        above = scores[scores > threshold] - threshold
        if not len(above):  # all are equal, so that there is no tail to be measured
            return cls(scores, float(threshold), 1 / (len(scores) + 1), 1.0)
        return cls(scores, float(threshold), len(above) / len(scores), float(above.mean()))

    def log_probability(self, scores: Tensor) -> Tensor:
        """Logarithms of the probabilities for scores (B,): float64, at most 0, never rising with the score."""
        scores = scores.double().contiguous()
        as_high = (len(self.scores) - torch.searchsorted(self.scores, scores)).double()
        counted = ((as_high + 1) / (len(self.scores) + 1)).log()
        exponential = math.log(self.share) - (scores - self.threshold) / self.excess
        # No lower than the share that is as high, which is 0 above the highest one: where scores are equal it is more.
        beyond = torch.maximum(exponential, (as_high / len(self.scores)).log())
        return torch.where(scores > self.threshold, beyond, counted)


def fisher(log_probabilities: Iterable[Tensor]) -> Tensor:
    """Fisher's statistic, -2 times the sum of logarithms of probabilities (B,), high where they are low together."""
    return -2 * torch.stack([*log_probabilities]).sum(0)
