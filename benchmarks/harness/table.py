"""Markdown from committed results: `python -m benchmarks.harness.table RESULT.json ...` prints it.

    python -m benchmarks.harness.table benchmarks/results --write docs/results/speed

writes a page for each machine's folder instead. Files of both formats are read: rows (see `fastebm.evaluation.speed`),
and the seconds of every round that earlier versions kept.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastebm.evaluation.speed import markdown, read_runs

READING = """\
Times are medians over rounds, with their 20 % and 80 % quantiles. `x ours` is a case's time over ours, the median of
the rounds' ratios: above 1 ours is faster. `gradient error` is relative to float64 autograd; `floor` the least time
that our program's FLOPs and bytes can take at the rates of a large matrix product and of a large copy in the same run,
over the time taken: bytes are counted as if each result went through memory, so a cache can make it more than 100 %."""


def page(path: Path) -> str:
    """One file as Markdown. Raises ValueError where it holds no results."""
    content = json.loads(path.read_text())
    if "comparisons" in content:
        return comparisons_page(content, path.name)
    return f"## {path.stem}\n\n{markdown(read_runs(path))}\n"


def comparisons_page(result: dict[str, Any], source: str) -> str:
    """A table for each comparison of the earlier format, whose ratios are medians of the rounds' as well."""
    facts = ", ".join(f"{name} {value}" for name, value in result["machine"].items() if value is not None)
    parts = [f"Made by `benchmarks/harness/table.py` from `{source}`.\n\n{facts}\n"]
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


def write_pages(results: Path, folder: Path) -> list[Path]:
    """A page for each machine under `results`, with the plots of it that lie in `folder`."""
    written = []
    folder.mkdir(parents=True, exist_ok=True)
    for machine in sorted(path for path in results.iterdir() if path.is_dir()):
        files = sorted(file for file in machine.glob("*.json") if file.stem != "stages")  # that has a page of its own
        if files:
            plots = [f"![{plot.stem}]({plot.name})" for plot in sorted(folder.glob(f"{machine.name}.*.png"))]
            source = f"Made by `make bench` from `benchmarks/results/{machine.name}`."
            parts = [f"# Speed: {machine.name}", source, READING, *plots, *(page(file).rstrip() for file in files)]
            written.append(folder / f"{machine.name}.md")
            written[-1].write_text("\n\n".join(parts) + "\n")
    return written


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="files, or with --write one folder of machines' folders")
    parser.add_argument("--write", type=Path, default=None, help="folder for pages")
    given = parser.parse_args(arguments)
    if given.write is None:
        sys.stdout.write("\n".join(page(path) for path in given.results))
        return
    for folder in given.results:
        for path in write_pages(folder, given.write):
            print(f"written: {path}")


if __name__ == "__main__":
    main()
