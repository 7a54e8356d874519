"""Images a second of several methods that are timed in interleaved rounds, as rows for a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastebm.evaluation.speed.measurement import Summary, ratios


def throughput_rows(times: Mapping[str, Sequence[float]], images: int) -> list[dict[str, Any]]:
    """A row for each method: images a second, and its time over that of the first method, with 20 and 80 % quantiles.

    `times` has the seconds of each round by method, in each of which `images` were made.
    """
    base = next(iter(times.values()))
    rows = []
    for method, seconds in times.items():
        row: dict[str, Any] = {"method": method}
        speeds = [images / value for value in seconds]
        for name, values in (("images_per_second", speeds), ("ratio", ratios(seconds, base))):
            summary = Summary.of(values)
            row |= {name: summary.median, f"{name}_low": summary.low, f"{name}_high": summary.high}
        rows.append(row | {"seconds": list(seconds)})
    return rows
