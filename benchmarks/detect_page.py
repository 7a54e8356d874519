"""Fills the tables of docs/results/detect from what `fastebm detect` wrote: `python benchmarks/detect_page.py`."""

from __future__ import annotations

import json
from pathlib import Path

from marks import filled

PAGE = Path(__file__).resolve().parents[1] / "docs" / "results" / "detect"


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


def main() -> None:
    readme = PAGE / "README.md"
    text = readme.read_text()
    for path in sorted(PAGE.glob("*.json")):
        text = filled(text, path.stem, Path(__file__).name, table(path))
    readme.write_text(text)


if __name__ == "__main__":
    main()
