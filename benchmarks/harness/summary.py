"""The tables of README.md and docs/results/speed/README.md, out of committed rows.

Of each comparison of whole energies: how many times our time the best of tuned eager and `torch.compile` takes, and
eager as research code writes it. Tables stand between two marks, and nothing of them is typed in by hand.
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.harness.readme_sections import filled
from fastebm.evaluation.speed import Row, read_runs
from fastebm.evaluation.speed.baselines import RESEARCH, TORCH_COMPILE, TUNED
from fastebm.evaluation.speed.table import comparisons

ROOT = Path(__file__).resolve().parents[2]
WHOLE = ("chain_ids", "cascade", "training", "energy_gradient")


def ratio(group: list[Row], *names: str) -> float | None:
    """The least time of these peers over ours."""
    found = [row.ratio for row in group if row.baseline in names and row.ratio is not None]
    return min(found) if found else None


def line(group: list[Row]) -> str | None:
    """One comparison as a row of the table."""
    stock, research = ratio(group, TORCH_COMPILE, TUNED), ratio(group, RESEARCH)
    if stock is None or research is None:
        return None
    row = group[0]
    shape = "x".join(map(str, row.shape))
    return f"| {row.unit}, {row.case} {shape}, batch {row.batch}, {row.dtype} | {stock:.2f} | {research:.1f} |"


def summary(folder: Path) -> str:
    """The table of one machine."""
    rows = [row for path in sorted(folder.glob("*.json")) for run in read_runs(path) for row in run.rows]
    timed = [row for row in rows if row.suite in WHOLE and row.quantity == "seconds"]
    timed.sort(key=lambda row: (WHOLE.index(row.suite), row.case != "CF-EBM"))
    lines = [text for group in comparisons(timed).values() if (text := line(group)) is not None]
    head = [f"| {folder.name} | best of tuned eager and torch.compile | eager, research code |", "|---|---:|---:|"]
    return "\n".join([*head, *lines])


def compact(folder: Path) -> str:
    """CF-EBM's chains, cascades and training in two lines, for README.md."""
    rows = [row for name in WHOLE[:3] for run in read_runs(folder / f"{name}.json") for row in run.rows]
    rows.sort(key=lambda row: (WHOLE.index(row.suite), row.shape[-1], row.batch))
    groups = [group for group in comparisons(rows).values() if line(group) is not None]
    heads = [f"{g[0].suite} {'x'.join(map(str, g[0].shape[1:]))}, {g[0].batch}" for g in groups]
    stock = [f"{ratio(group, TORCH_COMPILE, TUNED):.1f}" for group in groups]
    research = [f"{ratio(group, RESEARCH):.0f}" for group in groups]
    table = [
        [f"{folder.name}, bfloat16, batch", *heads],
        ["---", *["---:"] * len(heads)],
        ["best of tuned eager and torch.compile", *stock],
        ["eager, research code", *research],
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in table)


def main() -> int:
    machines = [folder for folder in sorted((ROOT / "benchmarks" / "results").iterdir()) if folder.is_dir()]
    pages = {ROOT / "README.md": compact, ROOT / "docs" / "results" / "speed" / "README.md": summary}
    for path, form in pages.items():
        table = "\n\n".join(map(form, machines))
        path.write_text(filled(path.read_text(), "speed", Path(__file__).name, table))
        print(f"written: {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
