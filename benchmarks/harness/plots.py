"""Plots of committed results: `python -m benchmarks.harness.plots benchmarks/results docs/results/speed`.

For each machine's folder, where it has the rows: how many times the peers' times ours is (MACHINE.ratios.png), the time
of a Langevin update over the resolution (MACHINE.chains.png), and peak memory (MACHINE.memory.png).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastebm.evaluation.speed import Row, read_runs
from fastebm.evaluation.speed.baselines import RESEARCH, TORCH_COMPILE, TORCHEBM, TUNED
from fastebm.evaluation.speed.rows import OURS
from fastebm.evaluation.speed.table import comparisons

COLOURS = {OURS: "tab:red", TORCH_COMPILE: "tab:blue", TUNED: "tab:green", TORCHEBM: "tab:orange", RESEARCH: "tab:gray"}
WHOLE = ("energy_gradient", "chain_ids", "cascade", "training")


def ratios(rows: list[Row]) -> Figure | None:
    """A group of bars for each comparison of whole energies, a bar for each peer."""
    groups = list(comparisons(row for row in rows if row.suite in WHOLE and row.quantity == "seconds").values())
    if not groups:
        return None
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.75 * len(groups)), layout="constrained")
    names = [name for name in COLOURS if name != OURS]
    for place, group in enumerate(groups):
        for offset, name in enumerate(names):
            row = next((row for row in group if row.baseline == name and row.ratio is not None), None)
            if row is not None:
                y = place + 0.2 * (offset - (len(names) - 1) / 2)
                axes.barh(y, row.ratio - 1, height=0.18, left=1, color=COLOURS[name], label=name)
                side = "left" if row.ratio >= 1 else "right"
                axes.text(row.ratio, y, f" {row.ratio:.2g} ", va="center", ha=side, fontsize=7)
    axes.axvline(1, color=COLOURS[OURS], label=OURS)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.margins(x=0.1)
    axes.set_yticks(range(len(groups)), [_label(group[0]) for group in groups], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("time over that of fastebm")
    _legend(axes)
    return figure


def chain_ids(rows: list[Row]) -> Figure | None:
    """The time of one update of one chain over the resolution, a line for each peer."""
    found = [row for row in rows if row.suite == "chain_ids" and row.dtype == "bfloat16" and row.median is not None]
    sizes = sorted({row.shape[-1] for row in found})
    if len(sizes) < 2:
        return None
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, colour in COLOURS.items():
        # The largest batch of each size is where all run best.
        best = {row.shape[-1]: row for row in sorted(found, key=lambda row: row.batch) if row.baseline == name}
        points = [(size, 1e3 * (best[size].median or 0) / best[size].batch) for size in sizes if size in best]
        axes.plot(*zip(*points, strict=True), marker="o", color=colour, label=name) if points else None
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sizes, [f"{size}x{size}" for size in sizes])
    axes.set_ylabel("ms for one update of one image (bfloat16)")
    _legend(axes)
    return figure


def memory(rows: list[Row]) -> Figure | None:
    """Peak memory of a gradient, a group of bars for each comparison."""
    groups = list(comparisons(row for row in rows if row.quantity == "bytes").values())
    if not groups:
        return None
    figure, axes = plt.subplots(figsize=(6, 1.2 + 0.6 * len(groups)), layout="constrained")
    for place, group in enumerate(groups):
        for offset, row in enumerate(group):
            axes.barh(
                place + 0.3 * offset, (row.median or 0) / 2**20, 0.28, color=COLOURS[row.baseline], label=row.baseline
            )
    axes.set_yticks([place + 0.15 for place in range(len(groups))], [_label(group[0]) for group in groups], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("peak memory of one gradient, MiB")
    _legend(axes)
    return figure


def _label(row: Row) -> str:
    return f"{row.suite.replace('_', ' ')}: {row.case}\n{'x'.join(map(str, (row.batch, *row.shape)))}, {row.dtype}"


def _legend(axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axes.legend(unique.values(), unique.keys(), fontsize=8)


def draw(results: Path, folder: Path) -> list[Path]:
    """All plots of all machines' folders under `results`; a machine without rows for one gets none."""
    kinds: Iterable[Callable[[list[Row]], Figure | None]] = (ratios, chain_ids, memory)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for machine in sorted(path for path in results.iterdir() if path.is_dir()):
        files = sorted(file for file in machine.glob("*.json") if file.stem != "stages")  # that has a page of its own
        rows = [row for file in files for run in read_runs(file) for row in run.rows]
        for kind in kinds:
            figure = kind(rows)
            if figure is not None:
                written.append(folder / f"{machine.name}.{kind.__name__}.png")
                figure.savefig(written[-1], dpi=130)
                plt.close(figure)
    return written


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    for path in draw(Path(sys.argv[1]), Path(sys.argv[2])):
        print(f"written: {path}")
