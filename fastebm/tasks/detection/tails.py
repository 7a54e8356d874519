"""How improbable a score is: the upper tail of the scores of training images, and Fisher's combination of several.

Sources: Fisher, "Statistical Methods for Research Workers" (4th edition, 1932), section 21.1; Davison and Hinkley,
"Bootstrap Methods and their Application" (1997), section 4.2, for the estimate from counts; Pickands, "Statistical
Inference Using Extreme Order Statistics" (Annals of Statistics, 1975), for what lies beyond a high threshold.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

SHARE = 0.1
"""The share of the scores that lie above the threshold."""


@dataclass(frozen=True)
class UpperTail:
    """The probability that a score is at least so high: up to a threshold by a share of N scores, above it exponential.

    Attributes:
        scores: float64 (N,), ascending.
        threshold: what a tenth of them lies above.
        share: that share, (0, 1).
        excess: their mean distance from the threshold, above 0.
    """

    scores: Tensor
    threshold: float
    share: float
    excess: float

    @classmethod
    def fit(cls, scores: Tensor) -> UpperTail:
        """The tail of scores (N,), N at least 2."""
        scores = scores.double().sort().values
        above = min(max(1, round(SHARE * len(scores))), len(scores) - 1)
        threshold = float(scores[-above - 1])
        excess = float((scores[-above:] - threshold).mean())
        # Equal scores, as those of very few images, have no tail that could be measured.
        return cls(scores, threshold, above / len(scores), excess or float(scores.std()) or 1.0)

    def log_probability(self, scores: Tensor) -> Tensor:
        """Logarithms of the probabilities for scores (B,): float64, at most 0, never rising with the score."""
        scores = scores.double().contiguous()
        as_high = len(self.scores) - torch.searchsorted(self.scores, scores)
        counted = ((as_high + 1) / (len(self.scores) + 1)).log()
        beyond = torch.tensor(self.share, dtype=torch.float64, device="cpu").log()
        return torch.where(
            scores > self.threshold, beyond - (scores - self.threshold) / self.excess, counted.to(torch.float64)
        )


def fisher(log_probabilities: Iterable[Tensor]) -> Tensor:
    """Fisher's statistic, -2 times the sum of logarithms of probabilities (B,), high where they are low together."""
    return -2 * torch.stack([*log_probabilities]).sum(0)
