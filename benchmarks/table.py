"""Turns a benchmark run's raw figures into a Markdown page: `python benchmarks/table.py RESULT.json > RESULT.md`."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any


def page(result: dict[str, Any], source: str) -> str:
    """A table for each comparison. Times are medians over rounds; ratios are medians of the rounds' ratios to ours."""
    facts = ", ".join(f"{name} {value}" for name, value in result["machine"].items() if value is not None)
    parts = [f"Made by `benchmarks/table.py` from `{source}`.\n\n{facts}\n"]
    for comparison in result["comparisons"]:
        rounds = len(comparison["seconds"][comparison["ours"]])
        parts.append(f"\n## {comparison['title']}\n\n{comparison['device']}, {rounds} rounds\n")
        parts.append("| case | median, µs | 10th to 90th percentile | time over ours |\n|---|---|---|---|")
        for name, seconds in comparison["seconds"].items():
            tenths = [1e6 * value for value in statistics.quantiles(seconds, n=10)]
            median = 1e6 * statistics.median(seconds)
            ratio = comparison["ratio_to_ours"][name]
            parts.append(f"| {name} | {median:.1f} | {tenths[0]:.1f} to {tenths[-1]:.1f} | {ratio:.2f} |")
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    path = Path(sys.argv[1])
    sys.stdout.write(page(json.loads(path.read_text()), path.name))
