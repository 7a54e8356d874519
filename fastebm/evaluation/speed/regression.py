"""Whether a revision is slower than another one by more than noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastebm.evaluation.speed.measurement import Summary, ratios

# Medians of one and the same code differ by a few per cent between two runs on a shared machine.
LIMIT = 1.10


@dataclass(frozen=True)
class Verdict:
    """The rounds' ratios, time now over time at the base revision, and what follows from them."""

    ratio: Summary
    limit: float = LIMIT

    @property
    def regressed(self) -> bool:
        """The median is beyond the limit, and even the 20 % quantile is above 1: most rounds agree on it."""
        return self.ratio.median > self.limit and self.ratio.low > 1.0

    def __str__(self) -> str:
        said = "REGRESSION" if self.regressed else "no regression"
        return f"{self.ratio.median:.3f} ({self.ratio.low:.3f} to {self.ratio.high:.3f}) of the base's time: {said}"


def verdict(now: Sequence[float], base: Sequence[float], limit: float = LIMIT) -> Verdict:
    """Compares seconds of interleaved rounds, as many of one as of the other."""
    return Verdict(Summary.of(ratios(now, base)), limit)
