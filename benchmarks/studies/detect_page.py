"""Fills the tables of docs/results/detect from what `fastebm detect` wrote: `detect_page.py [--keep OUT NAME]`.

OUT is the folder of a call; its numbers are kept as NAME.json first, with the names of files for where images lie.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from benchmarks.harness.readme_sections import filled

PAGE = Path(__file__).resolve().parents[2] / "docs" / "results" / "detect"


def table(path: Path) -> str:
    """AUROC, a row per score and a column per set, and the share of inliers lost where 95 % of outliers are found."""
    metrics = json.loads(path.read_text())["metrics"]
    sets = list(metrics)
    lines = [
        f"| AUROC (FPR@95) | {' | '.join(name.replace('_', ' ') for name in sets)} |",
        "|---|" + "---:|" * len(sets),
    ]
    for score in metrics[sets[0]]:
        cells = [f"{metrics[s][score]['auroc']:.3f} ({metrics[s][score]['fpr95']:.2f})" for s in sets]
        lines.append(f"| {score.replace('_', ' ')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def keep(out: Path, name: str) -> None:
    """Copies the numbers of a call, without the folders of paths."""
    (PAGE / f"{name}.json").write_text(re.sub(r"(?<![\w.])/\S*/", "", (out / "detect.json").read_text()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", nargs=2, metavar=("OUT", "NAME"))
    given = parser.parse_args()
    if given.keep:
        keep(Path(given.keep[0]), given.keep[1])
    readme = PAGE / "README.md"
    text = readme.read_text()
    for path in sorted(PAGE.glob("*.json")):
        text = filled(text, path.stem, Path(__file__).name, table(path))
    readme.write_text(text)


if __name__ == "__main__":
    main()
